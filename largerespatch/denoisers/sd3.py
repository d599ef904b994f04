"""Stable Diffusion 3's transformer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core.calls import PROMPT_TOKENS
from ..core.families import register
from ..techniques.tokens import IMAGE, TEXT, Size, Tokens
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
    idle=("attn.to_q", "attn.add_q_proj", "attn2.to_q"),
    attentions=lambda block: 1 + bool(getattr(block, "use_dual_attention", False)),
)


@register
class StableDiffusion3(JointAttention):
    """`SD3Transformer2DModel`. The image's positions are cut from the middle of a table."""

    passes_on = True

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "SD3Transformer2DModel"

    def kinds(self, model: Any) -> Mapping[str, Tokens]:
        return {"transformer_blocks": TOKENS}

    def maps(self, model: Any, arguments: Mapping[str, Any]) -> Sequence[Size]:
        height, width = arguments["hidden_states"].shape[-2:]
        return [(height // model.config.patch_size, width // model.config.patch_size)]

    def longest(self, model: Any) -> tuple[int, bool] | None:
        return model.config.pos_embed_max_size * model.config.patch_size, True

    def predict(self, call: Call) -> torch.Tensor:
        config = call.model.config
        result: torch.Tensor = call.model(
            self.sample(call),
            call.new(call.batch, PROMPT_TOKENS + call.prompt_tokens(), config.joint_attention_dim),
            call.new(call.batch, config.pooled_projection_dim),
            call.new(call.batch),
            return_dict=False,
        )[0]
        return result
