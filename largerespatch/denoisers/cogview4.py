"""CogView 4's transformer: text first, which may be masked."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..core.families import Order, Site, register
from ..techniques.joint.tokens import IMAGE, TEXT, Tokens
from .any import Call
from .joint import JointAttention

# What `TOKENS` must know the inside of: of which tokens arguments and results have rows, and their order in attention;
# of the model, that it passes tokens on from block to block; and that neighbours share positions where there are more
# cells than these, which it looks up on the host.
LEANS_ON = (
    "diffusers.models.transformers.transformer_cogview4.CogView4TransformerBlock.forward",
    "diffusers.models.transformers.transformer_cogview4.CogView4AttnProcessor.__call__",
    "diffusers.models.transformers.transformer_cogview4.CogView4Transformer2DModel.forward",
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

    class_name = "CogView4Transformer2DModel"
    in_turns = True
    ends = ("norm_out", "proj_out")

    def kinds(self, model: Any) -> Mapping[str, Tokens]:
        return {"transformer_blocks": TOKENS}

    def sites(self, model: Any, name: str, options: Any, pipe: Any) -> Iterator[Site]:
        yield from super().sites(model, name, options, pipe)
        yield Site(model.rope, f"{name}.rope", Order.MAP_NOTED, _brought)

    def longest(self, model: Any) -> tuple[int, bool] | None:
        return min(model.config.rope_axes_dim) * model.config.patch_size, False

    def told(self, call: Call) -> dict[str, Any]:
        sizes = {name: call.new(call.batch, 2) for name in ("original_size", "target_size", "crop_coords")}
        text = call.new(call.batch, call.prompt_tokens(), call.model.config.text_embed_dim)
        return {"encoder_hidden_states": text, "timestep": call.new(call.batch), **sizes}


def _brought(original: Callable[..., Any], hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Takes the place of a ``forward`` that looks up positions on the host: each attention would fetch them anew, and
    cells that are on the device would not find theirs."""
    return tuple(each.to(hidden_states.device) for each in original(hidden_states))
