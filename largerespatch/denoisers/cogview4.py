"""CogView 4's transformer: text first, which may be masked."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core.families import register
from ..techniques.tokens import IMAGE, TEXT, Size, Tokens
from .any import Call
from .joint import JointAttention

# What `TOKENS` must know the inside of: of which tokens arguments and results have rows, and their order in attention;
# and that neighbours share positions where there are more cells than these.
LEANS_ON = (
    "diffusers.models.transformers.transformer_cogview4.CogView4TransformerBlock.forward",
    "diffusers.models.transformers.transformer_cogview4.CogView4AttnProcessor.__call__",
    "diffusers.models.transformers.transformer_cogview4.CogView4RotaryPosEmbed.forward",
)

TOKENS = Tokens(
    takes={
        "hidden_states": IMAGE,
        "encoder_hidden_states": TEXT,
        "image_rotary_emb": IMAGE.along(0),
        "attention_mask": TEXT,
    },
    gives=(IMAGE, TEXT),
    text_first=True,
)


@register
class CogView4(JointAttention):
    """`CogView4Transformer2DModel`, which pipelines call once for each half of guidance."""

    in_turns = True

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "CogView4Transformer2DModel"

    def kinds(self, model: Any) -> Mapping[str, Tokens]:
        return {"transformer_blocks": TOKENS}

    def maps(self, model: Any, arguments: Mapping[str, Any]) -> Sequence[Size]:
        height, width = arguments["hidden_states"].shape[-2:]
        return [(height // model.config.patch_size, width // model.config.patch_size)]

    def longest(self, model: Any) -> tuple[int, bool] | None:
        return min(model.config.rope_axes_dim) * model.config.patch_size, False

    def predict(self, call: Call) -> torch.Tensor:
        sizes = {name: call.new(call.batch, 2) for name in ("original_size", "target_size", "crop_coords")}
        result: torch.Tensor = call.model(
            self.sample(call),
            call.new(call.batch, call.prompt_tokens(), call.model.config.text_embed_dim),
            timestep=call.new(call.batch),
            **sizes,
            return_dict=False,
        )[0]
        return result
