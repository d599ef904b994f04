"""Lumina 2's transformer: one stream of tokens, the text's first, and before it blocks for the image alone."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..core.families import Order, Site, register
from ..core.tilings import PHASES
from ..techniques.attention.blocked import Blocking, blocking_of
from ..techniques.joint.tokens import BOTH, Size, Tokens
from ..techniques.serial import SerialBatch
from .any import Call
from .joint import JointAttention, patches

# What `TOKENS` must know the inside of: of which tokens arguments and results have rows, and their order in attention;
# and that each sample's image comes after as many tokens of text as its mask has ones.
LEANS_ON = (
    "diffusers.models.transformers.transformer_lumina2.Lumina2TransformerBlock.forward",
    "diffusers.models.transformers.transformer_lumina2.Lumina2AttnProcessor2_0.__call__",
    "diffusers.models.transformers.transformer_lumina2.Lumina2RotaryPosEmbed.forward",
    "diffusers.models.transformers.transformer_lumina2.Lumina2Transformer2DModel.forward",
)

TOKENS = Tokens(
    takes={"hidden_states": BOTH, "attention_mask": BOTH, "image_rotary_emb": BOTH}, gives=BOTH, text_first=True
)


@register
class Lumina2(JointAttention):
    """`Lumina2Transformer2DModel`, which pipelines call once for each half of guidance."""

    class_name = "Lumina2Transformer2DModel"
    in_turns = True

    def kinds(self, model: Any) -> Mapping[str, Tokens]:
        return {"noise_refiner": TOKENS, "layers": TOKENS}

    def maps(self, model: Any, arguments: Mapping[str, Any]) -> Sequence[Size]:
        return [] if _differ(arguments) else super().maps(model, arguments)

    def sites(self, model: Any, name: str, options: Any, pipe: Any) -> Iterator[Site]:
        for site in super().sites(model, name, options, pipe):
            yield site
            if site.order is Order.MAP_NOTED:  # unless it is left as it is
                yield Site(model, name, Order.BATCH_IN_TURNS, TextsInTurns(model, blocking_of(options)))

    def scheduled(self, timestep: float) -> float:
        return 1000 - 1000 * timestep

    def longest(self, model: Any) -> tuple[int, bool] | None:
        return min(model.config.axes_lens[1:]) * model.config.patch_size, True

    def told(self, call: Call) -> dict[str, Any]:
        tokens = call.prompt_tokens()
        mask = call.new(call.batch, tokens, dtype=torch.int64)
        # It is asked for values, of which there are none: all of the text counts.
        lengths = SimpleNamespace(tolist=lambda: [tokens] * call.batch)
        return {
            "timestep": call.new(call.batch),
            "encoder_hidden_states": call.new(call.batch, tokens, call.model.config.cap_feat_dim),
            "encoder_attention_mask": SimpleNamespace(shape=mask.shape, bool=mask.bool, sum=lambda dim: lengths),
        }


class TextsInTurns(SerialBatch):
    """Where texts differ in length each sample's image starts at another place of the stream: so one after another.

    Exact. Where nothing is cut by `blocking` they stay together.
    """

    def __init__(self, model: nn.Module, blocking: Blocking) -> None:
        super().__init__(model, "texts of different lengths")
        self.blocking = blocking
        self._signature = inspect.signature(type(model).forward)

    def applies(self, *args: object, **kwargs: object) -> bool:
        arguments = self._signature.bind_partial(self.model, *args, **kwargs).arguments
        height, width = patches(self.model, arguments)
        return (
            height * width > self.blocking.full_tokens
            and _differ(arguments)
            and any(len(self.blocking.cover(height, width, phase)) > 1 for phase in range(PHASES))
        )


def _differ(arguments: Mapping[str, Any]) -> bool:
    """Whether samples have more or less text than others."""
    return len(set(arguments["encoder_attention_mask"].sum(dim=1).tolist())) > 1
