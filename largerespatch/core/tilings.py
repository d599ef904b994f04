"""Pure integer geometry: exact covers of a plane by disjoint rectangles.

Every tiling exists in four *phases*. The cuts along an axis come in two kinds, *even* and *staggered*, which
never share a position. The four phases combine them so that no edge between neighbouring cells is a seam in
every phase: what one phase separates, another one joins, and information can cross the whole plane.

Sizes are in cells of whatever plane is tiled, in ``(height, width)`` order. Nothing here depends on torch.
"""

from bisect import bisect
from collections.abc import Callable, Hashable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple, TypeVar

PHASES = 4

P = TypeVar("P")
Run = tuple[int, int]  # half-open


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


def halved(tile: Tile, times: int) -> list[Tile]:
    """A tile cut in two across its longer side, the parts likewise, and so on: `2**times` parts, some of them empty."""
    if not times:
        return [tile]
    top, left, bottom, right = tile
    if tile.height > tile.width:
        middle = (top + bottom) // 2
        parts = Tile(top, left, middle, right), Tile(middle, left, bottom, right)
    else:
        middle = (left + right) // 2
        parts = Tile(top, left, bottom, middle), Tile(top, middle, bottom, right)
    return [each for part in parts for each in halved(part, times - 1)]


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


class Runs(Sequence[Run]):
    """Half-open runs of `longest` cells, one after another, the last of what remains. Made when asked for."""

    def __init__(self, length: int, longest: int) -> None:
        self.length = length
        self.longest = longest

    def __len__(self) -> int:
        return -(-self.length // self.longest)

    def __getitem__(self, index: Any) -> Any:
        which = range(len(self))[index]
        return self._run(which) if isinstance(which, int) else list(map(self._run, which))

    def _run(self, i: int) -> Run:
        return i * self.longest, min((i + 1) * self.longest, self.length)

    def telling(self) -> list[int]:
        return _few(len(self))


class Tiling(Sequence[Tile]):
    """The tiles between cuts of both axes, row by row; rows take the columns' cuts in turns.

    Tiles are made when asked for, since there may be more of them than a list should hold. `turned`: the axes are
    exchanged.
    """

    def __init__(self, row_cuts: Sequence[int], *column_cuts: Sequence[int], turned: bool = False) -> None:
        self.row_cuts = row_cuts
        self.column_cuts = column_cuts
        self.turned = turned
        ends = [0]  # how many tiles there are before each of the rows until cuts of columns come again
        for cuts in column_cuts:
            ends.append(ends[-1] + len(cuts) - 1)
        self._ends = ends

    def __len__(self) -> int:
        return self._before(len(self.row_cuts) - 1)

    def __getitem__(self, index: Any) -> Any:
        which = range(len(self))[index]
        return self._tile(which) if isinstance(which, int) else list(map(self._tile, which))

    def __iter__(self) -> Iterator[Tile]:
        for i, (top, bottom) in enumerate(pairwise(self.row_cuts)):
            for left, right in pairwise(self.column_cuts[i % len(self.column_cuts)]):
                yield self._laid(top, left, bottom, right)

    def telling(self) -> list[int]:
        """Places of few tiles, among them the first, the last, and three of each size if there are as many."""
        turns = len(self.column_cuts)
        rows = _few_sizes([(bottom - top, i % turns) for i, (top, bottom) in enumerate(pairwise(self.row_cuts))])
        places = set()
        for row in rows:
            cuts = self.column_cuts[row % turns]
            columns = _few_sizes([right - left for left, right in pairwise(cuts)])
            places |= {self._before(row) + column for column in columns}
        return sorted(places)

    def _before(self, row: int) -> int:
        cycles, rest = divmod(row, len(self.column_cuts))
        return cycles * self._ends[-1] + self._ends[rest]

    def _tile(self, i: int) -> Tile:
        cycles, rest = divmod(i, self._ends[-1])
        turn = bisect(self._ends, rest) - 1
        row, column, cuts = cycles * len(self.column_cuts) + turn, rest - self._ends[turn], self.column_cuts[turn]
        return self._laid(self.row_cuts[row], cuts[column], self.row_cuts[row + 1], cuts[column + 1])

    def _laid(self, top: int, left: int, bottom: int, right: int) -> Tile:
        return Tile(left, top, right, bottom) if self.turned else Tile(top, left, bottom, right)


class Each(Sequence[P]):
    """What `make` makes of each piece of a sequence, when asked for."""

    def __init__(self, make: Callable[[Any], P], pieces: Any) -> None:
        self.make = make
        self.pieces = pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: Any) -> Any:
        found = self.pieces[index]
        return list(map(self.make, found)) if isinstance(index, slice) else self.make(found)

    def telling(self) -> list[int]:
        places: list[int] = self.pieces.telling()
        return places


def _few(count: int) -> list[int]:
    return sorted({*range(min(count, 3)), *range(max(count - 1, 0), count)})


def _few_sizes(sizes: Sequence[Hashable]) -> list[int]:
    """Places of the first and the last, and of three of each size."""
    left = dict.fromkeys(sizes, 3)
    places = []
    for i, size in enumerate(sizes):
        if left[size] or i == len(sizes) - 1:
            places.append(i)
            left[size] = max(left[size] - 1, 0)
    return places


def _wide_bricks(height: int, width: int, slice_y: int, slice_x: int, flipped: bool, turned: bool) -> Tiling:
    """Courses of at most `slice_y` rows; the joints of every other course are staggered."""
    joints = (even_cuts(width, 2 * slice_x), staggered_cuts(width, 2 * slice_x))
    return Tiling(even_cuts(height, slice_y), *(reversed(joints) if flipped else joints), turned=turned)


def bricks(height: int, width: int, phase: int, slice_y: int, slice_x: int) -> Tiling:
    """Cover a plane of ``height x width`` cells with bricks in one of the four running-bond tilings.

    Phases 0 and 2 lay *wide* bricks of at most ``slice_y`` rows by ``2 * slice_x`` columns, phases 1 and 3 *tall*
    ones of ``2 * slice_y`` rows by ``slice_x`` columns; phases 2 and 3 are *flipped*: the staggered courses are the
    others. Bricks are as large as these limits allow and near equal in area.
    """
    flipped = phase % PHASES >= 2
    if phase % 2 == 0:
        return _wide_bricks(height, width, slice_y, slice_x, flipped, turned=False)
    return _wide_bricks(width, height, slice_x, slice_y, flipped, turned=True)


def tiles(height: int, width: int, phase: int, slice_y: int, slice_x: int) -> Tiling:
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
    return Tiling(row_cut(height, max(slice_y, 2)), column_cut(width, max(slice_x, 2)))


COVERS: dict[str, Callable[[int, int, int, int, int], Tiling]] = {"brick": bricks, "tile": tiles}


@lru_cache(maxsize=64)  # the samples of a batch that run in turns ask for the same, layer by layer
def sampled_cells(height: int, width: int, count: int, seed: str) -> tuple[int, ...]:
    """At most `count` cells, one from a random place in each tile of a coarse grid: stratified, without clumps.

    As ``row * width + column``; which ones follows from `seed` alone. The grid's tiles are as square as `count` allows.
    """
    rows = min(max(round((count * height / width) ** 0.5), 1), count, height)
    columns = min(count // rows, width)
    rows = min(count // columns, height)
    row_cuts = [i * height // rows for i in range(rows + 1)]
    column_cuts = [i * width // columns for i in range(columns + 1)]
    random = Random(seed).random  # `random` alone is fast and the same in all versions of Python
    return tuple(
        (top + int(random() * (bottom - top))) * width + left + int(random() * (right - left))
        for top, bottom in pairwise(row_cuts)
        for left, right in pairwise(column_cuts)
    )


class Window(NamedTuple):
    """A tile and what is read around it: `outer` on the plane.

    Where the plane wraps it may reach over the edge, `beyond` it by so many rows and columns.
    """

    outer: Tile
    tile: Tile
    beyond: tuple[int, int] = (0, 0)

    def size(self) -> tuple[int, ...]:
        return *self.outer.size(), *self.tile.size(), *self.beyond

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
    beyond = max(-top, bottom - height, 0), max(-left, right - width, 0)
    return Window(Tile(top, left, bottom, right), tile, beyond)


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


def around(start: int, stop: int, length: int) -> list[Run]:
    """The runs of an axis, whose ends are neighbours, that lie between two places on it."""
    runs = []
    while start < stop:
        first = start % length
        runs.append((first, min(first + stop - start, length)))
        start += length - first
    return runs
