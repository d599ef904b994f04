"""Stable Diffusion 3's transformer."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..core.calls import PROMPT_TOKENS
from ..core.families import register
from ..techniques.joint.tokens import IMAGE, TEXT, Tokens
from .any import Call
from .joint import JointAttention

# What `TOKENS` must know the inside of: of which tokens arguments and results have rows, and their order in attention.
# And of the model, that it passes tokens on from block to block and keeps none.
LEANS_ON = (
    "diffusers.models.attention.JointTransformerBlock.forward",
    "diffusers.models.attention_processor.JointAttnProcessor2_0.__call__",
    "diffusers.models.transformers.transformer_sd3.SD3Transformer2DModel.forward",
)

TOKENS = Tokens(
    takes={"hidden_states": IMAGE, "encoder_hidden_states": TEXT},
    gives=(TEXT, IMAGE),
    text_first=False,
    asking=("attn.to_q", "attn.add_q_proj", "attn2.to_q"),
    attentions=lambda block: 1 + bool(getattr(block, "use_dual_attention", False)),
)


@register
class StableDiffusion3(JointAttention):
    """`SD3Transformer2DModel`. The image's positions are cut from the middle of a table."""

    class_name = "SD3Transformer2DModel"
    passes_on = True
    takes: Mapping[str, Any] = MappingProxyType({"block_controlnet_hidden_states": IMAGE})
    ends = ("norm_out", "proj_out")

    def kinds(self, model: Any) -> Mapping[str, Tokens]:
        return {"transformer_blocks": TOKENS}

    def longest(self, model: Any) -> tuple[int, bool] | None:
        return model.config.pos_embed_max_size * model.config.patch_size, True

    def told(self, call: Call) -> dict[str, Any]:
        config, tokens = call.model.config, PROMPT_TOKENS + call.prompt_tokens()
        return {
            "encoder_hidden_states": call.new(call.batch, tokens, config.joint_attention_dim),
            "pooled_projections": call.new(call.batch, config.pooled_projection_dim),
            "timestep": call.new(call.batch),
        }
