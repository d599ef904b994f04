"""How maps are cut into strips, and how these are read with what lies around them. Exact."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise

import torch
from torch import nn

from ..core.maps import ComputedMap
from ..core.planes import fetch, part
from ..core.statistics import GroupStatistics, pool, record_by_rows
from ..core.tilings import Run, Tile, even_cuts, window

Block = tuple[int, torch.Tensor]  # how many rows of the halo are above a strip; the strip with its halo, [B, C, h, W]


def rows_of(strip: Tile) -> tuple[slice, slice, slice]:
    """The index of a strip's rows in a map ``[B, C, H, W]``."""
    return slice(None), slice(None), strip.rows


class Strips:
    """How maps are cut: into strips of at most `rows` rows; `wrap` where top and bottom are neighbours.

    Inputs are left as they are, for whoever else may read them: in a U-Net its skip connections. `repeats`: so modules
    that are alike leave the same behind, of inputs that look the same; see `Holding`.
    """

    repeats = True

    def __init__(self, rows: int, wrap: bool) -> None:
        self.rows = rows
        self.wrap = wrap

    def cut(self, plane: torch.Tensor, scale: Fraction = Fraction(1)) -> list[Tile]:
        """Strips of ``[B, C, H, W]``, for a module that scales them: no more rows than allowed before and after.

        A row that is no whole step of the scale is the last strip's.
        """
        height, width = plane.shape[-2:]
        step = 2 if isinstance(plane, ComputedMap) else scale.denominator
        steps = min(self.rows // max(scale.numerator, step), self.most_rows(plane) // step)
        cuts = even_cuts(height // step, max(steps, 1))
        edges = [*(step * cut for cut in cuts[:-1]), height]
        return [Tile(top, 0, bottom, width) for top, bottom in pairwise(edges)]

    def most_rows(self, plane: torch.Tensor) -> int:
        """Rows of ``[B, C, H, W]`` that its width allows at once, one at least."""
        return self.rows

    def is_one(self, plane: torch.Tensor, made: Sequence[int] = ()) -> bool:
        """Whether the original takes a map at once; `made` is the shape of what it makes of it, if another one."""
        return plane.shape[-2] <= min(self.rows, self.most_rows(plane))

    def read(self, plane: torch.Tensor, halo: int, strips: Sequence[Tile]) -> Iterator[Block]:
        """Each strip with its halo, on the device.

        A strip's own rows may be overwritten before the next one is asked for: what later strips need of them is kept
        aside. The block may be the very memory of the map.
        """
        height, width = plane.shape[-2:]
        outers = [window(strip, halo, height, width, self.wrap).outer for strip in strips]
        around = self.wrap and halo > 0
        first = part(plane, Tile(0, 0, halo, width)).clone() if around else None
        above = part(plane, Tile(height - halo, 0, height, width)).clone() if around else None
        adjacent = [False, *(upper.bottom == lower.top for upper, lower in pairwise(strips))]
        runs = [
            (strip.top if follows and strip.top else max(outer.top, 0), min(outer.bottom, height))
            for strip, outer, follows in zip(strips, outers, adjacent, strict=True)
        ]

        def with_halo(strip: Tile, outer: Tile, run: Run, rows: torch.Tensor) -> Block:
            nonlocal above
            parts, (top, _) = [rows], run
            if above is not None and top > outer.top:
                parts.insert(0, above[:, :, outer.top - top :])
            if first is not None and outer.bottom > height:
                parts.append(first[:, :, : outer.bottom - height])
            block = torch.cat(parts, dim=2) if len(parts) > 1 else rows
            if halo:
                end = strip.bottom - outer.top
                above = block[:, :, max(end - halo, 0) : end].clone()
            return strip.top - outer.top, block

        # Not a loop with variables of its own: they would keep rows that are a part of a block by then.
        yield from map(with_halo, strips, outers, runs, fetch(plane, runs))

    def statistics(
        self, plane: torch.Tensor, norm: nn.GroupNorm, seen: Sequence[GroupStatistics] = ()
    ) -> GroupStatistics:
        """Those that `norm` is given for a map; `seen` are those of its strips, where they are known."""
        runs = [(strip.top, strip.bottom) for strip in self.cut(plane)]
        return pool(seen) if seen else record_by_rows(plane, norm.num_groups, runs)

    def empty(self, like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Memory for a whole map, of the dtype of `like`."""
        return like.new_empty(tuple(shape))
