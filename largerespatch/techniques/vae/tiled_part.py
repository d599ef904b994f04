"""The tiled part of an encoder or decoder on a plane: where its windows lie, and where what is made of them goes."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil

from ...core.tilings import Each, Tile, Window, scatter, tiles, window
from .halves import Cutting
from .stages import Split, scale_of

# Values of a tile's largest map: larger tiles are halved. Of 64 x 64 latent pixels Stable Diffusion's decoder makes
# fewer. Where one measures 32 sample pixels a side, so many would decide how much memory all takes.
TILE_VALUES = 2**27

# Sides of what is sampled before each pass, in those of a tile's window. All of it would cost more than it gains.
SAMPLE = Fraction(2, 3)
FEWEST = 4  # windows of it along each axis
MARGIN = Fraction(1, 4)  # of such a window, at each of its sides


@dataclass(frozen=True)
class TiledPart:
    """That of a `split` on its input plane of ``height x width`` cells, cut as `cutting` says."""

    split: Split
    cutting: Cutting
    height: int
    width: int

    @cached_property
    def windows(self) -> Sequence[Window]:
        """Those on the input plane; the edges of tiles are on the grid of the coarser side."""
        step, wrap = self._step, self.cutting.wrap
        cover = tiles(self.height // step, self.width // step, 0, *self._tile())
        return Each(lambda tile: window(tile.scaled(step), self.split.halo, self.height, self.width, wrap), cover)

    @property
    def made(self) -> tuple[int, int]:
        """Height and width of the output."""
        return int(self.split.scale * self.height), int(self.split.scale * self.width)

    def place(self, window: Window) -> tuple[slice, ...]:
        """Where on an output ``[B, C, H, W]`` that is which is made of a window's tile."""
        tile = window.tile.scaled(self.split.scale)
        return slice(None), slice(None), tile.rows, tile.columns

    def share(self, window: Window) -> float:
        """Of the plane, that of a window's tile."""
        return window.tile.area / (self.height * self.width)

    @cached_property
    def sample(self) -> list[Window]:
        """Small windows, evenly over the plane, in all smaller than a tile's.

        Many of them stand for the plane better than few large ones. What they see ends where they end, so they have
        a margin around what stands for the plane's inside; it need not be all that convolutions reach over.
        """
        step, budget = self._step, self.windows[0].outer.scaled(SAMPLE)
        side = min(self.split.halo, max(budget.height, budget.width) // FEWEST)

        def margin(length: int) -> int:
            steps = length // step
            return step * int(MARGIN * steps)

        def without_margin(tile: Tile) -> Tile:
            down, across = margin(tile.height), margin(tile.width)
            return Tile(tile.top + down, tile.left + across, tile.bottom - down, tile.right - across)

        some = scatter(budget, max(side // step, 4) * step, self.height, self.width, step)
        return [Window(tile, without_margin(tile)) for tile in some]

    @property
    def edge(self) -> float:
        """How much all of the sample counts, if its tiles count for the rest: as much as the plane has edges.

        A window sees its own edges as convolutions see the plane's, and has far more of them.
        """
        outer, tile, _ = self.sample[0]
        if self.cutting.wrap or outer == tile:
            return 0.0
        height, width = self.height - outer.height + tile.height, self.width - outer.width + tile.width
        inside = height * width / (self.height * self.width)
        return (1 - inside) / (1 - tile.area / outer.area)

    @property
    def _step(self) -> int:
        """Cells of the input plane to one of the coarser side, along each axis."""
        return ceil(1 / self.split.scale)

    def _tile(self) -> list[int]:
        """Height and width of a tile, in cells of the coarser side: as asked for, or halved as may be."""
        split, step = self.split, self._step
        per_latent = self.cutting.latent_scale * scale_of(split.stages[: split.tiled.start]) / step
        sides = [int(per_latent * size) for size in (self.cutting.tile_height, self.cutting.tile_width)]
        while max(sides) * step > split.halo and split.tile_values(*(step * side for side in sides)) > TILE_VALUES:
            longer = sides.index(max(sides))
            sides[longer] = ceil(sides[longer] / 2)
        return sides
