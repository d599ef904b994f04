"""VAE encode and decode in pieces: in two passes over tiles, or exactly, strip by strip.

Two-pass is approximate: low-resolution stages run whole, the rest in tiles with shared group statistics. The
convolutions see all they need, so the only difference from the untiled result is in these statistics: pass one records
what every group norm sees, normalized by the statistics of a sample of small windows; the sample then corrects what
was recorded; pass two applies it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, prod
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D
from torch import nn

from .groupnorm import SharedGroupNorm
from .patching import PatchStack
from .rehearsal import pieces
from .shuttle import Shuttle
from .strips import Forward, Strips, known_replacements, replacements
from .tilings import Tile, Window, scatter, tiles, window

# What the stages that run whole may hold in activations. With less, big images would get large halos; with more,
# the whole part rather than the tiles would decide how much memory a decode takes.
WHOLE_BYTES = 2 * 2**30

# Sides of what is sampled before each pass, in those of a tile's window. All of it would cost more than it gains.
SAMPLE = Fraction(2, 3)

VAE_MODES = ("two-pass", "exact")
VAE_ATTENTIONS = ("full", "blocked")

ProgressBar = Callable[..., AbstractContextManager[Any]]


@dataclass(frozen=True)
class Stage:
    """One child of an encoder or decoder, and what its convolutions do to a map.

    `scale` is its output's size relative to its input's; `reach` how many cells of its input an output cell needs on
    each side; `values` the most values that any of its layers puts out per cell of its input.
    """

    module: nn.Module
    scale: Fraction
    reach: Fraction
    values: Fraction


def measure(module: nn.Module) -> Stage:
    """Walk the convolutions of a stage in the order they are registered in, which is the order they run in."""
    scale, reach, values = Fraction(1), Fraction(0), Fraction(0)
    for child in module.modules():
        if isinstance(child, Upsample2D):
            scale *= 2
        elif isinstance(child, nn.Conv2d):
            span = child.dilation[0] * (child.kernel_size[0] - 1)
            strided = child.stride[0] > 1
            # Only a convolution without a stride is centred: VAEs pad the others to the right and below.
            reach += Fraction(span, 1 if strided else 2) / scale
            scale /= child.stride[0]
            values = max(values, child.out_channels * scale**2)
    return Stage(module, scale, reach, values)


def _scale(stages: Iterable[Stage]) -> Fraction:
    return prod((stage.scale for stage in stages), start=Fraction(1))


@dataclass(frozen=True)
class Split:
    """Which stages run in tiles (the half-open range `tiled`); the others run whole, before and after them."""

    stages: Sequence[Stage]
    tiled: range

    @property
    def scale(self) -> Fraction:
        """Size of the tiled part's output relative to its input."""
        return _scale(self.stages[i] for i in self.tiled)

    @property
    def halo(self) -> int:
        """Cells of the tiled part's input that its convolutions need around a tile."""
        scale, reach = Fraction(1), Fraction(0)
        for i in self.tiled:
            reach += self.stages[i].reach / scale
            scale *= self.stages[i].scale
        step = ceil(1 / scale)  # windows start where the downsamplers' grid does
        return step * ceil(reach / step)

    def whole_bytes(self, height: int, width: int, batch: int, itemsize: int) -> int:
        """About what the whole part holds for an input of ``height x width`` cells: three times its largest map."""
        cells, largest = Fraction(height * width), Fraction(0)
        for i, stage in enumerate(self.stages):
            if i not in self.tiled:
                largest = max(largest, cells * stage.values)
            cells *= stage.scale**2
        return int(3 * largest) * batch * itemsize


def decoder_splits(decoder: Any) -> list[Split]:
    """Ways to split a decoder, from the last two up blocks in tiles to all of them in tiles.

    In Stable Diffusion's decoder the first needs a halo of 10 cells of the 4x map (2.5 latent pixels), the last of
    13 latent pixels.
    """
    up_blocks = list(decoder.up_blocks)
    last = (decoder.conv_norm_out, decoder.conv_act, decoder.conv_out)
    stages = [measure(module) for module in (decoder.conv_in, decoder.mid_block, *up_blocks, *last)]
    return [Split(stages, range(start, len(stages))) for start in range(max(len(up_blocks), 2), 1, -1)]


def encoder_splits(encoder: Any) -> list[Split]:
    """Ways to split an encoder, from the first down block in tiles to all but the last."""
    down_blocks = list(encoder.down_blocks)
    last = (encoder.conv_norm_out, encoder.conv_act, encoder.conv_out)
    stages = [measure(module) for module in (encoder.conv_in, *down_blocks, encoder.mid_block, *last)]
    return [Split(stages, range(stop)) for stop in range(2, max(len(down_blocks), 2) + 1)]


def can_be_tiled(vae: Any) -> bool:
    """Whether attention, which needs the whole map, occurs in the mid blocks alone."""
    blocks = [*vae.encoder.down_blocks, *vae.decoder.up_blocks]
    return not any(isinstance(module, Attention) for block in blocks for module in block.modules())


def _pass_through(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return hidden_states


@dataclass(frozen=True)
class Cutting:
    """How an encoder or decoder is cut, sizes in latent pixels.

    `latent_scale` is the size of its input relative to the latent (1 for a decoder, 8 for SD's encoder), `wrap` says
    whether the plane's opposite edges are neighbours (circular padding), `progress_bar` is the pipeline's, called with
    ``total``, and `title` goes with it.
    """

    tile_height: int
    tile_width: int
    latent_scale: int
    wrap: bool
    progress_bar: ProgressBar
    title: str


class _InPieces(ABC):
    """Takes the place of an encoder's or decoder's ``forward`` for inputs ``[B, C, H, W]``.

    An input of at most one tile goes through the original.

    Args:
        cutting: the size of a tile, and the rest.
        host: where maps that are not in tiles live, if that is not where the model runs, while parts of them visit the
            device. None: they stay on the device. Attention has its whole map on the device in any case.
    """

    def __init__(self, cutting: Cutting, host: torch.device | None = None) -> None:
        self.cutting = cutting
        self.host = host

    def __call__(self, original: Forward, sample: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        height, width = (length // self.cutting.latent_scale for length in sample.shape[-2:])
        if height <= self.cutting.tile_height and width <= self.cutting.tile_width:
            return original(sample, *args, **kwargs)
        if torch.is_grad_enabled() and sample.requires_grad:
            raise RuntimeError(
                f"{self.cutting.title} of {width}x{height} latent pixels runs in pieces, which have no gradients: "
                "detach its input, leave the block of LargeResPatch, or give it larger vae_chunk_size_x and _y"
            )
        with torch.no_grad():
            return self._run(lambda part: original(part, *args, **kwargs), sample)

    @abstractmethod
    def _run(self, original: Callable[[torch.Tensor], torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        """The result for an input of more than one tile."""

    def _shuttle(self, device: torch.device) -> Shuttle | None:
        return None if self.host in (None, device) else Shuttle(device, self.host)

    @contextmanager
    def _progress(self, total: int) -> Iterator[Any]:
        with self.cutting.progress_bar(total=total) as bar:
            bar.set_description(self.cutting.title)
            yield bar


class TwoPass(_InPieces):
    """Tiles with shared group statistics; approximate.

    Costs the tiled stages once per pass on tiles enlarged by the halo, and as often on a sample of half such a tile's
    area. The original forward runs each part, with the stages outside that part passing their input through. What runs
    whole does so strip by strip where its modules are known: exact, and smaller in memory.

    Args:
        splits: in order of preference; the first whose whole part fits `WHOLE_BYTES` is taken, else the last.
        cutting, host: see above.
        passes: at least 2; all but the last record. Each makes one more group norm exact, in the order they run in.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        cutting: Cutting,
        passes: int = 2,
        host: torch.device | None = None,
    ) -> None:
        super().__init__(cutting, host)
        self.splits = splits
        self.passes = passes

    def _run(self, original: Callable[[torch.Tensor], torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        split = self.choose(sample)
        before, after = range(split.tiled.start), range(split.tiled.stop, len(split.stages))
        strips = Strips(self.cutting.tile_height, self.cutting.wrap)
        in_strips = {i: known_replacements(split.stages[i].module, strips, f"stage {i}") for i in (*before, *after)}
        if all(in_strips.values()):  # a module that is not known has to find its map on the device
            strips.shuttle = self._shuttle(sample.device)

        def run(hidden_states: torch.Tensor, part: range) -> torch.Tensor:
            with PatchStack() as stack:
                for i, stage in enumerate(split.stages):
                    if i not in part:
                        stack.set(stage.module, "forward", _pass_through, f"stage {i}")
                        continue
                    for path, module, replacement in in_strips.get(i, ()):
                        stack.wrap(module, "forward", replacement, f"{path}.forward")
                result = original(hidden_states)
            strips.spare = None
            return result

        hidden_states = run(sample, before) if before else sample
        if strips.shuttle is not None:
            strips.shuttle.settle()
        # What is read again waits on the host.
        empty = strips.empty if after else torch.Tensor.new_empty
        hidden_states = self._run_tiled(
            lambda window: run(window.to(sample.device), split.tiled), hidden_states, split, empty
        )
        result = run(hidden_states, after) if after else hidden_states
        return result if strips.shuttle is None else strips.shuttle.deliver(result)

    def choose(self, sample: torch.Tensor) -> Split:
        batch, _, height, width = sample.shape
        for split in self.splits:
            if split.whole_bytes(height, width, batch, sample.element_size()) <= WHOLE_BYTES:
                return split
        return self.splits[-1]

    def _windows(self, plane: torch.Tensor, split: Split) -> list[Window]:
        """The tiled part's windows on its input plane, their edges on the grid of its coarser side."""
        height, width = plane.shape[-2:]
        step = ceil(1 / split.scale)
        per_latent = self.cutting.latent_scale * _scale(split.stages[: split.tiled.start]) / step
        slice_y, slice_x = (int(per_latent * size) for size in (self.cutting.tile_height, self.cutting.tile_width))
        cover = tiles(height // step, width // step, 0, slice_y, slice_x)
        windows = [window(tile.scaled(step), split.halo, height, width, self.cutting.wrap) for tile in cover]
        return list(pieces(windows, Window.sizes))

    def _sample(self, plane: torch.Tensor, split: Split, outer: Tile) -> list[torch.Tensor]:
        """Small parts of the plane, evenly over it, in all smaller than a tile's window, `outer`.

        Where much smaller than the halo, too much of them would be edge; of larger ones there would be too few.
        """
        height, width = plane.shape[-2:]
        step = ceil(1 / split.scale)
        budget = outer.scaled(SAMPLE)
        side = min(split.halo * 3 // 2, max(budget.height, budget.width) // 3)
        parts = scatter(budget, max(side // step, 2) * step, height, width, step)
        return [plane[:, :, part.rows, part.columns] for part in parts]

    def _run_tiled(
        self, run: Forward, plane: torch.Tensor, split: Split, empty: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        windows = self._windows(plane, split)
        sample = self._sample(plane, split, windows[0].outer)
        height, width = plane.shape[-2:]
        with PatchStack() as stack, self._progress(self.passes * (len(windows) + 1)) as bar:
            norms = _share_group_norms(stack, (split.stages[i].module for i in split.tiled))

            def run_sample() -> None:
                for norm in norms:
                    norm.sample(len(sample))
                run(torch.cat(sample))
                bar.update()

            def run_window(tile_window: Window) -> torch.Tensor:
                result = run(_read(plane, tile_window))
                bar.update()
                return result

            run_sample()
            for _ in range(self.passes - 1):
                for tile_window in windows:
                    for norm in norms:
                        norm.record(tile_window, tile_window.tile.area / (height * width))
                    run_window(tile_window)
                run_sample()
            for norm in norms:
                norm.apply()

            output = None
            for tile_window in windows:
                result = run_window(tile_window)
                owned = tile_window.owned(*result.shape[-2:])
                if output is None:
                    size = (int(split.scale * height), int(split.scale * width))
                    output = empty(result, (*result.shape[:2], *size))
                place = tile_window.tile.scaled(split.scale)
                output[:, :, place.rows, place.columns] = result[:, :, owned.rows, owned.columns]
            assert output is not None  # there is at least one window
            return output


def _share_group_norms(stack: PatchStack, modules: Iterable[nn.Module]) -> list[SharedGroupNorm]:
    shared = []
    for module in modules:
        for name, norm in module.named_modules():
            if isinstance(norm, nn.GroupNorm):
                shared.append(SharedGroupNorm(norm))
                stack.wrap(norm, "forward", shared[-1], f"{type(module).__name__}.{name}.forward")
    return shared


def _read(plane: torch.Tensor, tile_window: Window) -> torch.Tensor:
    """Cut a window out of a plane ``[B, C, H, W]``; what lies over an edge comes from the opposite one."""
    outer = tile_window.outer
    height, width = plane.shape[-2:]
    if outer.top >= 0 and outer.left >= 0 and outer.bottom <= height and outer.right <= width:
        return plane[:, :, outer.rows, outer.columns]
    rows = torch.arange(outer.top, outer.bottom, device=plane.device) % height
    columns = torch.arange(outer.left, outer.right, device=plane.device) % width
    return plane[:, :, rows[:, None], columns]


class Exact(_InPieces):
    """Strip by strip with the group statistics of the whole map; exact, each module to rounding.

    No arithmetic is done twice but in the halos of the strips (a row or two on each side). Larger in memory than two
    passes: whole maps are alive, about half as many as in the original.

    Args:
        model: the encoder or decoder, and `path` its name in messages.
        cutting, host: see above; strips have as many rows, on every map, as a tile has in latent pixels.
        recompute: at the finest level, where maps are largest, no map exists but the outputs of residual blocks: an
            upsampler's is computed three times and the one between two convolutions twice, strip by strip.

    Raises:
        ValueError: `model` holds a module that cannot be run strip by strip.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        cutting: Cutting,
        recompute: bool = False,
        host: torch.device | None = None,
    ) -> None:
        super().__init__(cutting, host)
        self.strips = Strips(cutting.tile_height, cutting.wrap)
        self.replacements = list(replacements(model, self.strips, path))
        self.recompute = recompute

    def _run(self, original: Callable[[torch.Tensor], torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        strips = self.strips
        with PatchStack() as stack, self._progress(len(self.replacements)) as bar:

            def counted(replacement: Forward) -> Forward:
                def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
                    result = replacement(*args, **kwargs)
                    bar.update()
                    return result

                return forward

            for path, module, replacement in self.replacements:
                stack.wrap(module, "forward", counted(replacement), f"{path}.forward")
            doublings = sum(isinstance(module, Upsample2D) for _, module, _ in self.replacements)
            strips.finest = sample.shape[-2] * 2**doublings if self.recompute else None
            strips.shuttle = self._shuttle(sample.device)
            try:
                result = original(sample)
                return result if strips.shuttle is None else strips.shuttle.deliver(result)
            finally:
                strips.spare = strips.shuttle = strips.deferred = None
