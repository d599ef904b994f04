"""One image over several processes of a `torch.distributed` group: each has a band of rows of every map.

Here alone it is known how many processes there are and which one this is. Techniques ask a `Band` of a map for rows
beyond its edges, for the statistics of all of it, for tokens anywhere. For one process it has all rows, and answers at
once. All processes ask the same in the same order, whatever their band holds. Exact.

In a rehearsal nobody is asked: a process takes the part of the one with the tallest band, and only makes room.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from .band_rows import BandRows, banded
from .pieces import rehearsing
from .planes import part
from .statistics import GroupStatistics, pool
from .tilings import Tile
from .tokens import picked

Rows = torch.Tensor | None  # of a neighbour, [B, C, h, W]; None beyond an edge of the image

_MAPS: ContextVar[Sequence[BandRows]] = ContextVar("maps", default=())
_PLACE: ContextVar[str] = ContextVar("place", default="entry")
_SENT: ContextVar["Counter[str] | None"] = ContextVar("sent", default=None)


@contextmanager
def counting_sent() -> Iterator["Counter[str]"]:
    """Inside, the bytes that this process sends to others, or would but for a rehearsal, are counted by kind."""
    token = _SENT.set(Counter())
    try:
        counter = _SENT.get()
        assert counter is not None
        yield counter
    finally:
        _SENT.reset(token)


@contextmanager
def at(place: str) -> Iterator[None]:
    """Inside, `place` is where errors say that it happened: the path of a module. Without one it is where it was."""
    token = _PLACE.set(place or _PLACE.get())
    try:
        yield
    finally:
        _PLACE.reset(token)


@dataclass(frozen=True)
class Bands:
    """All that the processes of a `group` say to each other; without one this process is alone.

    `wrap` says whether the first row of a map is the neighbour of the last. `others` is a group of those who have the
    same rows of other samples, if there are any.
    """

    group: Any = None
    wrap: bool = False
    others: Any = None

    @property
    def count(self) -> int:
        return 1 if self.group is None else int(self.group.size())

    @property
    def alone(self) -> bool:
        return self.count == 1

    @property
    def rank(self) -> int:
        """Which of the bands, within the group, is this process's."""
        if self.alone:
            return 0
        maps = _MAPS.get()
        if rehearsing() and maps:
            heights = [stop - start for start, stop in map(maps[0].run, range(self.count))]
            # Of several one that has others on both sides.
            return max(range(self.count), key=lambda i: (heights[i], min(i, self.count - 1 - i)))
        return int(self.group.rank())

    def __str__(self) -> str:
        return f"bands of {self.count} processes" if self.count > 1 else "one band, of one process"

    @contextmanager
    def sharing(self, height: int, width: int, **sizes: Any) -> Iterator[None]:
        """Inside, maps are those that a model makes of one of ``height x width`` cells.

        `sizes`: see `banded`.
        """
        maps = [BandRows(height, width)] if self.alone else banded(height, width, self.count, **sizes)
        token = _MAPS.set(maps)
        try:
            yield
        finally:
            _MAPS.reset(token)

    def of(self, plane: torch.Tensor) -> "Band":
        """This process's band of the map that `plane`, ``[B, C, h, W]``, is rows of, or all of it."""
        return self.sized(*plane.shape[-2:])

    def sized(self, height: int, width: int) -> "Band":
        """The same for a map of so many rows, as this process has it."""
        for rows in () if self.alone else _MAPS.get():
            start, stop = rows.run(self.rank)
            if (stop - start, rows.width) == (height, width):
                return Band(self, rows)
        return Band(self, BandRows(height, width))

    def of_whole(self, height: int, width: int) -> "Band":
        """This process's band of a map of so many cells in all; all of one that is not cut."""
        maps = () if self.alone else _MAPS.get()
        return Band(self, next((rows for rows in maps if rows[:2] == (height, width)), BandRows(height, width)))

    def next_to(self, band: "Band", places: int) -> "Band | None":
        """That of another of the model's maps, so many `places` smaller than the map of this one, if there is any."""
        maps = list(_MAPS.get())
        place = maps.index(band.rows) + places if band.rows in maps else -1
        return Band(self, maps[place]) if 0 <= place < len(maps) else None

    def first(self, tensors: Any) -> Any:
        """What the first process has in the place of this one's tensors, in whatever structure."""

        def told(tensor: torch.Tensor) -> torch.Tensor:
            copy = tensor.contiguous().clone()
            for group in (each for each in (self.others, self.group) if each is not None and each.size() > 1):
                with self._talking("input", copy.nbytes * (group.rank() == 0)) as heard:
                    if heard:
                        dist.broadcast(copy, src=dist.get_global_rank(group, 0), group=group)
            return copy

        return tree_map_only(torch.Tensor, told, tensors)

    def gathered(self, values: torch.Tensor, kind: str) -> torch.Tensor:
        """What each process has, of one shape, ``[count, ...]``."""
        if self.alone:
            return values[None]
        everything = values.new_empty(self.count, *values.shape)
        with self._talking(kind, values.nbytes * (self.count - 1)) as heard:
            if heard:
                dist.all_gather(list(everything.unbind()), values.contiguous(), group=self.group)
        return everything

    def summed(self, values: torch.Tensor, kind: str) -> torch.Tensor:
        """The sum of what each process has; `values` may be written over."""
        with self._talking(kind, 2 * values.nbytes * (self.count - 1) // self.count) as heard:
            if heard:
                dist.all_reduce(values, group=self.group)
        return values

    def exchange(
        self,
        like: torch.Tensor,
        give: Sequence[Sequence[torch.Tensor]],
        take: Sequence[Sequence[Sequence[int]]],
        kind: str,
    ) -> Callable[[], list[list[torch.Tensor]]]:
        """Starts to send tensors of the dtype of `like` to each process, and to receive others of these shapes.

        The result waits for them, and gives them by process.
        """
        sizes = [sum(map(prod, shapes)) for shapes in take]
        received = like.new_empty(sum(sizes))
        parts = [tensor.reshape(-1) for tensors in give for tensor in tensors]
        sent = torch.cat(parts) if parts else like.new_empty(0)
        lengths = [sum(tensor.numel() for tensor in tensors) for tensors in give]
        work = None
        with self._talking(kind, sent.nbytes) as heard:
            if heard:
                work = dist.all_to_all_single(received, sent, sizes, lengths, group=self.group, async_op=True)

        def finished() -> list[list[torch.Tensor]]:
            with self._talking(kind, 0):
                if work is not None:
                    work.wait()
            ends = iter(received.split_with_sizes([prod(shape) for shapes in take for shape in shapes]))
            return [[next(ends).view(*shape) for shape in shapes] for shapes in take]

        return finished

    def count_sent(self, kind: str, size: int) -> None:
        """So many bytes of a kind that are sent, where that is counted; of no kind they are counted elsewhere."""
        if kind and (counter := _SENT.get()) is not None:
            counter[kind] += size

    @contextmanager
    def _talking(self, kind: str, size: int) -> Iterator[bool]:
        """What is sent inside is counted; yields whether there is anybody to hear it."""
        self.count_sent(kind, size)
        try:
            yield not rehearsing()
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.group.rank()} of {self.count}, at {_PLACE.get()}: no answer from the others; another rank "
                "has probably failed, see its log"
            ) from error


ALONE = Bands()


@dataclass(frozen=True)
class Band:
    """What this process has of one map, cut as `rows` says, and how it comes by the rest."""

    bands: Bands
    rows: BandRows

    @classmethod
    def of_all(cls, tokens: torch.Tensor) -> Self:
        """One that has all of the tokens ``[B, N, C]`` there are."""
        return cls(ALONE, BandRows(1, tokens.shape[1]))

    @property
    def alone(self) -> bool:
        """Whether this process has all of the map."""
        return not self.rows.cuts

    @property
    def cells(self) -> int:
        """Of the whole map."""
        return self.rows.height * self.rows.width

    @property
    def run(self) -> tuple[int, int]:
        return self.rows.run(self.bands.rank)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the whole map."""
        return self.rows.height, self.rows.width

    def own(self, plane: torch.Tensor) -> torch.Tensor:
        """This process's rows of a whole map ``[..., H, W]``."""
        return plane[..., slice(*self.run), :]

    def whole(self, plane: torch.Tensor, kind: str = "maps") -> torch.Tensor:
        """A map ``[..., H, W]`` of the bands of all processes."""
        if self.alone:
            return plane
        missing = self.rows.tallest() - plane.shape[-2]
        bands = self.bands.gathered(F.pad(plane, (0, 0, 0, missing)) if missing else plane, kind)
        runs = (self.rows.run(i) for i in range(len(bands)))
        return torch.cat([band[..., : b - a, :] for band, (a, b) in zip(bands, runs, strict=True)], dim=-2)

    def all_tokens(self, tokens: torch.Tensor, kind: str = "keys") -> torch.Tensor:
        """Those of the whole map, ``[B, height * width, C]``, of this process's."""
        if self.alone:
            return tokens
        plane = tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], -1, self.rows.width)
        return self.whole(plane, kind).flatten(2).transpose(1, 2)

    def own_tokens(self, tokens: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The inverse, where tokens are along dimension `dim`."""
        start, stop = self.run
        return tokens.narrow(dim, start * self.rows.width, (stop - start) * self.rows.width)

    def around(self, plane: torch.Tensor, above: int, below: int) -> Callable[[], tuple[Rows, Rows]]:
        """Starts to fetch so many rows above and below this band. The result waits for them.

        They are the memory of nobody else. Beyond an edge of the image there are none.
        """
        bands, width = self.bands, self.rows.width
        first, _ = self.run

        def sides(i: int) -> list[list[tuple[int, tuple[int, int]]]]:
            start, stop = self.rows.run(i)
            return [list(self.rows.owners(a, b, bands.wrap)) for a, b in ((start - above, start), (stop, stop + below))]

        def read(run: tuple[int, int]) -> torch.Tensor:
            return part(plane, Tile(run[0] - first, 0, run[1] - first, width))

        wanted = sides(bands.rank)
        if self.alone:
            found = [[read(run).clone() for _, run in side] for side in wanted]
            return lambda: (_stacked(found[0]), _stacked(found[1]))
        others = range(bands.count)
        give = [[read(run) for side in sides(i) for owner, run in side if owner == bands.rank] for i in others]
        take = [
            [(*plane.shape[:2], run[1] - run[0], width) for side in wanted for owner, run in side if owner == i]
            for i in others
        ]
        finished = bands.exchange(plane, give, take, "halo")

        def arrived() -> tuple[Rows, Rows]:
            rows = [iter(each) for each in finished()]
            upper, lower = ([next(rows[owner]) for owner, _ in side] for side in wanted)
            return _stacked(upper), _stacked(lower)

        return arrived

    def pooled(self, statistics: GroupStatistics) -> GroupStatistics:
        """The statistics of the whole map, of those of this band."""
        if self.alone:
            return statistics
        parts = self.bands.gathered(torch.stack([statistics.mean, statistics.variance]), "statistics")
        heights = [stop - start for start, stop in map(self.rows.run, range(self.bands.count))]
        return pool([GroupStatistics(rows * self.rows.width, *each) for rows, each in zip(heights, parts, strict=True)])

    def summed(self, sums: torch.Tensor, kind: str = "statistics") -> torch.Tensor:
        """Sums over the whole map, of those over this band, which may be written over."""
        return sums if self.alone else self.bands.summed(sums, kind)

    def picked(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The tokens ``[B, S, C]`` of the whole map at places ``[B, S]``, of this band's tokens ``[B, N, C]``."""
        if self.alone:
            return picked(tokens, places)
        places = places - self.run[0] * self.rows.width
        own = (places >= 0) & (places < tokens.shape[1])
        found = picked(tokens, places.clamp(0, tokens.shape[1] - 1))
        return self.bands.summed(torch.where(own[:, :, None], found, torch.zeros_like(found)), "context")

    def among(self, places: Sequence[int]) -> list[int]:
        """Those of the places of tokens that are in this band, counted from its first."""
        if self.alone:
            return list(places)
        first, last = (row * self.rows.width for row in self.run)
        return [place - first for place in places if first <= place < last]

    def logsumexp(self, scores: torch.Tensor) -> torch.Tensor:
        """``scores.logsumexp(-1, keepdim=True)`` of the scores that all bands have."""
        here = scores.logsumexp(dim=-1, keepdim=True)
        return here if self.alone else self.bands.gathered(here, "context").logsumexp(dim=0)

    def topk(self, values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and places of the largest, ``[B, count]``, of a value for each token, ``[B, N]``."""
        best = values.topk(min(count, values.shape[1]))
        if self.alone:
            return best.values, best.indices
        missing = (0, count - best.values.shape[1])
        numbers = F.pad(best.values.double(), missing, value=-torch.inf)
        places = F.pad(best.indices.double() + self.run[0] * self.rows.width, missing)
        found = self.bands.gathered(torch.stack([numbers, places]), "context")
        numbers, places = found.transpose(0, 2).transpose(0, 1).flatten(2)
        most = numbers.topk(count)
        return most.values.to(values.dtype), places.gather(1, most.indices).long()


def _stacked(parts: Sequence[torch.Tensor]) -> Rows:
    """Rows on rows; None of none."""
    return torch.cat(list(parts), dim=2) if len(parts) > 1 else next(iter(parts), None)
