"""VAE encode and decode in two passes over tiles with shared group statistics: approximate.

Low-resolution stages run whole, the rest in tiles. The convolutions see all they need, so the only difference from the
untiled result is in the statistics: pass one records what every group norm sees, normalized by the statistics of a
sample of small windows; the sample then corrects what was recorded; pass two applies it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from math import ceil

import torch
from torch import nn

from ..core.families import Order, Site
from ..core.hosts import Host
from ..core.patching import PatchStack
from ..core.pieces import assemble, collect
from ..core.planes import part
from ..core.tilings import Each, Run, Tile, Window, scatter, tiles, window
from ..core.weights import weights_held
from .halves import Cutting, InPieces, delivered
from .shared_norms import SharedGroupNorm
from .stages import Split, scale_of
from .strips import Forward
from .walk import Walk, can_be_walked, inner_modules, listeners, silence, steps, walked

# What the stages that run whole may hold in activations. With less, big images would get large halos; with more,
# the whole part rather than the tiles would decide how much memory a decode takes.
WHOLE_BYTES = 2 * 2**30

# Sides of what is sampled before each pass, in those of a tile's window. All of it would cost more than it gains.
SAMPLE = Fraction(2, 3)


def _pass_through(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return hidden_states


class TwoPass(InPieces):
    """Tiles with shared group statistics; approximate.

    Costs the tiled stages once per pass on tiles enlarged by the halo, and as often on a sample of half such a tile's
    area. The original forward runs each part, with the stages outside that part passing their input through. What runs
    whole does so strip by strip where its modules are known: exact, and smaller in memory. Weights that come to the
    device for the tiled stages stay from the first tile to the last.

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
        self.paths = {module: f"{path}.{name}" for name, module in model.named_modules()}
        self.splits = splits
        self.passes = passes

    def _run(self, original: Callable[[torch.Tensor], torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        split = self.choose(sample)
        before, after = range(split.tiled.start), range(split.tiled.stop, len(split.stages))
        walk = self._walk([split.stages[i].module for i in (*before, *after)])

        def run(hidden_states: torch.Tensor, stages: range) -> torch.Tensor:
            with self._alone(split, stages, walk):
                return original(hidden_states)

        with PatchStack() as stack:
            self._silence(stack, self._in_pieces(split))
            plane = run(sample, before) if before else sample
            plane = self._run_tiled(lambda tile: run(tile, split.tiled), plane, split, walk if after else None)
            return delivered(run(plane, after) if after else plane)

    def choose(self, sample: torch.Tensor) -> Split:
        batch, _, height, width = sample.shape
        for split in self.splits:
            if split.whole_bytes(height, width, batch, sample.element_size()) <= WHOLE_BYTES:
                return split
        return self.splits[-1]

    def _walk(self, whole: Sequence[nn.Module]) -> Walk:
        """How the stages run that are not in tiles. A module that is not known has to find its map on the device."""
        host = self.host if all(map(can_be_walked, whole)) else None
        passing = not any(map(listeners, whole))
        return Walk(self.cutting.tile_height, self.cutting.wrap, host, passing)

    def _in_pieces(self, split: Split) -> dict[str, nn.Module]:
        """The modules that see pieces alone, by path: tiles or strips."""
        seen: dict[str, nn.Module] = {}
        for i, stage in enumerate(split.stages):
            if i in split.tiled:
                seen |= {self.paths[module]: module for module in stage.module.modules()}
            elif can_be_walked(stage.module):
                seen |= inner_modules(stage.module, self.paths[stage.module])
        return seen

    @contextmanager
    def _alone(self, split: Split, stages: range, walk: Walk) -> Iterator[None]:
        """Inside, the model runs these stages and passes its input through the others."""
        with PatchStack() as stack:
            for i, stage in enumerate(split.stages):
                path = self.paths[stage.module]
                if i not in stages:
                    stack.set(stage.module, "forward", _pass_through, f"{path}.forward")
                    for kind in ("_forward_hooks", "_forward_pre_hooks"):  # it is called once for each part
                        silence(stack, {path: stage.module}, kind)
                elif i not in split.tiled and can_be_walked(stage.module):
                    for place, module in steps(stage.module, path):
                        Site(module, place, Order.IN_STRIPS, walked(module, place, walk)).install(stack)
            yield
        walk.spare = None

    def _windows(self, plane: torch.Tensor, split: Split) -> Sequence[Window]:
        """The tiled part's windows on its input plane, their edges on the grid of its coarser side."""
        height, width = plane.shape[-2:]
        step = ceil(1 / split.scale)
        per_latent = self.cutting.latent_scale * scale_of(split.stages[: split.tiled.start]) / step
        slice_y, slice_x = (int(per_latent * size) for size in (self.cutting.tile_height, self.cutting.tile_width))
        cover = tiles(height // step, width // step, 0, slice_y, slice_x)
        return Each(lambda tile: window(tile.scaled(step), split.halo, height, width, self.cutting.wrap), cover)

    def _sample(self, plane: torch.Tensor, split: Split, outer: Tile) -> list[Tile]:
        """Small parts of the plane, evenly over it, in all smaller than a tile's window, `outer`.

        Where much smaller than the halo, too much of them would be edge; of larger ones there would be too few.
        """
        height, width = plane.shape[-2:]
        step = ceil(1 / split.scale)
        budget = outer.scaled(SAMPLE)
        side = min(split.halo * 3 // 2, max(budget.height, budget.width) // 3)
        return scatter(budget, max(side // step, 2) * step, height, width, step)

    def _run_tiled(self, run: Forward, plane: torch.Tensor, split: Split, walk: Walk | None) -> torch.Tensor:
        """All of the tiled part's output: memory of `walk` where that reads it next, else a plain tensor."""
        windows = self._windows(plane, split)
        height, width = plane.shape[-2:]
        bar_length = self.passes * (len(windows) + 1)
        with weights_held(self.model.modules()), PatchStack() as stack, self._progress(bar_length) as bar:
            norms = self._share_group_norms(stack, [split.stages[i].module for i in split.tiled])

            def counted(given: torch.Tensor) -> torch.Tensor:
                result = run(given)
                bar.update()
                return result

            def run_sample() -> None:
                parts = [part(plane, tile) for tile in self._sample(plane, split, windows[0].outer)]
                for norm in norms:
                    norm.sample(len(parts))
                counted(torch.cat(parts))

            def record(tile_window: Window) -> None:
                for norm in norms:
                    norm.record(tile_window, tile_window.tile.area / (height * width))
                counted(_read(plane, tile_window.outer))

            def apply(tile_window: Window) -> torch.Tensor:
                result = counted(_read(plane, tile_window.outer))
                owned = tile_window.owned(*result.shape[-2:])
                return result[:, :, owned.rows, owned.columns]

            def place(tile_window: Window) -> tuple[slice, ...]:
                tile = tile_window.tile.scaled(split.scale)
                return slice(None), slice(None), tile.rows, tile.columns

            def empty(result: torch.Tensor) -> torch.Tensor:
                shape = (*result.shape[:2], int(split.scale * height), int(split.scale * width))
                return result.new_empty(shape) if walk is None else walk.empty(result, shape)

            run_sample()
            for _ in range(self.passes - 1):
                collect(windows, record)
                run_sample()
            for norm in norms:
                norm.apply()
            return assemble(windows, apply, place, empty)  # type: ignore[no-any-return]

    def _share_group_norms(self, stack: PatchStack, tiled: Iterable[nn.Module]) -> list[SharedGroupNorm]:
        """Puts shared statistics in the group norms of the tiled stages."""
        shared = []
        for stage in tiled:
            for module in stage.modules():
                if isinstance(module, nn.GroupNorm):
                    shared.append(SharedGroupNorm(module))
                    stack.wrap(module, "forward", shared[-1], f"{self.paths[module]}.forward")
        return shared


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
