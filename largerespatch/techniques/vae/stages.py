"""What runs whole and what in tiles: the stages of an encoder or decoder, and the reach of their convolutions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, prod
from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

# What a stage must know the inside of: that modules run in the order they are registered in.
LEANS_ON = (
    "diffusers.models.autoencoders.vae.Encoder.forward",
    "diffusers.models.autoencoders.vae.Decoder.forward",
    "diffusers.models.unets.unet_2d_blocks.DownEncoderBlock2D.forward",
    "diffusers.models.unets.unet_2d_blocks.UpDecoderBlock2D.forward",
    "diffusers.models.resnet.ResnetBlock2D.forward",
    "diffusers.models.upsampling.Upsample2D.forward",
    "diffusers.models.downsampling.Downsample2D.forward",
)

# What an encoder or decoder calls in the end.
LAST = ("conv_norm_out", "conv_act", "conv_out")


def pass_through(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return hidden_states


@dataclass(frozen=True)
class Skip:
    """How a stage is left out of its model's forward: what takes the place of its own, and attributes of the model.

    Those matter where the model adds a shortcut around the stage.
    """

    forward: Callable[..., torch.Tensor] = pass_through
    settings: Mapping[str, Any] = field(default_factory=dict)


PASSED = Skip()


@dataclass(frozen=True)
class Stage:
    """One child of an encoder or decoder, and what its convolutions do to a map.

    `scale` is its output's size relative to its input's; `reach` how many cells of its input an output cell needs on
    each side; `values` the most values that any of its layers puts out per cell of its input.
    """

    module: nn.Module
    scale: Fraction
    reach: Fraction
    values: Fraction
    skip: Skip = PASSED


# What gives by how much a module scales a map before its convolution `conv` and after it; None: it is not of its kind.
Scaling = Callable[[Any], tuple[int, Fraction] | None]

_SCALINGS: list[Scaling] = []


def register_scaling(scaling: Scaling) -> Scaling:
    """Makes known how modules scale maps beside the strides of their convolutions; to be written over it."""
    _SCALINGS.append(scaling)
    return scaling


@register_scaling
def _of_upsampler(module: nn.Module) -> tuple[int, Fraction] | None:
    return (2, Fraction(1)) if isinstance(module, Upsample2D | nn.Upsample) else None


def measure(module: nn.Module, skip: Skip = PASSED) -> Stage:
    """Walk the convolutions of a stage in the order they are registered in, which is the order they run in."""
    scale, reach, values = Fraction(1), Fraction(0), Fraction(0)
    after: dict[Any, Fraction] = {}
    for child in module.modules():
        if found := next(filter(None, (scaling(child) for scaling in _SCALINGS)), None):
            scale, after[getattr(child, "conv", None)] = scale * found[0], found[1]
        if isinstance(child, nn.Conv2d | nn.Conv3d) and not _over_time(child):
            span = child.dilation[-2] * (child.kernel_size[-2] - 1)
            strided = child.stride[-2] > 1
            # Only a convolution without a stride is centred: VAEs pad the others to the right and below.
            reach += Fraction(span, 1 if strided else 2) / scale
            scale /= child.stride[-2]
            values = max(values, child.out_channels * scale**2)
            scale *= after.get(child, 1)
    return Stage(module, scale, reach, values, skip)


def _over_time(convolution: nn.Conv2d | nn.Conv3d) -> bool:
    """Whether it mixes frames alone, so that it is not called for a single one."""
    frames, *cells = convolution.kernel_size
    return len(cells) == 2 and frames > 1 and set(cells) == {1}


def scale_of(stages: Iterable[Stage]) -> Fraction:
    return prod((stage.scale for stage in stages), start=Fraction(1))


@dataclass(frozen=True)
class Split:
    """Which stages run in tiles (the half-open range `tiled`); the others run whole, before and after them."""

    stages: Sequence[Stage]
    tiled: range

    @property
    def scale(self) -> Fraction:
        """Size of the tiled part's output relative to its input."""
        return scale_of(self.stages[i] for i in self.tiled)

    @property
    def halo(self) -> int:
        """Cells of the tiled part's input that its convolutions need around a tile."""
        scale, reach = Fraction(1), Fraction(0)
        for i in self.tiled:
            reach += self.stages[i].reach / scale
            scale *= self.stages[i].scale
        step = ceil(1 / scale)  # windows start where the downsamplers' grid does
        return step * ceil(reach / step)

    def whole_bytes(self, height: int, width: int, batch: int, itemsize: int) -> int:
        """About what the whole part holds for an input of ``height x width`` cells: three times its largest map."""
        before, after = self.stages[: self.tiled.start], self.stages[self.tiled.stop :]
        end = scale_of(self.stages[: self.tiled.stop])
        largest = max(_largest(before, height * width), _largest(after, height * width * end**2))
        return int(3 * largest) * batch * itemsize

    def tile_values(self, height: int, width: int) -> int:
        """Those of the largest map that the tiled part makes of a tile of ``height x width`` cells, with its halo."""
        cells = (height + 2 * self.halo) * (width + 2 * self.halo)
        return int(_largest(self.stages[self.tiled.start : self.tiled.stop], cells))


def _largest(stages: Iterable[Stage], cells: int | Fraction) -> Fraction:
    """Values of the largest map that some stages, one after another, make of so many cells."""
    largest = Fraction(0)
    for stage in stages:
        largest = max(largest, cells * stage.values)
        cells *= stage.scale**2
    return largest


def decoder_splits(decoder: Any, last: Sequence[str] = LAST) -> list[Split]:
    """Ways to split a decoder, from the last two up blocks in tiles to all of them in tiles.

    In Stable Diffusion's decoder the first needs a halo of 10 cells of the 4x map (2.5 latent pixels), the last of
    13 latent pixels.
    """
    up_blocks = list(decoder.up_blocks)
    ends = [getattr(decoder, name) for name in last]
    stages = [measure(module) for module in (decoder.conv_in, decoder.mid_block, *up_blocks, *ends)]
    return [Split(stages, range(start, len(stages))) for start in range(max(len(up_blocks), 2), 1, -1)]


def encoder_splits(encoder: Any, last: Sequence[str] = LAST) -> list[Split]:
    """Ways to split an encoder, from the first down block in tiles to all but the last."""
    down_blocks = list(encoder.down_blocks)
    ends = [getattr(encoder, name) for name in last]
    stages = [measure(module) for module in (encoder.conv_in, *down_blocks, encoder.mid_block, *ends)]
    return [Split(stages, range(stop)) for stop in range(2, max(len(down_blocks), 2) + 1)]
