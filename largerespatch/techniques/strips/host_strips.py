"""Maps of a U-Net on the host: what makes one makes it there, strip by strip, and reads it so. Exact.

Other than in an encoder or decoder (see `largerespatch.techniques.vae.walk`) a map has several readers, skip
connections among them. So none is written over, and modules are left as they are where a map is small.
"""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from torch import nn

from ...core.families import Order, Site
from ...core.hosts import Host
from ...core.maps import ComputedMap, StoredMap
from ...core.modules import named_modules
from ...core.pieces import assemble
from ...core.planes import Map, fetch
from ...core.statistics import GivenStatistics
from ...core.tilings import Run, Tile
from .cuts import Strips, rows_of
from .strips import (
    Forward,
    StripResample,
    StripResnet,
    StripUpsample,
    bare,
    can_be_resnet,
    can_be_upsampler,
    is_differentiated,
    reach,
    strip_embedding,
)

# What maps on the host must know the inside of: that a downsampler is one convolution, centred on every other cell.
LEANS_ON = ("diffusers.models.downsampling.Downsample2D.forward",)

# Rows of a strip where it is not said.
ROWS = 16


class HostStrips(Strips):
    """Strips of maps that are on the host where they are large.

    Args:
        rows: of a strip, on every map; None: `ROWS`, and maps that stay on the device are not cut.
        wrap: see `Strips`.
        host: where large maps live, and which maps are.
    """

    def __init__(self, rows: int | None, wrap: bool, host: Host) -> None:
        super().__init__(ROWS if rows is None else rows, wrap)
        self.cuts_all = rows is not None
        self.host = host

    def is_one(self, plane: torch.Tensor, made: Sequence[int] = ()) -> bool:
        large = self.host.takes(plane, plane.shape) or (bool(made) and self.host.takes(plane, made))
        return super().is_one(plane, made) or not (self.cuts_all or large)

    def empty(self, like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        return StoredMap.empty(shape, like, self.host) if self.host.takes(like, shape) else super().empty(like, shape)


class HostConvolution(StripResample):
    """Takes the place of the ``forward`` of a convolution whose output is as large as its input.

    `delivers`: what it makes is the model's result, which stays on the device.
    """

    def __init__(self, module: nn.Module, strips: HostStrips, delivers: bool = False) -> None:
        super().__init__(strips, Fraction(1), reach(module), plain=True)
        self.module = module
        self.delivers = delivers

    def __call__(self, original: Forward, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shape = (len(hidden_states), bare(self.module).out_channels, *hidden_states.shape[2:])
        if self.strips.is_one(hidden_states, shape) or is_differentiated(self.module, hidden_states):
            return original(hidden_states, *args, **kwargs)
        return self.run(original, hidden_states, *args, **kwargs)

    def output(self, source: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return like.new_empty(shape) if self.delivers else super().output(source, like, shape)


class HostDownsample(StripResample):
    """Takes the place of the ``forward`` of a ``Downsample2D`` that is centred on every other cell, from the first."""

    def __init__(self, module: Downsample2D, strips: HostStrips) -> None:
        super().__init__(strips, Fraction(1, 2), halo=2)
        self.module = module

    def __call__(self, original: Forward, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.strips.is_one(hidden_states) or is_differentiated(self.module, hidden_states):
            return original(hidden_states, *args, **kwargs)
        size = [(length + 1) // 2 for length in hidden_states.shape[-2:]]
        return self.assembled(hidden_states, size, lambda block, top: original(block, *args, **kwargs))


class HostPointwise:
    """Takes the place of the ``forward`` of a norm or an activation of a map that is on the host.

    What needs no statistics, and has no weights that might have left again, is computed where its result is read.
    """

    def __init__(self, module: nn.Module, strips: HostStrips) -> None:
        self.module = module
        self.strips = strips
        self.norm = module if isinstance(module, nn.GroupNorm) else None

    def applies(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> bool:
        away = isinstance(hidden_states, Map) and hidden_states.away
        return away and not is_differentiated(self.module, hidden_states)

    def __call__(self, original: Forward, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.norm is None:
            return ComputedMap(hidden_states.shape, hidden_states, partial(_each, original, hidden_states))
        statistics = self.strips.statistics(hidden_states, self.norm)

        def normalized(strip: Tile, rows: torch.Tensor) -> torch.Tensor:
            with GivenStatistics(statistics):
                return original(rows)

        return assemble(  # type: ignore[no-any-return]
            self.strips.cut(hidden_states),
            normalized,
            rows_of,
            make=lambda rows: self.strips.empty(rows, (*rows.shape[:2], *hidden_states.shape[2:])),
            read=lambda strips: fetch(hidden_states, [(strip.top, strip.bottom) for strip in strips]),
        )


def _each(original: Forward, plane: torch.Tensor, runs: Sequence[Run]) -> Iterator[torch.Tensor]:
    yield from map(original, fetch(plane, runs))


def _of_blocks(module: Any, strips: HostStrips) -> Callable[..., Any] | None:
    if can_be_resnet(module):
        return StripResnet(module, strips)
    if can_be_upsampler(module):
        return StripUpsample(module, strips)
    match module:
        case Downsample2D(norm=None, use_conv=True, padding=1) if bare(module.conv).kernel_size == (3, 3):
            return HostDownsample(module, strips)
    if type(module).__name__ == "ControlNetConditioningEmbedding":
        return strip_embedding(module, strips)
    return None


def _of_ends(model: Any, strips: HostStrips) -> dict[nn.Module, Callable[..., Any]]:
    """What takes the place of the first and last layers of a U-Net or ControlNet."""
    conv_in, conv_out, norm = (getattr(model, name, None) for name in ("conv_in", "conv_out", "conv_norm_out"))
    found: dict[nn.Module, Callable[..., Any]] = {}
    if conv_in is not None and isinstance(bare(conv_in), nn.Conv2d):
        found[conv_in] = HostConvolution(conv_in, strips)
    if conv_out is not None and isinstance(bare(conv_out), nn.Conv2d):
        found[conv_out] = HostConvolution(conv_out, strips, delivers=True)
    if isinstance(norm, nn.GroupNorm):
        found |= {norm: HostPointwise(norm, strips)}
        found |= {model.conv_act: HostPointwise(model.conv_act, strips)}
    for convolution in getattr(model, "controlnet_down_blocks", ()):
        if isinstance(bare(convolution), nn.Conv2d):
            found[convolution] = HostConvolution(convolution, strips)
    return found


def host_sites(model: nn.Module, name: str, strips: HostStrips) -> Iterator[Site]:
    """All that reads or makes a large map in a U-Net or a ControlNet, its transformers aside."""
    ends: dict[nn.Module, Callable[..., Any]] = {}
    modules = named_modules(model, name)
    for _, each in modules:
        if hasattr(each, "down_blocks") and hasattr(each, "conv_in"):
            ends |= _of_ends(each, strips)
    least = f"{strips.host.least / 2**20:g} MiB"
    says = f"maps of at least {least} on the host, read and written in strips of {strips.rows} rows"
    for path, module in modules:
        technique = ends.get(module) or _of_blocks(module, strips)
        if technique is not None:
            yield Site(module, path, Order.IN_STRIPS, technique, says=says)
