"""What is kept of the keys and values of maps, for tokens elsewhere to attend to: all of them, or means of four."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ...core.tilings import Tile
from .tokens import Maps, Piece, Size

# Of a map with so many times the tokens of its context next to none of them would stand for themselves. Its cells of
# 2x2 take a quarter of the memory, and as context they are as good: measured, from here on.
VAST = 64


class KeptMaps:
    """What is kept of each of `maps` that a context of so many keys stands for: what is of a level of 0 are tokens.

    Of a level of 1 are means over cells of 2x2 tokens; those at the lower and right edge may hold less. `sizes` are
    the maps' in what is kept, which lies one after another, row by row.
    """

    def __init__(self, maps: Maps, context: int) -> None:
        self.maps = maps
        self.levels = [int(0 < VAST * context <= area) for area in maps.areas]
        self.sizes = Maps((-(-height >> level), -(-width >> level)) for (height, width), level in self._levelled())

    def _levelled(self) -> Iterator[tuple[Size, int]]:
        return zip(self.maps, self.levels, strict=True)

    def log_counts(self, device: torch.device) -> torch.Tensor | None:
        """How many tokens each of what is kept stands for, the logarithm of it; None if always one."""
        if not any(self.levels):
            return None
        counts = [_counts(*size, level, device).flatten() for size, level in self._levelled()]
        return torch.cat(counts).log()

    def empty(self, like: torch.Tensor, others: int) -> torch.Tensor:
        """Memory for what is kept, and so many others, of keys or values that are as `like`, ``[B, heads, n, C]``."""
        make = like.new_zeros if any(self.levels) else like.new_empty
        return make(*like.shape[:2], others + self.sizes.area, like.shape[3])

    def put(self, kept: torch.Tensor, piece: Piece, tokens: torch.Tensor) -> None:
        """Keeps the tokens of a piece, ``[B, heads, n, C]``; of cells that it has parts of, these."""
        parts = tokens.split_with_sizes([tile.area for tile in piece.tiles], dim=2)
        places = zip(piece.tiles, self.sizes, self.sizes.runs(), self._levelled(), strict=True)
        for part, (tile, size, run, (whole, level)) in zip(parts, places, strict=True):
            part, plane = _spread(part, tile.size()), _spread(kept[:, :, run], size)
            if level:
                cells = Tile(tile.top // 2, tile.left // 2, -(-tile.bottom // 2), -(-tile.right // 2))
                plane[:, :, cells.rows, cells.columns] += _shares(part, tile, whole)
            else:
                plane[:, :, tile.rows, tile.columns] = part

    def of(self, tokens: torch.Tensor, first: int) -> torch.Tensor:
        """What is kept of all tokens, and the others, of which so many come first."""
        if not any(self.levels):
            return tokens
        others = tokens.shape[2] - self.maps.area
        kept = self.empty(tokens, others)
        sizes = first, self.maps.area, others - first
        before, image, after = tokens.split_with_sizes(sizes, dim=2)
        kept[:, :, :first], kept[:, :, first + self.sizes.area :] = before, after
        everything = Piece(tuple(Tile(0, 0, *size) for size in self.maps))
        self.put(kept[:, :, first : first + self.sizes.area], everything, image)
        return kept


def _spread(rows: torch.Tensor, size: Size) -> torch.Tensor:
    """``[B, heads, h * w, C]`` as ``[B, heads, h, w, C]``."""
    return rows.view(*rows.shape[:2], *size, rows.shape[3])


def _counts(height: int, width: int, level: int, device: torch.device) -> torch.Tensor:
    """How many tokens of a map of ``height x width`` each cell of a level holds."""

    def along(length: int) -> torch.Tensor:
        places = torch.arange(0, length, 1 << level, device=device)
        return (length - places).clamp(max=1 << level).float()

    return torch.outer(along(height), along(width))


def _shares(part: torch.Tensor, tile: Tile, whole: Size) -> torch.Tensor:
    """What the tokens ``[B, heads, h, w, C]`` of a tile add to the means of cells of 2x2 of a map."""
    top, left, bottom, right = tile
    part = F.pad(part, (0, 0, left % 2, right % 2, top % 2, bottom % 2))
    batch, heads, height, width, channels = part.shape
    sums = part.view(batch, heads, height // 2, 2, width // 2, 2, channels).sum(dim=(3, 5))
    counts = _counts(*whole, 1, part.device)[top // 2 : (bottom + 1) // 2, left // 2 : (right + 1) // 2]
    return sums.div_(counts[..., None])
