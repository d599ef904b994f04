"""Stable Diffusion 3's transformer."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from ..core.calls import PROMPT_TOKENS
from ..core.families import register
from ..techniques.joint.tokens import IMAGE, TEXT, Tokens
from .any import Call
from .joint import JointAttention

# Of a picture of 384x384 in patches of 14.
SIGLIP_TOKENS = 27**2

# What `TOKENS` must know the inside of: of which tokens arguments and results have rows, and their order in attention.
# And of the model, that it passes tokens on from block to block and keeps none.
LEANS_ON = (
    "diffusers.models.attention.JointTransformerBlock.forward",
    "diffusers.models.attention_processor.JointAttnProcessor2_0.__call__",
    "diffusers.models.attention_processor.SD3IPAdapterJointAttnProcessor2_0.__call__",
    "diffusers.models.transformers.transformer_sd3.SD3Transformer2DModel.forward",
)


def _pictures(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """What an IP-Adapter makes of the pictures that it is told to look at, ``[B, n, C]``."""
    pictures: torch.Tensor | None = (arguments.get("joint_attention_kwargs") or {}).get("ip_hidden_states")
    return pictures


def _keys_beside(arguments: Mapping[str, Any]) -> int:
    return 0 if (pictures := _pictures(arguments)) is None else pictures.shape[1]


def _attentions(block: Any, arguments: Mapping[str, Any]) -> int:
    """Of text and image, and in some blocks of the image alone; with an IP-Adapter after each of the image to pictures,
    too."""
    modules = [block.attn, block.attn2] if getattr(block, "use_dual_attention", False) else [block.attn]
    adapters = [each for each in modules if hasattr(each.processor, "to_k_ip") and each.processor.scale != 0]
    return len(modules) + (0 if _pictures(arguments) is None else len(adapters))


TOKENS = Tokens(
    takes={"hidden_states": IMAGE, "encoder_hidden_states": TEXT},
    gives=(TEXT, IMAGE),
    text_first=False,
    asking=("attn.to_q", "attn.add_q_proj", "attn2.to_q"),
    attentions=_attentions,
    keys_beside=_keys_beside,
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
        } | self._told_of_adapter(call)

    def _told_of_adapter(self, call: Call) -> dict[str, Any]:
        """What an IP-Adapter looks at, if the model has one: a picture, as SigLIP sees it."""
        projection = getattr(call.model, "image_proj", None)
        if projection is None:
            return {}
        picture = call.new(call.batch, SIGLIP_TOKENS, projection.proj_in.in_features)
        return {"joint_attention_kwargs": {"ip_adapter_image_embeds": picture}}
