"""What a tile of a map of tokens attends to of the rest: cells of it, the finer the more its queries look there.

Cells are squares of tokens, known by the means of their keys and values, and weigh as many tokens as they hold. From
the coarsest on, those that the tile's queries want most are cut in four, again and again. What is left of some in the
end are *own* tokens, the tile's favourites; all other cells are *pooled*. Each head has its own. So as many keys stand
for a map of any size, and finding them takes work that grows with the logarithm of its size. Approximate; with room for
all tokens a tile attends as dense attention does.

A cell whose keys differ gets more attention than as many keys like their mean would, since the exponential is convex:
to second order half the variance of its scores. Its weight takes that in, and what is cut first is where mass and
variance are large.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..core.pieces import assemble
from ..core.tilings import Run, Runs, Tile

# Of the keys, what the coarsest cells may take: one in so many.
COARSE = 4

# Rows of cells that are pooled at once.
ROWS = 32

# The finest cells whose means are kept, by level. Those of 2x2 tokens would take a quarter of what the tokens do; they
# are pooled again where a tile looks at some.
KEPT = 2

# Of what the second order adds to a weight: all of it is too much where keys differ widely. By trial.
SECOND_ORDER = 0.25


class Keys(NamedTuple):
    """Keys and values ``[B, heads, K, C]``, and what to add to the scores of each, ``[B, heads, K]``."""

    keys: torch.Tensor
    values: torch.Tensor
    log_weights: torch.Tensor

    @classmethod
    def of(cls, parts: "Sequence[Keys]") -> "Keys":
        """All of them, one after another."""
        keys, values, log_weights = zip(*parts, strict=True)
        return cls(torch.cat(keys, dim=2), torch.cat(values, dim=2), torch.cat(log_weights, dim=2))


class PooledMap:
    """Keys and values of a map of ``(height, width)`` tokens, ``[B, heads, height * width, C]``, row by row.

    They are kept, with the means over cells of 4, 8, ... tokens along each axis, so that `count` keys can stand for the
    map; and the mean of the keys' squares, which tells how much they differ.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, size: tuple[int, int], count: int) -> None:
        self.size, self.count = size, count
        # Not by squaring: a map of the keys in single precision would be larger than they are.
        squares = torch.linalg.vector_norm(keys, dim=-1, keepdim=True, dtype=torch.float32).square()
        self.sizes = [size]
        while self._cells(-1) > count // COARSE and self._cells(0) > count and self._cells(-1) > 1:
            height, width = self.sizes[-1]
            self.sizes.append((-(-height // 2), -(-width // 2)))
        self.levels: dict[int, tuple[torch.Tensor, ...]] = {0: (keys, values, squares)}
        finest = 0
        for level in range(KEPT, len(self.sizes)):
            self.levels[level] = tuple(self._coarser(each, finest, level) for each in self.levels[finest])
            finest = level

    def _cells(self, level: int) -> int:
        return self.sizes[level][0] * self.sizes[level][1]

    def _coarser(self, means: torch.Tensor, finer: int, level: int) -> torch.Tensor:
        """Means ``[B, heads, n, C]`` over the cells of a level, of those over the cells of a finer one.

        Cells at the lower and right edge may hold less. They take the mean of those cells that are there, as if each
        held as much: it is nearly so, and all is exact where cells are tokens.
        """
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
        """Mean keys, values and squares of cells of a level, by their places ``[B, heads, n]``."""
        height, width = self.sizes[level]
        rows, columns = rows.clamp(max=height - 1), columns.clamp(max=width - 1)
        if level in self.levels:
            places = (rows * width + columns)[..., None]
            return tuple(each.gather(2, places.expand(-1, -1, -1, each.shape[-1])) for each in self.levels[level])
        parts = self._means(level - 1, *_quarters(rows, columns))
        return tuple(each.view(*rows.shape, 4, each.shape[-1]).mean(dim=3) for each in parts)

    @torch.no_grad()
    def chosen(self, tile: Tile, judges: torch.Tensor, total: torch.Tensor) -> Keys:
        """What stands for all tokens outside a tile, at most `count` keys or as many as there are coarsest cells.

        `judges` are some of the tile's queries, ``[B, heads, J, C]``, scaled; `total` the logarithm of what their
        attention to all else sums up to, ``[B, heads, J, 1]``.
        """
        top = len(self.sizes) - 1
        spare = self.count - self._cells(top)
        strength = judges.square().mean(dim=(-1, -2))[..., None]
        shape = (*self.levels[0][0].shape[:2], -1)
        cells = torch.arange(self._cells(top), device=judges.device).expand(shape)
        rows, columns = cells // self.sizes[top][1], cells % self.sizes[top][1]
        parts = []
        for level in range(top, 0, -1):
            keys, variances = self._at(level, rows, columns, tile, strength)
            scores = judges @ keys.keys.float().transpose(-1, -2) + keys.log_weights[:, :, None]
            if level == top:
                total = torch.logaddexp(total, scores.logsumexp(dim=-1, keepdim=True))
            wanted = (scores - total).exp_().sum(dim=2) * variances
            order = wanted.argsort(dim=-1, descending=True, stable=True)
            finer, rest = order.tensor_split([min(spare // (3 * top), order.shape[-1])], dim=-1)
            parts.append(self._at(level, rows.gather(2, rest), columns.gather(2, rest), tile, strength)[0])
            rows, columns = _quarters(rows.gather(2, finer), columns.gather(2, finer))
        return Keys.of([*parts, self._at(0, rows, columns, tile, strength)[0]])

    def _at(
        self, level: int, rows: torch.Tensor, columns: torch.Tensor, tile: Tile, strength: torch.Tensor
    ) -> tuple[Keys, torch.Tensor]:
        """Cells of a level by their places ``[B, heads, n]``, and the variances of their scores.

        Those without tokens outside the tile weigh nothing. `strength` is the mean square of channels of queries.
        """
        keys, values, squares = self._means(level, rows, columns)
        top, left, bottom, right = tile
        tall, inside_tall = _shared(rows, 2**level, self.size[0], top, bottom)
        wide, inside_wide = _shared(columns, 2**level, self.size[1], left, right)
        outside = (tall * wide - inside_tall * inside_wide).float()
        # By the means of squares, in which tokens, whose keys do not differ, would differ by rounding.
        spread = squares[..., 0] - keys.float().square().sum(dim=-1)
        variances = spread.clamp(min=0) * strength if level else torch.zeros_like(outside)
        return Keys(keys, values, outside.log() + SECOND_ORDER * variances), variances


def _halved(plane: torch.Tensor) -> torch.Tensor:
    """Means of 2x2 cells of ``[B, heads, H, W, C]``; where one is missing, its neighbour counts twice."""
    for axis in (2, 3):
        if plane.shape[axis] % 2:
            plane = torch.cat([plane, plane.narrow(axis, -1, 1)], dim=axis)
    squares = plane.reshape(*plane.shape[:2], plane.shape[2] // 2, 2, plane.shape[3] // 2, 2, plane.shape[4])
    return squares.mean(dim=(3, 5))


def _quarters(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of the four cells, one level finer, that each of ``[B, heads, n]`` is made of, side by side."""
    down, right = rows.new_tensor([0, 0, 1, 1]), rows.new_tensor([0, 1, 0, 1])
    return (2 * rows[..., None] + down).flatten(2), (2 * columns[..., None] + right).flatten(2)


def _shared(places: torch.Tensor, side: int, length: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Along an axis: how many tokens cells hold, and how many of these are from `start` to `stop`."""
    first = places * side
    last = (first + side).clamp(max=length)
    return (last - first).clamp(min=0), (last.clamp(max=stop) - first.clamp(min=start)).clamp(min=0)
