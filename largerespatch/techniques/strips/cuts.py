"""How maps are cut into strips, and how these are read with what lies around them. Exact."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise

import torch
from torch import nn

from ...core.bands import Bands
from ...core.maps import ComputedMap
from ...core.planes import fetch
from ...core.statistics import GroupStatistics, pool, record_by_rows
from ...core.tilings import Run, Tile, even_cuts

Block = tuple[int, torch.Tensor]  # how many rows of the halo are above a strip; the strip with its halo, [B, C, h, W]


def rows_of(strip: Tile) -> tuple[slice, slice, slice]:
    """The index of a strip's rows in a map ``[B, C, H, W]``."""
    return slice(None), slice(None), strip.rows


class Strips:
    """How maps are cut: into strips of at most `rows` rows; `wrap` where top and bottom are neighbours.

    Of several processes each cuts its band, `bands` says which (and then whether top and bottom are neighbours).
    Inputs are left as they are, for whoever else may read them: in a U-Net its skip connections. `repeats`: so modules
    that are alike leave the same behind, of inputs that look the same; see `Holding`.
    """

    repeats = True

    def __init__(self, rows: int, wrap: bool, bands: Bands | None = None) -> None:
        self.rows = rows
        self.bands = bands or Bands(wrap=wrap)

    @property
    def wrap(self) -> bool:
        return self.bands.wrap

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
        return self.bands.alone and plane.shape[-2] <= min(self.rows, self.most_rows(plane))

    def read(self, plane: torch.Tensor, halo: int, strips: Sequence[Tile]) -> Iterator[Block]:
        """Each strip with its halo, on the device.

        A strip's own rows may be overwritten before the next one is asked for: what later strips need of them is kept
        aside. The block may be the very memory of the map.
        """
        height = plane.shape[2]
        above, first = self.bands.of(plane).around(plane, halo, halo)() if halo else (None, None)
        highest = 0 if above is None else -above.shape[2]
        lowest = height if first is None else height + first.shape[2]
        outers = [(max(strip.top - halo, highest), min(strip.bottom + halo, lowest)) for strip in strips]
        adjacent = [False, *(upper.bottom == lower.top for upper, lower in pairwise(strips))]
        runs = [
            (strip.top if follows and strip.top else max(start, 0), min(stop, height))
            for strip, (start, stop), follows in zip(strips, outers, adjacent, strict=True)
        ]

        def with_halo(strip: Tile, outer: Run, run: Run, rows: torch.Tensor) -> Block:
            nonlocal above
            parts, (start, stop), (top, _) = [rows], outer, run
            if above is not None and top > start:
                parts.insert(0, above[:, :, start - top :])
            if first is not None and stop > height:
                parts.append(first[:, :, : stop - height])
            block = torch.cat(parts, dim=2) if len(parts) > 1 else rows
            if halo:
                end = strip.bottom - start
                above = block[:, :, max(end - halo, 0) : end].clone()
            return strip.top - start, block

        # Not a loop with variables of its own: they would keep rows that are a part of a block by then.
        yield from map(with_halo, strips, outers, runs, fetch(plane, runs))

    def statistics(
        self, plane: torch.Tensor, norm: nn.GroupNorm, seen: Sequence[GroupStatistics] = ()
    ) -> GroupStatistics:
        """Those that `norm` is given for a map; `seen` are those of its strips, where they are known."""
        runs = [(strip.top, strip.bottom) for strip in self.cut(plane)]
        recorded = pool(seen) if seen else record_by_rows(plane, norm.num_groups, runs)
        return self.bands.of(plane).pooled(recorded)

    def empty(self, like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Memory for a whole map, of the dtype of `like`."""
        return like.new_empty(tuple(shape))
