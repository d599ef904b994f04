"""Exact strip-wise execution of convolutional modules.

A map is visited in strips (bands of rows at full width), each read with the halo that its convolution needs. Group
norms get the statistics of the whole map, recorded strip by strip beforehand. So every module returns its unpatched
result to rounding, while no normalized, activated or upsampled copy of a whole map is ever alive. A map that is one
strip goes through the original forward.
"""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache, partial
from math import ceil
from typing import Any, NamedTuple

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ...core.families import Order, Site
from ...core.modules import named_modules
from ...core.pieces import assemble, side_by_side
from ...core.statistics import GivenStatistics, GroupStatistics, record
from ...core.tilings import Tile
from .cuts import Block, Strips, rows_of
from .halos import own_rows

Forward = Callable[..., torch.Tensor]


# What strips must know the inside of: the order of a residual block's layers, and that a resampler is one convolution
# before or after doubling the map, an embedding of pictures nothing but convolutions.
LEANS_ON = (
    "diffusers.models.resnet.ResnetBlock2D.forward",
    "diffusers.models.upsampling.Upsample2D.forward",
    "diffusers.models.downsampling.Downsample2D.forward",
    "diffusers.models.controlnets.controlnet.ControlNetConditioningEmbedding.forward",
)


def bare(convolution: Any) -> Any:
    """The convolution inside an adapter (LoRA), which has the same shape but does not tell it."""
    return getattr(convolution, "base_layer", convolution)


def reach(convolution: Any) -> int:
    """Rows that a convolution reads above and below its own."""
    convolution = bare(convolution)
    return int(convolution.dilation[-2] * (convolution.kernel_size[-2] - 1) // 2)  # before them may be that of time


def is_differentiated(module: nn.Module, *tensors: torch.Tensor | None) -> bool:
    """Whether a call is one that autograd follows; strips are written over each other, which it could not undo."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (*tensors, *module.parameters())
    )


class TimeTerms(NamedTuple):
    """What a time embedding does around the second norm of a block: a term before it, or a factor and a term after."""

    before: torch.Tensor | None = None
    after: tuple[torch.Tensor, torch.Tensor] | None = None


# Asked for where the original would do it, since offloading with streams foresees in which order layers are called.
Time = Callable[[], TimeTerms]


class StripResnet:
    """Takes the place of ``ResnetBlock2D.forward``: norm, activation, convolution, twice, plus the shortcut.

    Alive at once are the input and the map between the two convolutions, whose memory becomes that of the output. Calls
    that are differentiated go through the original. Not for blocks that resample.
    """

    def __init__(self, module: ResnetBlock2D, strips: Strips) -> None:
        self.module: Any = module
        self.strips = strips

    def __call__(
        self,
        original: Forward,
        input_tensor: torch.Tensor,
        temb: torch.Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> torch.Tensor:
        if (
            self.strips.is_one(input_tensor, self.output_shape(input_tensor))
            or (temb is None) != (self.module.time_emb_proj is None)  # the original knows what to say or do
            or is_differentiated(self.module, input_tensor, temb)
        ):
            return original(input_tensor, temb, *args, **kwargs)
        return self.run(input_tensor, cache(partial(self._time, temb)))

    def run(self, source: torch.Tensor, time: Time) -> torch.Tensor:
        middle = self.strips.empty(source, self.output_shape(source))
        return self.second_half(middle, self.first_half(source, middle, time), source, middle, time)

    def output_shape(self, source: torch.Tensor) -> tuple[int, ...]:
        return source.shape[0], self.module.out_channels, *source.shape[2:]

    def first_half(
        self, source: torch.Tensor, middle: torch.Tensor, time: Time, residual: torch.Tensor | None = None
    ) -> GroupStatistics:
        """``conv1(act(norm1(source)))`` into `middle`; also what the shortcut makes of `source`, if given its place.

        Returns the statistics of `middle`.
        """
        module, strips = self.module, self.strips
        statistics, halo = strips.statistics(source, self.group_norm(module.norm1)), reach(module.conv1)
        recorded = []

        def compute(strip: Tile, given: Block) -> Any:
            above, block = given
            result = own_rows(lambda rows: self.conv1(rows, statistics, time, strip.top - above), strip, given, halo)
            recorded.append(record(result, self.group_norm(module.norm2).num_groups))
            own = slice(above, above + strip.height)
            return result if residual is None else (module.conv_shortcut(block[:, :, own]), result)

        into = middle if residual is None else (residual, middle)
        read = partial(strips.read, source, halo)
        assemble(strips.cut(source), compute, rows_of, into=into, read=read, carries=True)
        return strips.statistics(middle, self.group_norm(module.norm2), recorded)

    def second_half(
        self,
        middle: torch.Tensor,
        statistics: GroupStatistics,
        residual: torch.Tensor,
        output: torch.Tensor,
        time: Time,
        shortcut_done: bool = False,
    ) -> torch.Tensor:
        """``(residual + conv2(act(norm2(middle)))) / scale`` into `output`, which may be either of the two."""
        module, strips = self.module, self.strips
        shortcut, halo = None if shortcut_done else module.conv_shortcut, reach(module.conv2)

        def compute(strip: Tile, given: tuple[Block, Block]) -> torch.Tensor:
            around, (_, own) = given
            top = strip.top - around[0]
            block = own_rows(lambda rows: self.conv2(rows, statistics, time, top), strip, around, halo)
            block = block + (own if shortcut is None else shortcut(own))
            return block / module.output_scale_factor  # type: ignore[no-any-return]

        def read(cuts: Sequence[Tile]) -> Iterator[tuple[Block, Block]]:
            return side_by_side(strips.read(middle, halo, cuts), strips.read(residual, 0, cuts))

        return assemble(  # type: ignore[no-any-return]
            strips.cut(residual), compute, rows_of, into=output, read=read, carries=True
        )

    def _time(self, temb: torch.Tensor | None) -> TimeTerms:
        if temb is None:
            return TimeTerms()
        if not self.module.skip_time_act:
            temb = self.module.nonlinearity(temb)
        embedding = self.module.time_emb_proj(temb)[:, :, None, None]
        if self.module.time_embedding_norm == "default":
            return TimeTerms(before=embedding)
        scale, shift = embedding.chunk(2, dim=1)
        return TimeTerms(after=(1 + scale, shift))

    def group_norm(self, norm: Any) -> nn.GroupNorm:
        """What of a norm of the block needs the statistics of the whole map."""
        return norm  # type: ignore[no-any-return]

    def normalized(self, norm: Any, block: torch.Tensor, statistics: GroupStatistics, top: int) -> torch.Tensor:
        """A block whose first row is the map's row `top`: below zero where rows come from the opposite edge."""
        with GivenStatistics(statistics):
            result: torch.Tensor = norm(block)
        return result

    def conv1(self, block: torch.Tensor, statistics: GroupStatistics, time: Time, top: int) -> torch.Tensor:
        # In one expression, so that what is normalized is gone when what is activated of it is convolved.
        nonlinearity, norm = self.module.nonlinearity, self.module.norm1
        block = self.module.conv1(nonlinearity(self.normalized(norm, block, statistics, top)))
        before = time().before
        return block if before is None else block + before

    def conv2(self, block: torch.Tensor, statistics: GroupStatistics, time: Time, top: int) -> torch.Tensor:
        def normalized() -> torch.Tensor:
            result = self.normalized(self.module.norm2, block, statistics, top)
            if (after := time().after) is None:
                return result
            factor, term = after
            return result * factor + term

        convolved: torch.Tensor = self.module.conv2(self.module.dropout(self.module.nonlinearity(normalized())))
        return convolved


class StripResample:
    """Takes the place of the ``forward`` of a convolution, an ``Upsample2D`` or a ``Downsample2D``.

    `halo` counts cells of the input. `plain` says that the module is a convolution with no shortcut around it, so that
    the halo may take the place of padding.
    """

    def __init__(self, strips: Strips, scale: Fraction, halo: int, plain: bool = False) -> None:
        self.strips = strips
        self.scale = scale
        self.halo = halo
        self.plain = plain

    def __call__(self, original: Forward, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.strips.is_one(hidden_states):
            return original(hidden_states, *args, **kwargs)
        return self.run(original, hidden_states, *args, **kwargs)

    def run(self, original: Forward, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        size = [int(length * self.scale) for length in source.shape[-2:]]
        return self.assembled(source, size, lambda block, top: original(block, *args, **kwargs))

    def assembled(
        self, source: torch.Tensor, size: Sequence[int], work: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> torch.Tensor:
        """A map of that size, of what `work` makes of strips with their halos that begin in some row of the source."""

        def rows(strip: Tile) -> slice:
            return slice(int(strip.top * self.scale), min(ceil(strip.bottom * self.scale), size[0]))

        def compute(strip: Tile, given: Block) -> torch.Tensor:
            own, top = rows(strip), strip.top - given[0]
            result = own_rows(lambda block: work(block, top), strip, given, self.halo if self.plain else 0, self.scale)
            return result[:, :, : own.stop - own.start]

        return assemble(  # type: ignore[no-any-return]
            self.strips.cut(source, self.scale),
            compute,
            place=lambda strip: (slice(None), slice(None), rows(strip)),
            make=lambda result: self.output(source, result, (*result.shape[:2], *size)),
            read=partial(self.strips.read, source, self.halo),
            carries=True,
        )

    def output(self, source: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory for all that comes out, of which `like` is the first."""
        return self.strips.empty(like, shape)


class StripUpsample(StripResample):
    """Takes the place of the ``forward`` of an ``Upsample2D``.

    A map that is not just doubled, since the skip connection to come is odd, has its last row or column once. Where
    rows of that are neighbours of the first ones, and where a call is differentiated, all goes through the original.
    """

    def __init__(self, module: Upsample2D, strips: Strips) -> None:
        super().__init__(strips, Fraction(2), halo=1, plain=True)
        self.module: Any = module

    def __call__(
        self, original: Forward, hidden_states: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        doubled = [2 * length for length in hidden_states.shape[-2:]]
        odd = [length - wanted for length, wanted in zip(doubled, output_size or doubled, strict=True)]
        shape = (len(hidden_states), self.module.out_channels, *doubled)
        if (
            not {0, 1}.issuperset(odd)
            or (odd[0] and self.strips.wrap)
            or self.strips.is_one(hidden_states, shape)
            or is_differentiated(self.module, hidden_states)
        ):
            return original(hidden_states, output_size, *args, **kwargs)
        if any(odd):
            return self._run_odd(original, hidden_states, output_size)
        return self.run(original, hidden_states, None, *args, **kwargs)

    def _run_odd(self, original: Forward, source: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        height = source.shape[2]

        def sized(block: torch.Tensor, top: int) -> torch.Tensor:
            short = 2 * height - size[0] if top + block.shape[2] == height else 0  # only the last row can come once
            return original(block, (2 * block.shape[2] - short, size[1]))

        return self.assembled(source, size, sized)


def can_be_resnet(module: nn.Module) -> bool:
    """Whether a module is a residual block that can run in strips."""
    match module:
        case ResnetBlock2D(upsample=None, downsample=None, norm1=nn.GroupNorm(), norm2=nn.GroupNorm()):
            # Else the memory of the map between the convolutions is not the output's size.
            return bool(bare(module.conv2).out_channels == module.out_channels)
    return False


def can_be_upsampler(module: nn.Module) -> bool:
    match module:
        case Upsample2D(norm=None, interpolate=True, use_conv_transpose=False):
            return True
    return False


def strip_embedding(module: nn.Module, strips: Strips) -> StripResample:
    """For a ControlNet's embedding of its picture: centred convolutions, some with a stride, and no norm between."""
    span, step = 0, 1
    for convolution in module.modules():
        if isinstance(convolution, nn.Conv2d):
            span += step * reach(convolution)
            step *= convolution.stride[0]
    return StripResample(strips, Fraction(1, step), halo=step * ceil(span / step))


def strip_sites(model: nn.Module, name: str, strips: Strips) -> Iterator[Site]:
    """The residual blocks, upsamplers and embedded pictures of a U-Net or ControlNet; all else is left alone."""
    says = f"convolutions in strips of {strips.rows} rows"
    for path, module in named_modules(model, name):
        technique: Any = None
        if can_be_resnet(module):
            technique = StripResnet(module, strips)
        elif can_be_upsampler(module):
            technique = StripUpsample(module, strips)
        elif type(module).__name__ == "ControlNetConditioningEmbedding":  # its class brings transformers along
            technique = strip_embedding(module, strips)
        if technique is not None:
            yield Site(module, path, Order.IN_STRIPS, technique, says=says)
