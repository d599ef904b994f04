"""Chroma's transformer: as Flux, whose processors it has, but that text which only fills up is masked."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..core.families import register
from ..techniques.tokens import BOTH, IMAGE, TEXT, Tokens
from .any import Call
from .flux import Flux
from .joint import asked_for

# What `DOUBLE` and `SINGLE` must know the inside of: of which tokens arguments and results have rows.
_ROOM = "diffusers.models.transformers.transformer_chroma."
LEANS_ON = (f"{_ROOM}ChromaTransformerBlock.forward", f"{_ROOM}ChromaSingleTransformerBlock.forward")

# A block makes a square of the mask: of a tile's tokens, not of all.
MASKED = {"image_rotary_emb": BOTH.along(0), "attention_mask": BOTH}
DOUBLE = Tokens(
    takes={"hidden_states": IMAGE, "encoder_hidden_states": TEXT, **MASKED}, gives=(TEXT, IMAGE), text_first=True
)
SINGLE = Tokens(takes={"hidden_states": BOTH, **MASKED}, gives=BOTH, text_first=True)


@register
class Chroma(Flux):
    """`ChromaTransformer2DModel`."""

    in_turns = True

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "ChromaTransformer2DModel"

    def kinds(self, model: Any) -> Mapping[str, Tokens]:
        return {"transformer_blocks": DOUBLE, "single_transformer_blocks": SINGLE}

    def predict(self, call: Call) -> torch.Tensor:
        sample, tokens = self.sample(call), call.prompt_tokens()
        with asked_for((call.latent[0] // 2, call.latent[1] // 2)):
            result: torch.Tensor = call.model(
                sample,
                call.new(call.batch, tokens, call.model.config.joint_attention_dim),
                call.new(call.batch),
                call.new(sample.shape[1], 3),
                call.new(tokens, 3),
                call.new(call.batch, tokens + sample.shape[1]),
                return_dict=False,
            )[0]
        return result
