"""Flux 2's transformer, Klein's too: text first, two streams, then one whose blocks do all in one projection."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from ..core.families import register
from ..techniques.joint.tokens import BOTH, IMAGE, TEXT, Kind, Rows, Size, Tokens
from .any import Call
from .joint import Packed, maps_of_ids

# What `DOUBLE` and `SINGLE` must know the inside of: of which tokens arguments and results have rows, and their order
# in attention; with a cache of references, that these attend to themselves after all others did to all.
_ROOM = "diffusers.models.transformers.transformer_flux2."
LEANS_ON = (
    f"{_ROOM}Flux2TransformerBlock.forward",
    f"{_ROOM}Flux2SingleTransformerBlock.forward",
    f"{_ROOM}Flux2AttnProcessor.__call__",
    f"{_ROOM}Flux2ParallelSelfAttnProcessor.__call__",
    f"{_ROOM}Flux2KVAttnProcessor.__call__",
    f"{_ROOM}Flux2KVParallelSelfAttnProcessor.__call__",
    f"{_ROOM}_flux2_kv_causal_attention",
    f"{_ROOM}Flux2Transformer2DModel.forward",
)

DOUBLE = Tokens(
    takes={"hidden_states": IMAGE, "encoder_hidden_states": TEXT, "image_rotary_emb": BOTH.along(0)},
    gives=(TEXT, IMAGE),
    text_first=True,
)
SINGLE = Tokens(takes={"hidden_states": BOTH, "image_rotary_emb": BOTH.along(0)}, gives=BOTH, text_first=True)


def _with_cache(tokens: Tokens, modulation: str, rows: Rows) -> Callable[[Mapping[str, Any]], Tokens]:
    """The `tokens` of a block, with keys of references that are kept from the first step for the others.

    In the first step references come before the image, attend to themselves alone, and have a `modulation` of their
    own. So they go with every tile, and what is kept is the same each time.
    """

    def told(arguments: Mapping[str, Any]) -> Tokens:
        cache = arguments.get("joint_attention_kwargs") or {}
        mode, count = cache.get("kv_cache_mode"), cache.get("num_ref_tokens", 0)
        if mode == "extract" and count:
            return replace(tokens, takes={**tokens.takes, modulation: rows}, ahead=count, keys_between=count)
        return replace(tokens, keys_between=count) if mode == "cached" else tokens

    return told


@register
class Flux2(Packed):
    """`Flux2Transformer2DModel`. Pictures to look at come after the image, those with a cache before it, once."""

    class_name = "Flux2Transformer2DModel"
    takes: Mapping[str, Any] = MappingProxyType({"hidden_states": IMAGE, "img_ids": IMAGE.along(-2)})
    ends = ("x_embedder", "norm_out", "proj_out")

    def kinds(self, model: Any) -> Mapping[str, Kind]:
        return {
            "transformer_blocks": _with_cache(DOUBLE, "temb_mod_img", IMAGE),
            "single_transformer_blocks": _with_cache(SINGLE, "temb_mod", BOTH),
        }

    def maps(self, model: Any, arguments: Mapping[str, Any]) -> Sequence[Size]:
        ahead = arguments.get("num_ref_tokens", 0) if arguments.get("kv_cache_mode") == "extract" else 0
        return maps_of_ids(arguments["img_ids"][..., ahead:, :3])

    def told(self, call: Call) -> dict[str, Any]:
        config, tokens = call.model.config, call.prompt_tokens()
        return {
            "encoder_hidden_states": call.new(call.batch, tokens, config.joint_attention_dim),
            "timestep": call.new(call.batch),
            "img_ids": call.new(call.batch, self.tokens(call), 4),
            "txt_ids": call.new(call.batch, tokens, 4),
            "guidance": call.new(call.batch, dtype=torch.float32) if config.guidance_embeds else None,
        }
