"""The modules of an encoder or decoder on a walk: strip by strip, in place wherever a map was passed on. Exact."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ...core.maps import ComputedMap, StoredMap
from ...core.pieces import assemble, collect
from ...core.planes import fetch
from ...core.statistics import GivenStatistics, record
from ...core.tilings import Run, Tile
from ..strips.cuts import Block, rows_of
from ..strips.halos import own_rows
from ..strips.strips import (
    Forward,
    StripResample,
    StripResnet,
    StripUpsample,
    Time,
    can_be_resnet,
    can_be_upsampler,
    reach,
)
from .alike import piece
from .walk import Walk, register_way

# What strips of these must know the inside of.
LEANS_ON = (
    "diffusers.models.resnet.ResnetBlock2D.forward",
    "diffusers.models.upsampling.Upsample2D.forward",
    "diffusers.models.downsampling.Downsample2D.forward",
)


class WalkedResnet(StripResnet):
    """The output takes the input's memory where it fits; the map between the convolutions is then spare.

    A block that at least halves its channels needs no more than its input: shortcut and middle map fit into it. On a
    map of the finest level the middle map is not kept where it would be a second one, if that is wanted or the block is
    a `tight` one: of a model whose peak it would be. It is computed twice.
    """

    strips: Walk
    saves_if_recomputed = True

    def __init__(self, module: Any, strips: Walk, tight: bool = False) -> None:
        super().__init__(module, strips)
        self.tight = tight
        self.saves_if_recomputed = not tight  # else it does so anyway

    def run(self, source: torch.Tensor, time: Time) -> torch.Tensor:
        walk, shape, shortcut = self.strips, self.output_shape(source), self.module.conv_shortcut
        if not isinstance(source, StoredMap) or not source.passing:
            middle, source = walk.reuse(source, shape), walk.taken(source)
            return self.second_half(middle, self.first_half(source, middle, time), source, middle, time)
        if shortcut is None and source.shape[-2] == walk.finest and (walk.recompute or self.tight):
            return self._at_once(walk.taken(source), time)
        if shortcut is not None and 2 * shape[1] <= source.shape[1] and not source.away:
            return self._within(walk.taken(source).whole(), time)  # type: ignore[attr-defined]
        middle = walk.reuse(source, shape)
        source = source.claim()
        output = source if shortcut is None else middle
        output = self.second_half(middle, self.first_half(source, middle, time), source, output, time)
        if shortcut is None:
            walk.spare = middle  # type: ignore[assignment]
        return output

    def _within(self, memory: torch.Tensor, time: Time) -> torch.Tensor:
        channels, walk = self.module.out_channels, self.strips
        parts = (memory[:, :channels], memory[:, channels : 2 * channels])
        residual, middle = (StoredMap.of(part, walk.host, passing=True) for part in parts)
        statistics = self.first_half(StoredMap.of(memory), middle, time, residual)
        output = self.second_half(middle, statistics, residual, residual, time, shortcut_done=True)
        walk.spare = middle
        return output

    def _at_once(self, plane: torch.Tensor, time: Time) -> torch.Tensor:
        """The block in place: the middle map is computed once for its statistics and once more to be used."""
        module, walk = self.module, self.strips
        outer = walk.statistics(plane, self.group_norm(module.norm1))
        cuts, recorded = walk.cut(plane), []
        halo = reach(module.conv1)
        around = halo + reach(module.conv2)

        def note(strip: Tile, given: Block) -> None:
            middle = own_rows(lambda rows: self.conv1(rows, outer, time, strip.top - given[0]), strip, given, halo)
            recorded.append(record(middle, self.group_norm(module.norm2).num_groups))

        def compute(strip: Tile, given: Block) -> torch.Tensor:
            above, block = given
            top = strip.top - above

            def both(rows: torch.Tensor) -> torch.Tensor:
                middle = self.conv1(rows, outer, time, top)
                return self.conv2(middle, inner, time, top + (rows.shape[-2] - middle.shape[-2]) // 2)

            # At an edge the outermost rows saw padding in place of their neighbours, but no row of the strip's own
            # sees them.
            result = own_rows(both, strip, given, around)
            return (block[:, :, above : above + strip.height] + result) / module.output_scale_factor  # type: ignore[no-any-return]

        collect(cuts, note, read=partial(walk.read, plane, halo), carries=True)
        inner = walk.statistics(plane, self.group_norm(module.norm2), recorded)
        read = partial(walk.read, plane, around)
        return assemble(cuts, compute, rows_of, into=plane, read=read, carries=True)  # type: ignore[no-any-return]


class WalkedResample(StripResample):
    """Its input is gone when it is done, and what lies around that before, where the output is of another size.

    For any module whose output cells depend on near cells of its input alone, and which makes maps of them so many
    times as large. Where the output fits into its input, it is written there.
    """

    strips: Walk

    def run(self, original: Forward, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        source = self.strips.taken(source) if self.scale == 1 else self.strips.compact(source)
        return super().run(original, source, *args, **kwargs)

    def output(self, source: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        walk = self.strips
        if isinstance(source, StoredMap) and source.passing and (source.shape, source.dtype) == (shape, like.dtype):
            return source
        away = walk.host is not None and walk.host.serves(like.device)
        if walk.by_rows and shape[2] == walk.finest and not away:
            batch, channels, height, width = shape
            rows = like.new_empty(batch, height, channels, width)
            return StoredMap.of(rows.transpose(1, 2), walk.host, walk.passing)
        return super().output(source, like, shape)


class WalkedDownsample(WalkedResample):
    """Of a map that lies row by row the first rows of pairs become the output, where it fits; the second are spare.

    So nothing is alive beside its input, and whatever follows works in the memory of that.
    """

    by_rows = True

    def run(self, original: Forward, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return StripResample.run(self, original, self.strips.taken(source), *args, **kwargs)

    def output(self, source: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        if not isinstance(source, StoredMap) or not source.passing or source.away or source.dtype != like.dtype:
            return super().output(source, like, shape)
        memory, (_, channels, height, width) = source.whole(), shape
        sample, channel, row, cell = memory.stride()
        lies_so = (channel, cell) == (memory.shape[3], 1) and memory.shape[2] == 2 * height
        if not lies_so or channels * width > memory.shape[1] * memory.shape[3]:
            return super().output(source, like, shape)
        first = memory.as_strided(shape, (sample, width, 2 * row, 1))
        second = memory[:, :, 1:].as_strided(shape, (sample, width, 2 * row, 1))
        self.strips.spare = StoredMap.of(second, self.strips.host, passing=True)
        return StoredMap.of(first, self.strips.host, passing=True)


class WalkedUpsample(StripUpsample):
    """Where its output belongs to the finest level, it is computed where the next module reads it, if so wanted."""

    strips: Walk
    saves_if_recomputed = True

    def run(self, original: Forward, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        walk, (batch, _, height, width) = self.strips, source.shape
        source = walk.compact(source)
        if 2 * height != walk.finest or not walk.recompute:
            return super().run(original, source, *args, **kwargs)

        def compute(run: Run, half: Tile, given: Block) -> torch.Tensor:
            (top, bottom), (above, block) = run, given
            start = 2 * above + top - 2 * half.top
            return original(block, *args, **kwargs)[:, :, start : start + bottom - top]

        def fetch(runs: Sequence[Run]) -> Iterator[torch.Tensor]:
            halves = [Tile(top // 2, 0, (bottom + 1) // 2, width) for top, bottom in runs]
            return map(compute, runs, halves, walk.read(source, 1, halves))

        shape = (batch, self.module.out_channels, 2 * height, 2 * width)
        return ComputedMap(shape, source, fetch, walk.passing)


class WalkedPointwise:
    """Takes the place of the ``forward`` of a norm or an activation: in place, where its input was passed on.

    `norm` is what needs the statistics of the whole map, if anything does.
    """

    def __init__(self, walk: Walk, norm: nn.GroupNorm | None = None) -> None:
        self.walk = walk
        self.norm = norm

    def __call__(self, original: Forward, hidden_states: torch.Tensor) -> torch.Tensor:
        walk, norm = self.walk, self.norm
        if walk.is_one(hidden_states):
            return original(hidden_states)
        statistics = None if norm is None else walk.statistics(hidden_states, norm)

        def compute(strip: Tile, block: torch.Tensor) -> torch.Tensor:
            with piece([strip], strip.width), nullcontext() if statistics is None else GivenStatistics(statistics):
                return original(block)

        plane = walk.taken(hidden_states)
        return assemble(  # type: ignore[no-any-return]
            walk.cut(plane),
            compute,
            rows_of,
            into=plane if isinstance(plane, StoredMap) and plane.passing else None,
            make=lambda result: walk.empty(result, (*result.shape[:2], *plane.shape[2:])),
            read=lambda strips: fetch(plane, [(strip.top, strip.bottom) for strip in strips]),
        )


class WalkedWhole:
    """Takes the place of the ``forward`` of a module that needs all of a map (attention).

    Where maps live on a host, this one is on the device for the call, unless attention takes it in pieces.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def __call__(self, original: Forward, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.walk.spare = None
        result = original(hidden_states, *args, **kwargs)
        kept = StoredMap.of(result, self.walk.host, self.walk.passing) if not isinstance(result, StoredMap) else result
        kept.leave()
        return kept


@register_way
def _of_convolutions(module: Any, walk: Walk) -> Any:
    match module:
        case ResnetBlock2D(time_emb_proj=None) if can_be_resnet(module):
            return WalkedResnet(module, walk)
        case _ if can_be_upsampler(module):
            return WalkedUpsample(module, walk)
        case Downsample2D(norm=None, use_conv=True, padding=0):
            return WalkedResample(walk, Fraction(1, 2), halo=2)
        case nn.Conv2d(stride=(1, 1)):
            return WalkedResample(walk, Fraction(1), halo=reach(module), plain=True)
        case nn.GroupNorm():
            return WalkedPointwise(walk, module)
        case nn.SiLU() | nn.ReLU() | nn.ReLU6() | nn.GELU() | nn.Mish():
            return WalkedPointwise(walk)
        case Attention():
            return WalkedWhole(walk)
    return None
