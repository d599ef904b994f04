"""What some queries of a tile attend to of the rest of a map: cells of it, the finer the more they look there.

Cells are squares of tokens. From the coarsest on, those that the queries want most are cut in four, again and again.
What is left of some in the end are *own* tokens, the queries' favourites; all other cells are *pooled*. Each head has
its own. So as many keys stand for a map of any size, and finding them takes work that grows with the logarithm of its
size. Approximate; with room for all tokens a tile attends as dense attention does.

A cell is one key and one value. What it gets of attention is the sum of what its tokens get, and what it gives is the
mean of their values, each by its share; plain means are that for a query that all keys are alike to. Here the queries'
own mean is looked through instead: for it a cell, made of its quarters, does what these do together, and to first order
so it does for queries near by. That makes it worth the while to look for few queries at a time, which lie together.
"""

from typing import NamedTuple

import torch

from ...core.pieces import assemble
from ...core.tilings import Run, Runs, Tile

# Of the keys, what the coarsest cells may take: one in so many.
COARSE = 4

# Rows of cells that are pooled at once.
ROWS = 32

# The finest cells whose means are kept, by level, if the map has much coarser ones. Those of 2x2 tokens would take a
# quarter of what the tokens do; they are pooled again where some are looked at.
KEPT = 2


class Keys(NamedTuple):
    """Keys and values ``[B, heads, K, C]``, and what to add to the scores of each, ``[B, heads, K]``."""

    keys: torch.Tensor
    values: torch.Tensor
    log_weights: torch.Tensor

    def at(self, places: torch.Tensor) -> "Keys":
        """Those at places ``[B, heads, n]``."""
        return Keys(_rows(self.keys, places), _rows(self.values, places), self.log_weights.gather(2, places))

    def to(self, kind: torch.dtype) -> "Keys":
        """The same, keys and values of that dtype."""
        return Keys(self.keys.to(kind), self.values.to(kind), self.log_weights)

    def chunk(self, count: int) -> "list[Keys]":
        """Those of so many equal parts of the batch."""
        return [Keys(*each) for each in zip(*(each.chunk(count) for each in self), strict=True)]


class PooledMap:
    """Keys and values ``[B, heads, N, C]``, of which those from `start` on are a map's, row by row.

    They are kept, with the means over cells of 4, 8, ... of the map's ``(height, width)`` tokens along each axis, so
    that `count` keys can stand for it. If `finest` is 1 they are those of cells of 2x2 tokens to begin with.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        size: tuple[int, int],
        count: int,
        start: int = 0,
        finest: int = 0,
    ) -> None:
        self.size, self.count, self.start, self.finest = size, count, start, finest
        self.sizes = [size]
        while (self._cells(-1) > max(count // COARSE, 1) and self._cells(0) > count) or len(self.sizes) <= finest:
            height, width = self.sizes[-1]
            self.sizes.append((-(-height // 2), -(-width // 2)))
        self.levels: dict[int, tuple[torch.Tensor, ...]] = {finest: (keys, values)}
        finer, top = finest, len(self.sizes) - 1
        coarser = max(min(KEPT, top - 1), finest + 1)
        for level in range(coarser, top):  # of the coarsest cells all quarters are looked at
            self.levels[level] = tuple(self._coarser(each, finer, level) for each in self.levels[finer])
            finer = level

    def _cells(self, level: int) -> int:
        return self.sizes[level][0] * self.sizes[level][1]

    def _coarser(self, means: torch.Tensor, finer: int, level: int) -> torch.Tensor:
        """Means ``[B, heads, n, C]`` over the cells of a level, of those over the cells of a finer one.

        Cells at the lower and right edge may hold less. They take the mean of those cells that are there, as if each
        held as much: it is nearly so, and all is exact where cells are tokens.
        """
        means = means.narrow(2, self.start, self._cells(finer)) if finer == self.finest else means
        plane = means.view(*means.shape[:2], *self.sizes[finer], means.shape[3])
        steps = level - finer

        def pooled(run: Run) -> torch.Tensor:
            rows = plane[:, :, run[0] << steps : run[1] << steps]
            for _ in range(steps):
                rows = _halved(rows)
            return rows

        coarse: torch.Tensor = assemble(
            Runs(self.sizes[level][0], ROWS),
            pooled,
            place=lambda run: (slice(None), slice(None), slice(*run)),
            make=lambda rows: rows.new_empty(*rows.shape[:2], *self.sizes[level], rows.shape[4]),
        )
        return coarse.flatten(2, 3)

    def _means(self, level: int, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mean keys and values of cells of a level, by their places ``[B, heads, n]``."""
        height, width = self.sizes[level]
        rows, columns = rows.clamp(max=height - 1), columns.clamp(max=width - 1)
        if level in self.levels:
            places = rows * width + columns + (self.start if level == self.finest else 0)
            return tuple(_rows(each, places) for each in self.levels[level])
        parts = self._means(level - 1, *_quarters(rows, columns))
        return tuple(each.view(*rows.shape, 4, each.shape[-1]).mean(dim=3) for each in parts)

    @torch.no_grad()
    def chosen(self, tile: Tile, judges: torch.Tensor, total: torch.Tensor) -> list[Keys]:
        """What stands for all tokens outside a tile, at most `count` keys or as many as there are coarsest cells.

        Cells of each size apart, since all are put together with the tile's keys anyway.

        `judges` are queries that it is for, ``[B, heads, J, C]``, scaled, or several sets of them, ``[P * B, ..]``, for
        each of which there are other keys then; `total` is the logarithm of what their attention to all else sums up
        to, ``[P * B, heads, J, 1]``.
        """
        top = len(self.sizes) - 1
        spare = self.count - self._cells(top)
        middle = judges.mean(dim=2, keepdim=True)
        cells = torch.arange(self._cells(top), device=judges.device).expand(*judges.shape[:2], -1)
        rows, columns = cells // self.sizes[top][1], cells % self.sizes[top][1]
        parts = []
        batch, kind = len(self.levels[self.finest][0]), self.levels[self.finest][0].dtype
        for level in range(top, self.finest, -1):
            alike = batch if level == top else len(rows)  # all see the same of the coarsest cells
            known, spread = self._seen(level, rows[:alike], columns[:alike], tile, middle)
            scores = judges @ known.keys.transpose(-1, -2) + known.log_weights[:, :, None]
            if level == top:
                total = torch.logaddexp(total, scores.logsumexp(dim=-1, keepdim=True))
            wanted = (scores - total).exp_().sum(dim=2) * spread
            order = wanted.argsort(dim=-1, descending=True, stable=True)
            cut, rest = order.tensor_split([min(spare // (3 * (level - self.finest)), order.shape[-1])], dim=-1)
            spare -= 3 * cut.shape[-1]
            parts.append(known.at(rest).to(kind))
            rows, columns = _quarters(rows.gather(2, cut), columns.gather(2, cut))
        keys, values = self._means(self.finest, rows, columns)
        parts.append(Keys(keys, values, self._outside(self.finest, rows, columns, tile).log()))
        return parts

    def _seen(
        self, level: int, rows: torch.Tensor, columns: torch.Tensor, tile: Tile, middles: torch.Tensor
    ) -> tuple[Keys, torch.Tensor]:
        """Cells of a level, by their places ``[B, heads, n]``, as queries `middles` ``[P * B, heads, 1, C]`` see them.

        They are made of their quarters; how much the keys of these differ is told, too, ``[P * B, heads, n]``. Those
        without tokens outside the tile weigh nothing.
        """
        quarters = _quarters(rows, columns)
        means = (each.view(*rows.shape, 4, each.shape[-1]) for each in self._means(level - 1, *quarters))
        keys, values = next(means).float(), next(means)
        counts = self._outside(level - 1, *quarters, tile).view(*rows.shape, 1, 4)
        # Those who see the same cells side by side: [B, heads, n, P, ...]
        middle = middles.view(-1, *rows.shape[:2], middles.shape[-1]).movedim(0, 2)
        scores = (keys.flatten(2, 3) @ middle.transpose(-1, -2)).view(*rows.shape, 4, middle.shape[2])
        scores = scores.transpose(-1, -2) + counts.log()
        mass = scores.logsumexp(dim=-1, keepdim=True)
        shares = (scores - mass.clamp(min=torch.finfo(mass.dtype).min)).exp_()
        key, value = (shares.to(each.dtype) @ each for each in (keys, values))
        squares = (shares @ _square(keys))[..., 0]
        spread = (squares - _square(key)[..., 0]).clamp(min=0)
        log_weights = mass[..., 0] - torch.einsum("bhnpc,bhpc->bhnp", key, middle)
        key, value, log_weights, spread = (_by_parts(each) for each in (key, value, log_weights, spread))
        return Keys(key, value, log_weights), spread

    def _outside(self, level: int, rows: torch.Tensor, columns: torch.Tensor, tile: Tile) -> torch.Tensor:
        """How many tokens outside the tile cells of a level hold, by their places ``[B, heads, n]``."""
        top, left, bottom, right = tile
        tall, inside_tall = _shared(rows, 2**level, self.size[0], top, bottom)
        wide, inside_wide = _shared(columns, 2**level, self.size[1], left, right)
        return (tall * wide - inside_tall * inside_wide).float()


def _rows(whole: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Those rows of ``[B, heads, N, C]`` that are at places ``[P * B, heads, n]``: not by `gather`, which is slow."""
    batch, heads, count, channels = whole.shape
    starts = torch.arange(batch * heads, device=places.device).view(batch, heads, 1) * count
    starts = starts.repeat(len(places) // batch, 1, 1)
    return whole.flatten(0, 2).index_select(0, (places + starts).flatten()).view(*places.shape, channels)


def _by_parts(seen: torch.Tensor) -> torch.Tensor:
    """``[P * B, heads, n, ...]`` of ``[B, heads, n, P, ...]``."""
    return seen.movedim(3, 0).flatten(0, 1)


def _square(vectors: torch.Tensor) -> torch.Tensor:
    """Their squared lengths, ``[..., 1]``."""
    lengths: torch.Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return lengths.square()


def _halved(plane: torch.Tensor) -> torch.Tensor:
    """Means of 2x2 cells of ``[B, heads, H, W, C]``; where one is missing, its neighbour counts twice."""
    for axis in (2, 3):
        if plane.shape[axis] % 2:
            plane = torch.cat([plane, plane.narrow(axis, -1, 1)], dim=axis)
    squares = plane.reshape(*plane.shape[:2], plane.shape[2] // 2, 2, plane.shape[3] // 2, 2, plane.shape[4])
    return squares.mean(dim=(3, 5))


def _quarters(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of the four cells, one level finer, that each of ``[B, heads, n]`` is made of, side by side."""
    # Counted where they are: numbers from the host would have it wait for all work before.
    number = torch.arange(4, device=rows.device)
    return (2 * rows[..., None] + number // 2).flatten(2), (2 * columns[..., None] + number % 2).flatten(2)


def _shared(places: torch.Tensor, side: int, length: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Along an axis: how many tokens cells hold, and how many of these are from `start` to `stop`."""
    first = places * side
    last = (first + side).clamp(max=length)
    return (last - first).clamp(min=0), (last.clamp(max=stop) - first.clamp(min=start)).clamp(min=0)
