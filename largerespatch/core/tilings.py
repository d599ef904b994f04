"""Pure integer geometry: exact covers of a plane by disjoint rectangles.

Every tiling exists in four *phases*. The cuts along an axis come in two kinds, *even* and *staggered*, which
never share a position. The four phases combine them so that no edge between neighbouring cells is a seam in
every phase: what one phase separates, another one joins, and information can cross the whole plane.

Sizes are in cells of whatever plane is tiled, in ``(height, width)`` order. Nothing here depends on torch.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from random import Random
from typing import NamedTuple

PHASES = 4


class Tile(NamedTuple):
    """A half-open rectangle of cells: rows ``top`` to ``bottom - 1``, columns ``left`` to ``right - 1``."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def area(self) -> int:
        return self.height * self.width

    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def rows(self) -> slice:
        return slice(self.top, self.bottom)

    @property
    def columns(self) -> slice:
        return slice(self.left, self.right)

    def scaled(self, factor: int | Fraction) -> "Tile":
        """The same rectangle on a plane with `factor` times as many cells along each axis, edges on whole cells."""
        return Tile(*(int(factor * edge) for edge in self))


def even_cuts(length: int, longest: int) -> list[int]:
    """Ends and cuts of the fewest near-equal runs of at most `longest` cells: ``[0, ..., length]``."""
    runs = -(-length // longest)
    return [i * length // runs for i in range(runs + 1)]


def staggered_cuts(length: int, longest: int) -> list[int]:
    """Like `even_cuts`, with every cut strictly inside one of its runs, as in a running bond.

    The first and last run measure 3/4 of an even run (2/3 where there are two even runs) and the rest share what
    remains, so no run is a sliver and each cut keeps a quarter of a run away from the even ones. A length that
    fits one run is not cut.
    """
    even = even_cuts(length, longest)
    runs = len(even) - 1
    if runs == 1:
        return even
    run = Fraction(length, runs)
    first = min(Fraction(3, 4), Fraction(runs, runs + 1)) * run
    step = (length - 2 * first) / (runs - 1)
    cuts = [0]
    for i, (start, stop) in enumerate(pairwise(even)):
        if stop - start > 1:  # a run of a single cell has no inside
            cuts.append(min(max(round(first + i * step), start + 1), stop - 1))
    return [*cuts, length]


def grid(row_cuts: Sequence[int], column_cuts: Sequence[int]) -> list[Tile]:
    """The tiles between cuts of both axes, row by row."""
    return [
        Tile(top, left, bottom, right) for top, bottom in pairwise(row_cuts) for left, right in pairwise(column_cuts)
    ]


def _wide_bricks(height: int, width: int, slice_y: int, slice_x: int, flipped: bool) -> list[Tile]:
    """Courses of at most `slice_y` rows; the joints of every other course are staggered."""
    joints = (even_cuts(width, 2 * slice_x), staggered_cuts(width, 2 * slice_x))
    courses = pairwise(even_cuts(height, slice_y))
    return [
        brick for i, (top, bottom) in enumerate(courses) for brick in grid((top, bottom), joints[(i + flipped) % 2])
    ]


def bricks(height: int, width: int, phase: int, slice_y: int, slice_x: int) -> list[Tile]:
    """Cover a plane of ``height x width`` cells with bricks in one of the four running-bond tilings.

    Phases 0 and 2 lay *wide* bricks of at most ``slice_y`` rows by ``2 * slice_x`` columns, phases 1 and 3 *tall*
    ones of ``2 * slice_y`` rows by ``slice_x`` columns; phases 2 and 3 are *flipped*: the staggered courses are the
    others. Bricks are as large as these limits allow and near equal in area.
    """
    flipped = phase % PHASES >= 2
    if phase % 2 == 0:
        return _wide_bricks(height, width, slice_y, slice_x, flipped)
    turned = _wide_bricks(width, height, slice_x, slice_y, flipped)
    return [Tile(left, top, right, bottom) for top, left, bottom, right in turned]


def tiles(height: int, width: int, phase: int, slice_y: int, slice_x: int) -> list[Tile]:
    """Cover a plane of ``height x width`` cells with a grid of tiles of at most ``slice_y x slice_x`` cells.

    Phase 0 cuts both axes evenly, phase 1 both staggered, phases 2 and 3 one each. A slice of one cell counts as
    two: tiles of single cells would leave no edge that is not a seam.
    """
    row_cut, column_cut = (
        (even_cuts, even_cuts),
        (staggered_cuts, staggered_cuts),
        (even_cuts, staggered_cuts),
        (staggered_cuts, even_cuts),
    )[phase % PHASES]
    return grid(row_cut(height, max(slice_y, 2)), column_cut(width, max(slice_x, 2)))


COVERS: dict[str, Callable[[int, int, int, int, int], list[Tile]]] = {"brick": bricks, "tile": tiles}


def sampled_cells(height: int, width: int, count: int, seed: str) -> list[int]:
    """At most `count` cells, one from a random place in each tile of a coarse grid: stratified, without clumps.

    As ``row * width + column``; which ones follows from `seed` alone. The grid's tiles are as square as `count` allows.
    """
    rows = min(max(round((count * height / width) ** 0.5), 1), count, height)
    columns = min(count // rows, width)
    rows = min(count // columns, height)
    row_cuts = [i * height // rows for i in range(rows + 1)]
    column_cuts = [i * width // columns for i in range(columns + 1)]
    random = Random(seed)
    return [
        random.randrange(tile.top, tile.bottom) * width + random.randrange(tile.left, tile.right)
        for tile in grid(row_cuts, column_cuts)
    ]


class Window(NamedTuple):
    """A tile and what is read around it: `outer` on the plane (it may reach over the edge where the plane wraps)."""

    outer: Tile
    tile: Tile

    def size(self) -> tuple[int, int, int, int]:
        return *self.outer.size(), *self.tile.size()

    def owned(self, height: int, width: int) -> Tile:
        """The tile's place on a map of the window, ``height x width`` cells at whatever scale."""
        outer = self.outer
        return Tile(
            (self.tile.top - outer.top) * height // outer.height,
            (self.tile.left - outer.left) * width // outer.width,
            (self.tile.bottom - outer.top) * height // outer.height,
            (self.tile.right - outer.left) * width // outer.width,
        )


def window(tile: Tile, halo: int, height: int, width: int, wrap: bool = False) -> Window:
    """Add a `halo` of cells around a tile of a ``height x width`` plane.

    It ends at the plane's edge, where whoever reads it pads as for the whole plane. If the plane wraps around
    (`wrap`) it goes on at the opposite edge instead, except along an axis that the tile spans: there the window's
    own two edges are the neighbours.
    """

    def reach(start: int, stop: int, length: int) -> tuple[int, int]:
        if (start, stop) == (0, length):
            return start, stop
        if wrap:
            return start - halo, stop + halo
        return max(start - halo, 0), min(stop + halo, length)

    top, bottom = reach(tile.top, tile.bottom, height)
    left, right = reach(tile.left, tile.right, width)
    return Window(Tile(top, left, bottom, right), tile)


def scatter(budget: Tile, side: int, height: int, width: int, step: int = 1) -> list[Tile]:
    """Small equal pieces of a plane of ``height x width`` cells, evenly over it, in all at most `budget` in area.

    A piece measures `side` cells along each axis (there is at least one, and none larger than the plane); edges lie
    on multiples of `step`. Pieces overlap where the plane is little larger than the budget.
    """

    def spread(most: int, length: int) -> tuple[int, list[int]]:
        size = min(side, length)
        pieces = max(most // size, 1)
        return size, [(2 * i + 1) * (length - size) // (2 * pieces * step) * step for i in range(pieces)]

    (size_y, tops), (size_x, lefts) = spread(budget.height, height), spread(budget.width, width)
    return [Tile(top, left, top + size_y, left + size_x) for top in tops for left in lefts]
