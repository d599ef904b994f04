"""A strip's halo in place of padding: convolutions compute no row in vain. Exact, to rounding."""

from collections.abc import Callable
from contextlib import nullcontext
from fractions import Fraction
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ...core.tilings import Tile
from .cuts import Block


class HaloForPadding(TorchFunctionMode):
    """Makes ``F.conv2d`` pad at the sides alone, for strips that have a halo: no row of that is computed in vain.

    What pads before it calls that, as convolutions with circular padding do, gives as many rows as ever.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_padded_at_sides if func is F.conv2d else func)(*args, **(kwargs or {}))


def _padded_at_sides(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    *others: Any,
    **named: Any,
) -> torch.Tensor:
    """``F.conv2d`` without rows of padding; a way of padding that has a name is left as it is."""
    if not isinstance(padding, str):
        padding = (0, padding if isinstance(padding, int) else padding[-1])
    return F.conv2d(input, weight, bias, stride, padding, *others, **named)


def own_rows(
    work: Callable[[torch.Tensor], torch.Tensor], strip: Tile, given: Block, halo: int, scale: Fraction = Fraction(1)
) -> torch.Tensor:
    """A strip's own rows of what `work`, convolutions one after another, makes of it, given with up to so much halo.

    At the map's edges, where there is no halo, they pad.
    """
    above, block = given
    inside = halo > 0 and above == halo and block.shape[-2] == strip.height + 2 * halo
    with HaloForPadding() if inside else nullcontext():
        result = work(block)
    missing = int(block.shape[-2] * scale) - result.shape[-2] if inside else 0
    first = int(above * scale) - missing // 2
    return result[:, :, first : first + ceil(strip.height * scale)]
