"""VAE encode and decode in two passes over tiles with shared group statistics: approximate.

Low-resolution stages run whole, the rest in tiles. The convolutions see all they need, so the only difference from the
untiled result is in the statistics. Where no group norm is in the tiles one pass is all, and exact. Else pass one
records what every group norm sees, normalized by the statistics of a sample of small windows; the sample then corrects
what was recorded; pass two applies it.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from math import ceil

import torch
from torch import nn

from ..core.hosts import Host
from ..core.maps import StoredMap
from ..core.patching import PatchStack
from ..core.pieces import assemble, collect
from ..core.planes import part, whole
from ..core.statistics import GroupStatistics
from ..core.tilings import Each, Run, Tile, Window, scatter, tiles, window
from ..core.weights import weights_held
from .alike import looks, piece
from .halves import Cutting, InPieces, delivered
from .images import wanted
from .listening import listeners
from .parts import Parts
from .shared_norms import SharedGroupNorm
from .stages import Split, scale_of
from .strips import Forward
from .walk import Walk, can_be_walked

# What the stages that run whole may hold in activations. With less, big images would get large halos; with more,
# the whole part rather than the tiles would decide how much memory a decode takes.
WHOLE_BYTES = 2 * 2**30

# Values of a tile's largest map: larger tiles are halved. Of 64 x 64 latent pixels Stable Diffusion's decoder makes
# fewer. Where one measures 32 sample pixels a side, so many would decide how much memory all takes.
TILE_VALUES = 2**27

# Sides of what is sampled before each pass, in those of a tile's window. All of it would cost more than it gains.
SAMPLE = Fraction(2, 3)

# Of a strip of a tile's map: small beside the map, which may measure half a gibibyte.
TILE_STRIP_BYTES = 2**24


class TileWalk(Walk):
    """Strips of the maps of a tile, which are on the device; norms are given what they share with those of others.

    They have as many rows as `TILE_STRIP_BYTES` allow: a tile's own height has nothing to do with it.
    """

    def __init__(self, wrap: bool, passing: bool, shared: Mapping[nn.Module, SharedGroupNorm]) -> None:
        super().__init__(sys.maxsize, wrap, passing=passing)
        self.shared = shared

    def most_rows(self, plane: torch.Tensor) -> int:
        return self.rows_in(TILE_STRIP_BYTES, plane)

    def statistics(
        self, plane: torch.Tensor, norm: nn.GroupNorm, seen: Sequence[GroupStatistics] = ()
    ) -> GroupStatistics:
        return self.shared[norm].of(whole(plane))


class TwoPass(InPieces):
    """Tiles with shared group statistics; approximate. Exact and in one pass where they hold no group norms.

    Costs the tiled stages once per pass on tiles enlarged by the halo, and as often on a sample of half such a tile's
    area. Weights that come to the device for the tiled stages stay from the first tile to the last.

    Args:
        splits: in order of preference; the first whose whole part fits `WHOLE_BYTES` is taken, else the last.
        model, path, cutting, host: see `InPieces`.
        passes: at least 2; all but the last record. Each makes one more group norm exact, in the order they run in.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        splits: Sequence[Split],
        cutting: Cutting,
        passes: int = 2,
        host: Host | None = None,
    ) -> None:
        super().__init__(model, path, cutting, host)
        self.holds = [list(model.modules())]
        paths = {module: f"{path}.{name}" for name, module in model.named_modules()}
        self.parts = [Parts(split, paths) for split in splits]
        self.passes = passes if any(_group_norms(parts) for parts in self.parts) else 1

    def _run(self, original: Callable[[torch.Tensor], torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        parts = self.choose(sample.shape, sample.element_size())
        walk = self._walk(parts.whole)

        def run(stages: range, plane: torch.Tensor, walk: Walk | None) -> torch.Tensor:
            with parts.alone(stages, walk):
                return original(plane)

        with PatchStack() as stack:
            self._silence(stack, parts.in_pieces())
            plane = run(parts.before, sample, walk) if parts.before else sample
            plane = self._run_tiled(partial(run, parts.split.tiled), plane, parts, walk)
            return delivered(run(parts.after, plane, walk) if parts.after else plane, self.makes_pictures)

    def choose(self, shape: torch.Size, itemsize: int) -> Parts:
        """For an input ``[B, C, H, W]`` of values of so many bytes."""
        batch, _, height, width = shape
        fitting = (each for each in self.parts if each.split.whole_bytes(height, width, batch, itemsize) <= WHOLE_BYTES)
        return next(fitting, self.parts[-1])

    def _walk(self, whole: Sequence[nn.Module]) -> Walk:
        """How the stages run that are not in tiles. A module that is not known has to find its map on the device."""
        host = self.host if all(map(can_be_walked, whole)) else None
        passing = not any(map(listeners, whole))
        return Walk(self.cutting.strip_height, self.cutting.wrap, host, passing)

    def _windows(self, plane: torch.Tensor, split: Split) -> Sequence[Window]:
        """The tiled part's windows on its input plane, their edges on the grid of its coarser side."""
        height, width = plane.shape[-2:]
        step = ceil(1 / split.scale)
        cover = tiles(height // step, width // step, 0, *self._tile(split, step))
        return Each(lambda tile: window(tile.scaled(step), split.halo, height, width, self.cutting.wrap), cover)

    def _tile(self, split: Split, step: int) -> list[int]:
        """Height and width of a tile, in so many cells of the plane that is cut: as asked for, or halved as may be."""
        per_latent = self.cutting.latent_scale * scale_of(split.stages[: split.tiled.start]) / step
        sides = [int(per_latent * size) for size in (self.cutting.tile_height, self.cutting.tile_width)]
        while max(sides) * step > split.halo and split.tile_values(*(step * side for side in sides)) > TILE_VALUES:
            longer = sides.index(max(sides))
            sides[longer] = ceil(sides[longer] / 2)
        return sides

    def _sample(self, plane: torch.Tensor, split: Split, outer: Tile) -> list[Tile]:
        """Small parts of the plane, evenly over it, in all smaller than a tile's window, `outer`.

        Where much smaller than the halo, too much of them would be edge; of larger ones there would be too few.
        """
        height, width = plane.shape[-2:]
        step = ceil(1 / split.scale)
        budget = outer.scaled(SAMPLE)
        side = min(split.halo * 3 // 2, max(budget.height, budget.width) // 3)
        return scatter(budget, max(side // step, 2) * step, height, width, step)

    def _walk_in_tiles(self, tiled: Sequence[nn.Module], shared: Mapping[nn.Module, SharedGroupNorm]) -> Walk | None:
        """How tiles run: strip by strip where memory is short enough for a host, else all at once.

        At once, too, where norms look elsewhere: over the edge of a tile they would see something else.
        """
        if self.host is None or looks(self.model):
            return None
        return TileWalk(self.cutting.wrap, not any(map(listeners, tiled)), shared)

    def _run_tiled(self, run: Forward, plane: torch.Tensor, parts: Parts, walk: Walk) -> torch.Tensor:
        """All of the tiled part's output: memory of `walk` where that reads it next, else a plain tensor."""
        split = parts.split
        windows = self._windows(plane, split)
        height, width = plane.shape[-2:]
        shared = _group_norms(parts)
        bar_length = self.passes * (len(windows) + 1) if shared else len(windows)
        with weights_held(self.model.modules()), PatchStack() as stack, self._progress(bar_length) as bar:
            norms = [SharedGroupNorm(norm) for norm in shared]
            for module, technique in zip(shared, norms, strict=True):
                stack.wrap(module, "forward", technique, f"{parts.paths[module]}.forward")
            inside = self._walk_in_tiles(parts.tiled, dict(zip(shared, norms, strict=True)))

            def counted(*tiles: Tile) -> torch.Tensor:
                with piece(tiles, width):
                    result = run(_joined([_read(plane, tile) for tile in tiles], dim=0), inside)
                bar.update()
                return result

            def run_sample() -> None:
                some = self._sample(plane, split, windows[0].outer)
                for norm in norms:
                    norm.sample(len(some))
                counted(*some)

            def record(tile_window: Window) -> None:
                for norm in norms:
                    norm.record(tile_window, tile_window.tile.area / (height * width))
                counted(tile_window.outer)

            def apply(tile_window: Window) -> torch.Tensor:
                result = counted(tile_window.outer)
                owned = tile_window.owned(*result.shape[-2:])
                return result[:, :, owned.rows, owned.columns]

            def place(tile_window: Window) -> tuple[slice, ...]:
                tile = tile_window.tile.scaled(split.scale)
                return slice(None), slice(None), tile.rows, tile.columns

            def empty(result: torch.Tensor) -> torch.Tensor:
                shape = (*result.shape[:2], int(split.scale * height), int(split.scale * width))
                if parts.after:
                    return walk.empty(result, shape)
                if self.makes_pictures and (image := wanted(result, shape)) is not None:
                    return image
                stays = self.host is not None and self.makes_pictures and self.host.is_large(result, shape)
                return StoredMap.empty(shape, result, self.host) if stays else result.new_empty(shape)

            if norms:
                run_sample()
                for _ in range(self.passes - 1):
                    collect(windows, record)
                    run_sample()
            for norm in norms:
                norm.apply()
            return assemble(windows, apply, place, empty)  # type: ignore[no-any-return]


def _group_norms(parts: Parts) -> list[nn.GroupNorm]:
    """Those of the tiled stages."""
    modules = (module for stage in parts.tiled for module in stage.modules())
    return [module for module in modules if isinstance(module, nn.GroupNorm)]


def _read(plane: torch.Tensor, outer: Tile) -> torch.Tensor:
    """A part of a tensor or map ``[B, C, H, W]``; what lies over an edge comes from the opposite one."""
    height, width = plane.shape[-2:]
    rows, columns = _around(outer.top, outer.bottom, height), _around(outer.left, outer.right, width)
    bands = [_joined([part(plane, Tile(top, a, bottom, b)) for a, b in columns], dim=3) for top, bottom in rows]
    return _joined(bands, dim=2)


def _around(start: int, stop: int, length: int) -> list[Run]:
    """The runs of an axis, whose ends are neighbours, that lie between two places on it."""
    runs = []
    while start < stop:
        first = start % length
        runs.append((first, min(first + stop - start, length)))
        start += length - first
    return runs


def _joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)
