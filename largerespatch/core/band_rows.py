"""Which rows of every map a band has: pure integer geometry, so that no process has to ask another one.

Nothing here depends on torch.
"""

from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from .tilings import Run, Tile


class BandRows(NamedTuple):
    """How a map of ``height x width`` cells is cut: the i-th band has the rows from ``cuts[i]`` to ``cuts[i + 1]``.

    Without cuts every process has all of it.
    """

    height: int
    width: int
    cuts: tuple[int, ...] = ()

    def run(self, i: int) -> Run:
        """The rows of the i-th band."""
        return (self.cuts[i], self.cuts[i + 1]) if self.cuts else (0, self.height)

    def tallest(self) -> int:
        """The rows of the tallest band."""
        return max(stop - start for start, stop in map(self.run, range(max(len(self.cuts) - 1, 1))))

    def owners(self, start: int, stop: int, wrap: bool) -> Iterator[tuple[int, Run]]:
        """Who has the rows from `start` to `stop`, in order, and which of them; rows beyond an edge are nobody's.

        Where the map wraps around (`wrap`) they are those at the opposite edge.
        """
        if not wrap:
            start, stop = max(start, 0), min(stop, self.height)
        while start < stop:
            row = start % self.height
            band = bisect(self.cuts, row) - 1 if self.cuts else 0
            end = min(self.run(band)[1], row + stop - start)
            yield band, (row, end)
            start += end - row


def banded(
    height: int, width: int, count: int, halvings: int = 0, doublings: int = 0, rounds_up: bool = True
) -> list[BandRows]:
    """How the maps of a model are cut for `count` processes, from the largest to the smallest.

    The model is given a map of ``height x width`` cells and makes others of it, `doublings` times as large and
    `halvings` times as small along each axis; halves of odd sizes are rounded up or down. Edges of bands lie on whole
    cells of all maps that are cut; the last band takes what remains. Maps of fewer rows than processes are whole in
    every one.

    Raises:
        ValueError: there are fewer rows than processes, or maps of different height are equally wide.
    """
    if height < count:
        raise ValueError(f"a map of {height} rows cannot be cut for {count} processes")
    deepest = max(i for i in range(halvings + 1) if height >> i >= count)
    firsts = [height * i // count >> deepest << deepest for i in range(count)]
    maps = [
        BandRows(height << i, width << i, tuple(first << i for first in (*firsts, height)))
        for i in range(doublings, 0, -1)
    ]
    for i in range(halvings + 1):
        cuts = (*(first >> i for first in firsts), height) if i <= deepest else ()
        maps.append(BandRows(height, width, cuts))
        height, width = (max((length + rounds_up) // 2, 1) for length in (height, width))
    if len({each.width for each in maps}) < len(maps):
        raise ValueError(f"a map of {maps[doublings].width} columns is too narrow to be halved {halvings} times")
    return maps


def rounds(rows: BandRows, longest: int) -> list[list[Run]]:
    """Runs of about `longest` rows, one of every band in each round, until all rows have had their turn.

    None is empty, so that all bands have as many.
    """
    runs = [rows.run(i) for i in range(max(len(rows.cuts) - 1, 1))]
    heights = [stop - start for start, stop in runs]
    count = min(-(-max(heights) // longest), *heights)
    return [
        [
            (start + i * height // count, start + (i + 1) * height // count)
            for (start, _), height in zip(runs, heights, strict=True)
        ]
        for i in range(count)
    ]


def dealt(tiles: Iterable[Tile], count: int) -> list[list[Tile]]:
    """The tiles for each of `count` processes: near equal in area, and near the rows that its band has."""
    ordered = sorted(tiles, key=lambda tile: (tile.top + tile.bottom, tile.left))
    total, seen = sum(tile.area for tile in ordered), 0
    hands: list[list[Tile]] = [[] for _ in range(count)]
    for tile in ordered:
        hands[min(count * (2 * seen + tile.area) // (2 * total), count - 1)].append(tile)
        seen += tile.area
    return hands


def split(tile: Tile, cuts: Sequence[int]) -> Iterator[tuple[int, Tile]]:
    """The parts of a tile in each band that has rows of it."""
    band = bisect(cuts, tile.top) - 1
    while band + 1 < len(cuts) and cuts[band] < tile.bottom:
        yield band, Tile(max(tile.top, cuts[band]), tile.left, min(tile.bottom, cuts[band + 1]), tile.right)
        band += 1
