"""What convolutions see beyond the image's edge."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from torch import nn

from .patching import PatchStack

PADDING_MODES = ("constant", "circular", "reflect", "replicate")


class _AsymmetricPadding:
    """Takes the place of the ``forward`` of a convolution that its ``Downsample2D`` feeds one extra row and column.

    The extra ones, right and bottom, are zeros put on by the module; here they are cut off and padded anew.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __call__(self, original: Callable[..., torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
        return original(F.pad(hidden_states[:, :, :-1, :-1], (0, 1, 0, 1), mode=self.mode))


def _padded(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and any(module._reversed_padding_repeated_twice)


def pads(model: nn.Module) -> bool:
    """Whether any 2-D convolution of `model` pads its input."""
    return any(_padded(module) for module in model.modules())


def install_padding(stack: PatchStack, model: nn.Module, name: str, mode: str) -> None:
    """Make every 2-D convolution of `model` pad by `mode`, one of `PADDING_MODES`; "constant" leaves all as it is."""
    if mode == "constant":
        return
    for path, module in model.named_modules():
        if isinstance(module, Downsample2D) and module.use_conv and module.padding == 0:
            stack.wrap(module.conv, "forward", _AsymmetricPadding(mode), f"{name}.{path}.conv.forward")
        elif _padded(module):
            stack.set(module, "padding_mode", mode, f"{name}.{path}.padding_mode")
