"""`AutoencoderTiny`, which previews pictures: convolutions alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from ..core.families import Site, register
from ..techniques.shared_maps import InBands
from ..techniques.strips.strips import Forward
from ..techniques.vae.halves import InPieces
from ..techniques.vae.stages import Split, measure
from ..techniques.vae.walk import CONTAINERS, Walk, register_way
from ..techniques.vae.walked import WalkedResample
from .kl import HALVES, KL

# What pieces must know the inside of: that all of an encoder or decoder but what acts on single cells is in `layers`,
# and that a block is its convolutions and what acts on single cells.
LEANS_ON = (
    "diffusers.models.autoencoders.vae.EncoderTiny.forward",
    "diffusers.models.autoencoders.vae.DecoderTiny.forward",
    "diffusers.models.unets.unet_2d_blocks.AutoencoderTinyBlock.forward",
)

CONTAINERS.add("Sequential")

SCALE = 2  # of its resamplers


@register
class Tiny(KL):
    """Convolutions, some with a stride, and upsamplers, in a row."""

    ends_in_picture = False  # it is scaled
    shared_classes = ("AutoencoderTiny",)

    def matches(self, model: nn.Module) -> bool:
        encoder, decoder = (getattr(model, half, None) for half in HALVES)
        kinds = type(encoder).__name__, type(decoder).__name__
        return kinds == ("EncoderTiny", "DecoderTiny") and all(map(_doubles, _upsamplers(decoder)))

    def sites(self, model: Any, name: str, options: Any, pipe: Any) -> Iterator[Site]:
        for site in super().sites(model, name, options, pipe):
            if isinstance(site.technique, InPieces | InBands) and site.module is model.encoder.layers:
                site = replace(site, technique=WholeCells(site.technique, self.factor(model)))
            yield site

    def half(self, model: Any, which: str, name: str) -> tuple[Any, str]:
        return getattr(model, which).layers, f"{name}.{which}.layers"

    def splits(self, half: Any, encodes: bool) -> list[Split]:
        """With the two finest levels in tiles, or more: the best are those with the least in them."""
        stages = [measure(module) for module in half]
        if encodes:
            halving = [i for i, stage in enumerate(stages) if stage.scale < 1]
            return [Split(stages, range(stop)) for stop in (*(i + 1 for i in halving[1:]), len(stages))]
        doubling = [i for i, stage in enumerate(stages) if stage.scale > 1]
        return [Split(stages, range(start, len(stages))) for start in (*(i + 1 for i in doubling[-2::-1]), 0)]

    def factor(self, model: Any) -> int:
        return int(SCALE ** len(_upsamplers(model.decoder)))


class WholeCells:
    """`technique` for images of whole latent pixels alone: of others an encoder makes one more than fit."""

    def __init__(self, technique: InPieces | InBands, factor: int) -> None:
        self.technique = technique
        self.factor = factor

    @property
    def holds(self) -> Sequence[Sequence[nn.Module]]:
        return getattr(self.technique, "holds", ())

    def applies(self, sample: torch.Tensor) -> bool:
        return all(length % self.factor == 0 for length in sample.shape[-2:])

    def __call__(self, original: Forward, sample: torch.Tensor) -> torch.Tensor:
        return self.technique(original, sample)


def _doubles(upsampler: nn.Upsample) -> bool:
    return upsampler.scale_factor == SCALE and upsampler.mode == "nearest"


def _upsamplers(decoder: Any) -> list[nn.Upsample]:
    return [module for module in decoder.layers if isinstance(module, nn.Upsample)]


@register_way
def _strip_by_strip(module: Any, walk: Walk) -> Any:
    match module:
        case _ if type(module).__name__ == "AutoencoderTinyBlock":
            return WalkedResample(walk, Fraction(1), halo=int(measure(module).reach))
        case nn.Upsample() if _doubles(module):
            return WalkedResample(walk, Fraction(SCALE), halo=0)
        case nn.Conv2d(stride=(2, 2), padding=(1, 1)):
            return WalkedResample(walk, Fraction(1, 2), halo=2)
    return None
