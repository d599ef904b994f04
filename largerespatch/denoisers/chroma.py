"""Chroma's transformer: as Flux, whose processors it has, but that text which only fills up is masked."""

from collections.abc import Mapping
from typing import Any

from ..core.families import register
from ..techniques.joint.tokens import BOTH, IMAGE, TEXT, Tokens
from .any import Call
from .flux import TAKES, Flux
from .joint import told_of_adapters

# What `DOUBLE` and `SINGLE` must know the inside of: of which tokens arguments and results have rows. And of the model,
# that it looks from one token at others in its blocks alone.
_ROOM = "diffusers.models.transformers.transformer_chroma."
LEANS_ON = (
    f"{_ROOM}ChromaTransformerBlock.forward",
    f"{_ROOM}ChromaSingleTransformerBlock.forward",
    f"{_ROOM}ChromaTransformer2DModel.forward",
)

# A block makes a square of the mask: of a tile's tokens, not of all.
MASKED = {"image_rotary_emb": BOTH.along(0), "attention_mask": BOTH}
DOUBLE = Tokens(
    takes={"hidden_states": IMAGE, "encoder_hidden_states": TEXT, **MASKED}, gives=(TEXT, IMAGE), text_first=True
)
SINGLE = Tokens(takes={"hidden_states": BOTH, **MASKED}, gives=BOTH, text_first=True)


@register
class Chroma(Flux):
    """`ChromaTransformer2DModel`."""

    class_name = "ChromaTransformer2DModel"
    in_turns = True
    takes: Mapping[str, Any] = TAKES | {"attention_mask": BOTH}

    def kinds(self, model: Any) -> Mapping[str, Tokens]:
        return {"transformer_blocks": DOUBLE, "single_transformer_blocks": SINGLE}

    def told(self, call: Call) -> dict[str, Any]:
        tokens, cells = call.prompt_tokens(), self.tokens(call)
        return {
            "encoder_hidden_states": call.new(call.batch, tokens, call.model.config.joint_attention_dim),
            "timestep": call.new(call.batch),
            "img_ids": call.new(cells, 3),
            "txt_ids": call.new(tokens, 3),
            "attention_mask": call.new(call.batch, tokens + cells),
        } | told_of_adapters(call)
