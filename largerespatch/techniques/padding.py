"""What convolutions see beyond the image's edge."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from torch import nn

from ..core.families import Order, Site
from ..core.modules import named_modules

# What asymmetric padding must know the inside of: where zeros are put on, by the module rather than the convolution.
LEANS_ON = ("diffusers.models.downsampling.Downsample2D.forward",)


class AsymmetricPadding:
    """Takes the place of the ``forward`` of a convolution that its ``Downsample2D`` feeds one extra row and column.

    The extra ones, right and bottom, are zeros put on by the module; here they are cut off and padded anew.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __call__(self, original: Callable[..., torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
        return original(F.pad(hidden_states[:, :, :-1, :-1], (0, 1, 0, 1), mode=self.mode))


class ModePadding:
    """Takes the place of the ``forward`` of a ``ZeroPad2d``."""

    def __init__(self, module: nn.ZeroPad2d, mode: str) -> None:
        self.module = module
        self.mode = mode

    def __call__(self, original: Callable[..., torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
        return F.pad(hidden_states, self.module.padding, mode=self.mode)


class Reflectable:
    """Takes the place of the ``forward`` of a model whose convolutions reflect: a map needs some `cells` for that.

    `least` counts cells of the model's input, and `scale` sample pixels to such a cell.
    """

    def __init__(self, least: int, scale: int, cells: int = 2) -> None:
        self.least = least
        self.scale = scale
        self.cells = {2: "two", 3: "three"}.get(cells, cells)

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        sample = args[0] if args else next(iter(kwargs.values()))
        height, width = sample.shape[-2:]
        if min(height, width) < self.least:
            raise ValueError(
                f"padding_mode 'reflect' needs an image of at least {self.least * self.scale} sample pixels a side "
                f"({self.cells} cells on the smallest map); got {width * self.scale}x{height * self.scale}"
            )
        return original(*args, **kwargs)


def reflection_sites(model: nn.Module, path: str, mode: str, least: int, scale: int, cells: int = 2) -> Iterator[Site]:
    """The check of a model's input, where its convolutions are to reflect; see `Reflectable`."""
    if mode == "reflect":
        yield Site(model, path, Order.CHECKED, Reflectable(least, scale, cells))


def padding_sites(model: nn.Module, name: str, mode: str) -> Iterator[Site]:
    """Every 2-D convolution of `model` that pads, and what pads for one; nothing where `mode` is "constant"."""
    if mode == "constant":
        return
    says = f"convolutions pad by {mode!r}"
    for path, module in named_modules(model, name):
        if isinstance(module, Downsample2D) and module.use_conv and module.padding == 0:
            yield Site(module.conv, f"{path}.conv", Order.PADDED, AsymmetricPadding(mode), says=says)
        elif isinstance(module, nn.ZeroPad2d):
            yield Site(module, path, Order.PADDED, ModePadding(module, mode), says=says)
        elif isinstance(module, nn.Conv2d) and any(module._reversed_padding_repeated_twice):
            yield Site(module, path, Order.PADDED, mode, "padding_mode", says=says)
