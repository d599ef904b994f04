"""A second input that is cut as the map is: pieces of a map say where they are, and who looks elsewhere looks there.

Norms that look at the latent see it, at whatever scale a map has, where their piece of the map is. Exact.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from fractions import Fraction
from typing import NamedTuple

import torch
from diffusers.models.attention_processor import SpatialNorm
from torch import nn

from ...core.tilings import Tile

# What cutting alike must know the inside of: that such a norm brings the latent to the size of its map by repeating its
# cells, which changes nothing of what has that size already.
LEANS_ON = ("diffusers.models.attention_processor.SpatialNorm.forward",)


class Piece(NamedTuple):
    """What maps are cut from that are computed now: tiles of a plane that is so wide, one after another in a batch."""

    tiles: Sequence[Tile]
    width: int


_PIECE: ContextVar[Piece | None] = ContextVar("piece", default=None)


@contextmanager
def piece(tiles: Sequence[Tile], width: int) -> Iterator[None]:
    """Inside, maps are cut from these tiles of a plane, whatever their scale. Tiles may lie over its edges."""
    token = _PIECE.set(Piece(tiles, width))
    try:
        yield
    finally:
        _PIECE.reset(token)


def looks(model: nn.Module) -> bool:
    """Whether something in a model looks at a second input."""
    return any(isinstance(module, SpatialNorm) for module in model.modules())


def looking_there(
    original: Callable[..., torch.Tensor], hidden_states: torch.Tensor, latent: torch.Tensor
) -> torch.Tensor:
    """Takes the place of the ``forward`` of a norm of maps ``[B, C, H, W]`` that looks at a latent."""
    if (now := _PIECE.get()) is not None:
        latent = torch.cat([_cells(latent, tile, now.width, hidden_states.shape) for tile in now.tiles])
    return original(hidden_states, latent)


def _cells(latent: torch.Tensor, tile: Tile, width: int, shape: torch.Size) -> torch.Tensor:
    """Those of the whole latent that the cells of a map of `tile` lie in, ``[B, C, h, w]``."""
    scale = Fraction(shape[-1], tile.width)
    per_cell = int(scale * width / latent.shape[-1])  # cells of the map, along each axis
    for dim, start in ((-2, tile.top), (-1, tile.left)):
        first = int(start * scale)
        places = torch.arange(first, first + shape[dim], device=latent.device) // per_cell % latent.shape[dim]
        latent = latent.index_select(dim, places)
    return latent
