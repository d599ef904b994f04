"""`AutoencoderDC` (Sana, SANA-Sprint): norms over channels at each cell, and linear attention at low resolution.

Nothing but that attention sees a whole map, and its sums are pooled: it is exact in strips. What follows is in tiles.
"""

from fractions import Fraction
from typing import Any

import torch
from torch import nn

from ..core.families import register
from ..core.maps import TurnedMap
from ..techniques.strips.strips import Forward, reach
from ..techniques.vae.linear_attention import WalkedLinearAttention
from ..techniques.vae.stages import Skip, Split, Stage, measure, register_scaling
from ..techniques.vae.walk import CONTAINERS, Walk, register_way
from ..techniques.vae.walked import WalkedPointwise, WalkedResample
from .kl import KL

# What strips and tiles must know the inside of: how often blocks convolve, one after another, and that all else they do
# is done at each cell; that resamplers are one convolution and move cells within squares of four; that stages run in
# the order they are registered in (a decoder's in reverse), and what is added around the first and last of them.
_ROOM = "diffusers.models.autoencoders.autoencoder_dc."
LEANS_ON = (
    f"{_ROOM}Encoder.forward",
    f"{_ROOM}Decoder.forward",
    f"{_ROOM}ResBlock.forward",
    f"{_ROOM}EfficientViTBlock.forward",
    f"{_ROOM}DCDownBlock2d.forward",
    f"{_ROOM}DCUpBlock2d.forward",
    "diffusers.models.transformers.sana_transformer.GLUMBConv.forward",
    "diffusers.models.normalization.RMSNorm.forward",
)

ATTENTION = "SanaMultiscaleLinearAttention"

CONTAINERS |= {"Sequential", "EfficientViTBlock"}


@register
class DC(KL):
    """Those that compress deeply."""

    reflected = 3  # by convolutions of 5 x 5
    shared_classes = ("AutoencoderDC",)

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "AutoencoderDC"

    def splits(self, half: Any, encodes: bool) -> list[Split]:
        return _encoder_splits(half) if encodes else _decoder_splits(half)

    def factor(self, model: Any) -> int:
        return int(model.spatial_compression_ratio)


class WalkedTurned(WalkedPointwise):
    """Takes the place of the ``forward`` of a norm over channels that is given a map with these last."""

    def __call__(self, original: Forward, hidden_states: torch.Tensor) -> torch.Tensor:
        if not isinstance(hidden_states, TurnedMap):
            return original(hidden_states)

        def turned(block: torch.Tensor) -> torch.Tensor:
            return original(block.movedim(1, -1)).movedim(-1, 1)

        return super().__call__(turned, hidden_states.turned).movedim(1, -1)


@register_way
def _of_dc(module: Any, walk: Walk) -> Any:
    match type(module).__name__:
        case "ResBlock":
            return WalkedResample(walk, Fraction(1), halo=_reach(module))
        case "GLUMBConv":
            return WalkedResample(walk, Fraction(1), halo=_reach(module))
        case "SanaMultiscaleLinearAttention":
            return WalkedLinearAttention(module, walk, halo=max(map(_reach, module.to_qkv_multiscale), default=0))
        case "DCUpBlock2d":
            return WalkedResample(walk, Fraction(2), halo=_reach(module))
        case "DCDownBlock2d":
            return WalkedResample(walk, Fraction(1, 2), halo=2 * _reach(module))
        case "RMSNorm":
            return WalkedTurned(walk)
    return None


def _reach(module: nn.Module) -> int:
    """Rows that convolutions, one after another, read above and below."""
    return sum(reach(each) for each in module.modules() if isinstance(each, nn.Conv2d))


@register_scaling
def _scaling(module: Any) -> tuple[int, Fraction] | None:
    match type(module).__name__:
        case "DCUpBlock2d":
            return (2, Fraction(1)) if module.interpolate else (1, Fraction(2))
        case "DCDownBlock2d" if module.downsample:  # else its convolution has a stride
            return 1, Fraction(1, 2)
    return None


def _is_global(stage: Stage) -> bool:
    return any(type(module).__name__ == ATTENTION for module in stage.module.modules())


def _decoder_splits(decoder: Any) -> list[Split]:
    """From the last two levels in tiles to all after those that attend."""
    first = measure(decoder.conv_in, Skip(settings={"in_shortcut": False}))
    blocks = [measure(block) for block in reversed(decoder.up_blocks)]
    stages = [first, *blocks, *map(measure, (decoder.norm_out, decoder.conv_act, decoder.conv_out))]
    least = 1 + max((i for i, stage in enumerate(stages) if _is_global(stage)), default=0)
    return [Split(stages, range(start, len(stages))) for start in range(max(len(blocks) - 1, least), least - 1, -1)]


def _encoder_splits(encoder: Any) -> list[Split]:
    """From the first level in tiles to all before those that attend, or to all but the last."""
    blocks = [measure(block) for block in encoder.down_blocks]
    last = measure(encoder.conv_out, Skip(settings={"out_shortcut": False}))
    stages = [measure(encoder.conv_in), *blocks, last]
    most = min((i for i, stage in enumerate(stages) if _is_global(stage)), default=len(blocks))
    return [Split(stages, range(stop)) for stop in range(min(2, most), most + 1)]
