"""Krea 2's transformer: one stream, text first, which blocks of its own have fused from many layers of an encoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core.families import register
from ..techniques.tokens import BOTH, Kind, Size, Tokens
from .any import Call
from .joint import JointAttention, asked_for, maps_of_ids

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
class Krea2(JointAttention):
    """`Krea2Transformer2DModel`. Its tokens are squares of four latent pixels, packed by the pipeline."""

    in_turns = True

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "Krea2Transformer2DModel"

    def kinds(self, model: Any) -> Mapping[str, Kind]:
        return {"transformer_blocks": TOKENS}

    def maps(self, model: Any, arguments: Mapping[str, Any]) -> Sequence[Size]:
        return maps_of_ids(arguments["position_ids"][arguments["encoder_hidden_states"].shape[1] :])

    def scheduled(self, timestep: float) -> float:
        return 1000 * timestep

    def sample(self, call: Call) -> torch.Tensor:
        height, width = call.latent
        return call.new(call.batch, height // 2 * (width // 2), call.model.config.in_channels)

    def predict(self, call: Call) -> torch.Tensor:
        config, sample, tokens = call.model.config, self.sample(call), call.prompt_tokens()
        with asked_for((call.latent[0] // 2, call.latent[1] // 2)):
            result: torch.Tensor = call.model(
                sample,
                call.new(call.batch, tokens, config.num_text_layers, config.text_hidden_dim),
                call.new(call.batch),
                call.new(tokens + sample.shape[1], 3),
                call.new(call.batch, tokens, dtype=torch.bool),
                return_dict=False,
            )[0]
        return result
