"""Krea 2's transformer: one stream, text first, which blocks of its own have fused from many layers of an encoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..core.families import register
from ..techniques.joint.tokens import BOTH, Kind, Size, Tokens
from .any import Call
from .joint import Packed, maps_of_ids

# What `TOKENS` must know the inside of: of which tokens arguments and results have rows, and their order in attention
# and among positions.
_ROOM = "diffusers.models.transformers.transformer_krea2."
LEANS_ON = (
    f"{_ROOM}Krea2TransformerBlock.forward",
    f"{_ROOM}Krea2AttnProcessor.__call__",
    f"{_ROOM}Krea2Transformer2DModel.forward",
)


def _copies(block: Any) -> int:
    """Heads of queries to one of keys, which the processor copies for each."""
    return int(block.attn.num_heads // block.attn.num_kv_heads)


TOKENS = Tokens(
    takes={"hidden_states": BOTH, "image_rotary_emb": BOTH.along(0), "attention_mask": BOTH.along(3)},
    gives=BOTH,
    text_first=True,
    copies=_copies,
)


@register
class Krea2(Packed):
    """`Krea2Transformer2DModel`. Its tokens are squares of four latent pixels, packed by the pipeline."""

    class_name = "Krea2Transformer2DModel"
    in_turns = True
    of_all = ("position_ids",)
    ends = ("img_in", "final_layer")

    def kinds(self, model: Any) -> Mapping[str, Kind]:
        return {"transformer_blocks": TOKENS}

    def maps(self, model: Any, arguments: Mapping[str, Any]) -> Sequence[Size]:
        return maps_of_ids(arguments["position_ids"][arguments["encoder_hidden_states"].shape[1] :])

    def told(self, call: Call) -> dict[str, Any]:
        config, tokens = call.model.config, call.prompt_tokens()
        return {
            "encoder_hidden_states": call.new(call.batch, tokens, config.num_text_layers, config.text_hidden_dim),
            "timestep": call.new(call.batch),
            "position_ids": call.new(tokens + self.tokens(call), 3),
            "encoder_attention_mask": call.new(call.batch, tokens, dtype=torch.bool),
        }
