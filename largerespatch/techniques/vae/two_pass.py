"""VAE encode and decode in two passes over tiles with shared group statistics: approximate.

Low-resolution stages run whole, the rest in tiles. The convolutions see all they need, so the only difference from the
untiled result is in the statistics. Where no group norm is in the tiles one pass is all, and exact. Else pass one
records what every group norm sees, normalized by the statistics of a sample of small windows; the sample then corrects
what was recorded; pass two applies it.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from ...core.hosts import Host
from ...core.patching import PatchStack
from ...core.pieces import assemble, collect
from ...core.planes import part, whole
from ...core.statistics import GroupStatistics
from ...core.tilings import Tile, Window
from ...core.weights import weights_held
from ..listening import listeners
from ..strips.strips import Forward
from .alike import looks, piece
from .halves import Cutting, InPieces, delivered
from .parts import Parts
from .shared_norms import SharedGroupNorm
from .stages import Split
from .tiled_part import TiledPart
from .walk import Walk, can_be_walked

# What the stages that run whole may hold in activations. With less, big images would get large halos; with more,
# the whole part rather than the tiles would decide how much memory a decode takes.
WHOLE_BYTES = 2 * 2**30

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
        before, after = (self._walk(parts.modules(stages)) for stages in (parts.before, parts.after))
        after.delivers = not parts.after and self.makes_pictures

        def run(stages: range, plane: torch.Tensor, walk: Walk | None) -> torch.Tensor:
            with parts.alone(stages, walk):
                return original(plane)

        with PatchStack() as stack:
            self._silence(stack, parts.in_pieces())
            plane = run(parts.before, sample, before) if parts.before else sample
            plane = self._run_tiled(partial(run, parts.split.tiled), plane, parts, after)
            return delivered(run(parts.after, plane, after) if parts.after else plane, self.makes_pictures)

    def choose(self, shape: torch.Size, itemsize: int) -> Parts:
        """For an input ``[B, C, H, W]`` of values of so many bytes."""
        batch, _, height, width = shape
        fitting = (each for each in self.parts if each.split.whole_bytes(height, width, batch, itemsize) <= WHOLE_BYTES)
        return next(fitting, self.parts[-1])

    def _walk(self, whole: Sequence[nn.Module]) -> Walk:
        """How stages run that are not in tiles. A module that is not known has to find its map on the device."""
        host = self.host if all(map(can_be_walked, whole)) else None
        passing = not any(map(listeners, whole))
        return Walk(self.cutting.strip_height, self.cutting.wrap, host, passing)

    def _walk_in_tiles(self, tiled: Sequence[nn.Module], shared: Mapping[nn.Module, SharedGroupNorm]) -> Walk | None:
        """How tiles run: strip by strip where memory is short enough for a host, else all at once.

        At once, too, where norms look elsewhere: over the edge of a tile they would see something else.
        """
        if self.host is None or looks(self.model):
            return None
        return TileWalk(self.cutting.wrap, not any(map(listeners, tiled)), shared)

    def _run_tiled(self, run: Forward, plane: torch.Tensor, parts: Parts, walk: Walk) -> torch.Tensor:
        """All of the tiled part's output, in memory of `walk`."""
        tiled = TiledPart(parts.split, self.cutting, *plane.shape[-2:])
        norms = [(norm, SharedGroupNorm(norm)) for norm in _group_norms(parts)]
        bar_length = self.passes * (len(tiled.windows) + 1) if norms else len(tiled.windows)
        with weights_held(self.model.modules()), PatchStack() as stack, self._progress(bar_length) as bar:
            for module, norm in norms:
                stack.wrap(module, "forward", norm, f"{parts.paths[module]}.forward")
            inside = self._walk_in_tiles(parts.tiled, dict(norms))

            def counted(*tiles: Tile) -> torch.Tensor:
                with piece(tiles, tiled.width):
                    result = run(part(plane, *tiles), inside)
                bar.update()
                return result

            def run_sample() -> None:
                for _, norm in norms:
                    norm.sample(tiled.sample, tiled.edge)
                counted(*(each.outer for each in tiled.sample))

            def record(window: Window) -> None:
                for _, norm in norms:
                    norm.record(window, tiled.share(window))
                counted(window.outer)

            def apply(window: Window) -> torch.Tensor:
                result = counted(window.outer)
                return part(result, window.owned(*result.shape[-2:]))

            if norms:
                run_sample()
                for _ in range(self.passes - 1):
                    collect(tiled.windows, record)
                    run_sample()
            for _, norm in norms:
                norm.apply()
            return assemble(  # type: ignore[no-any-return]
                tiled.windows, apply, tiled.place, make=lambda some: walk.empty(some, (*some.shape[:2], *tiled.made))
            )


def _group_norms(parts: Parts) -> list[nn.GroupNorm]:
    """Those of the tiled stages."""
    modules = (module for stage in parts.tiled for module in stage.modules())
    return [module for module in modules if isinstance(module, nn.GroupNorm)]
