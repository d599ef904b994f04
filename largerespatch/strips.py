"""Exact strip-wise execution of convolutional modules.

A map is visited in strips (bands of rows at full width), each read with the halo that its convolution needs. Group
norms get the statistics of the whole map, recorded strip by strip beforehand. So every module returns its unpatched
result to rounding, while no normalized, activated or upsampled copy of a whole map is ever alive. A map that is one
strip goes through the original forward.

In an encoder or decoder each map has a single reader, so modules work *in place* there: the memory of an input becomes
that of the output wherever it can. A U-Net keeps its maps for skip connections; there inputs are left as they are.
"""

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from .groupnorm import GivenStatistics, GroupStatistics, pool, record
from .tilings import Tile, even_cuts, window

Forward = Callable[..., torch.Tensor]


class Strips:
    """How maps are cut: into strips of at most `rows` rows; `wrap` where top and bottom are neighbours.

    `spare` is memory that the last residual block has no more use for and the next one may take.
    """

    def __init__(self, rows: int, wrap: bool) -> None:
        self.rows = rows
        self.wrap = wrap
        self.spare: torch.Tensor | None = None

    def cut(self, plane: torch.Tensor, scale: Fraction = Fraction(1)) -> list[Tile]:
        """Strips of ``[B, C, H, W]``, for a module that scales them: no more rows than allowed before and after."""
        height, width = plane.shape[-2:]
        step = scale.denominator
        cuts = even_cuts(height // step, max(self.rows // max(scale.numerator, step), 1))
        return [Tile(top * step, 0, bottom * step, width) for top, bottom in pairwise(cuts)]

    def is_one(self, plane: torch.Tensor) -> bool:
        return plane.shape[-2] <= self.rows

    def read(self, plane: torch.Tensor, strips: list[Tile], halo: int) -> Iterator[tuple[Tile, int, torch.Tensor]]:
        """Yield each strip with its halo, as ``(strip, rows above it, block)``.

        The strip's own rows may be overwritten as soon as it has been yielded: what later strips need of them is
        kept aside.
        """
        height, width = plane.shape[-2:]
        first = plane[:, :, :halo].clone()
        above = plane[:, :, height - halo :].clone() if self.wrap else plane[:, :, :0]
        for strip in strips:
            outer = window(strip, halo, height, width, self.wrap).outer
            rows_above = strip.top - outer.top
            parts = [
                above[:, :, above.shape[2] - rows_above :],
                plane[:, :, strip.top : min(outer.bottom, height)],
                first[:, :, : max(outer.bottom - height, 0)],
            ]
            above = torch.cat([above, plane[:, :, strip.rows]], dim=2)
            above = above[:, :, max(above.shape[2] - halo, 0) :].clone()
            yield strip, rows_above, torch.cat(parts, dim=2)

    def statistics(self, plane: torch.Tensor, groups: int) -> GroupStatistics:
        return pool([record(plane[:, :, strip.rows], groups) for strip in self.cut(plane)])

    def take(self, plane: torch.Tensor, channels: int) -> torch.Tensor:
        """Memory for `channels` channels of a map like `plane`: the spare one where it fits."""
        shape = (plane.shape[0], channels, *plane.shape[2:])
        spare, self.spare = self.spare, None
        return spare if spare is not None and spare.shape == shape else plane.new_empty(shape)


def _bare(convolution: Any) -> Any:
    """The convolution inside an adapter (LoRA), which has the same shape but does not tell it."""
    return getattr(convolution, "base_layer", convolution)


def _reach(convolution: Any) -> int:
    """Rows that a convolution reads above and below its own."""
    convolution = _bare(convolution)
    return int(convolution.dilation[0] * (convolution.kernel_size[0] - 1) // 2)


def _is_differentiated(module: nn.Module, *tensors: torch.Tensor | None) -> bool:
    """Whether a call is one that autograd follows; strips are written over each other, which it could not undo."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (*tensors, *module.parameters())
    )


class _Time(NamedTuple):
    """What a time embedding does around the second norm of a block: a term before it, a factor and a term after it."""

    before: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    after: torch.Tensor | None = None


class StripResnet:
    """Takes the place of ``ResnetBlock2D.forward``: norm, activation, convolution, twice, plus the shortcut.

    Alive at once are the input and the map between the two convolutions, whose memory becomes that of the output. If
    nobody else reads the input (`consumes`), the output takes the input's memory instead where it fits, and a block
    that at least halves its channels needs no more than its input: shortcut and middle map fit into it.

    Calls that are differentiated go through the original.
    """

    def __init__(self, module: ResnetBlock2D, strips: Strips, consumes: bool) -> None:
        self.module: Any = module
        self.strips = strips
        self.consumes = consumes

    def __call__(
        self,
        original: Forward,
        input_tensor: torch.Tensor,
        temb: torch.Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> torch.Tensor:
        if (
            self.strips.is_one(input_tensor)
            or (temb is None) != (self.module.time_emb_proj is None)  # the original knows what to say or do
            or _is_differentiated(self.module, input_tensor, temb)
        ):
            return original(input_tensor, temb, *args, **kwargs)
        channels = self.module.out_channels
        narrows = self.consumes and self.module.conv_shortcut is not None and 2 * channels <= input_tensor.shape[1]
        if narrows:
            self.strips.spare = None
            residual, middle = input_tensor[:, :channels], input_tensor[:, channels : 2 * channels]
        else:
            residual, middle = input_tensor, self.strips.take(input_tensor, channels)
        time = self._time(temb)
        statistics = self._first_half(input_tensor, middle, residual if narrows else None, time)
        if narrows or (self.consumes and self.module.conv_shortcut is None):
            output = residual
            self.strips.spare = middle
        else:
            output = middle
        self._second_half(middle, statistics, residual, output, None if narrows else self.module.conv_shortcut, time)
        return output

    def _time(self, temb: torch.Tensor | None) -> _Time:
        if temb is None:
            return _Time()
        if not self.module.skip_time_act:
            temb = self.module.nonlinearity(temb)
        embedding = self.module.time_emb_proj(temb)[:, :, None, None]
        if self.module.time_embedding_norm == "default":
            return _Time(before=embedding)
        scale, shift = embedding.chunk(2, dim=1)
        return _Time(factor=1 + scale, after=shift)

    def _first_half(
        self, source: torch.Tensor, middle: torch.Tensor, shortcut: torch.Tensor | None, time: _Time
    ) -> GroupStatistics:
        """``conv1(act(norm1(source)))`` into `middle`; meanwhile the shortcut, if given its place.

        Returns the statistics of `middle`.
        """
        module, strips = self.module, self.strips
        statistics = strips.statistics(source, module.norm1.num_groups)
        recorded = []
        for strip, above, block in strips.read(source, strips.cut(source), _reach(module.conv1)):
            own = slice(above, above + strip.height)
            with GivenStatistics(statistics):
                normalized = module.norm1(block)
            result = module.conv1(module.nonlinearity(normalized))[:, :, own]
            if time.before is not None:
                result = result + time.before
            recorded.append(record(result, module.norm2.num_groups))
            middle[:, :, strip.rows] = result
            if shortcut is not None:
                shortcut[:, :, strip.rows] = module.conv_shortcut(block[:, :, own])
        return pool(recorded)

    def _second_half(
        self,
        middle: torch.Tensor,
        statistics: GroupStatistics,
        residual: torch.Tensor,
        output: torch.Tensor,
        shortcut: nn.Module | None,
        time: _Time,
    ) -> None:
        """``(residual + conv2(act(norm2(middle)))) / scale`` into `output`, which may be either of the two."""
        module, strips = self.module, self.strips
        for strip, above, block in strips.read(middle, strips.cut(middle), _reach(module.conv2)):
            with GivenStatistics(statistics):
                block = module.norm2(block)
            if time.factor is not None:
                block = block * time.factor + time.after
            block = module.conv2(module.dropout(module.nonlinearity(block)))[:, :, above : above + strip.height]
            own = residual[:, :, strip.rows]
            block = block + (own if shortcut is None else shortcut(own))
            output[:, :, strip.rows] = block / module.output_scale_factor


class StripResample:
    """Takes the place of the ``forward`` of a convolution, an ``Upsample2D`` or a ``Downsample2D``.

    `halo` counts cells of the input; `consumes` says that the input is not read again by anybody.
    """

    def __init__(self, strips: Strips, scale: Fraction, halo: int, consumes: bool) -> None:
        self.strips = strips
        self.scale = scale
        self.halo = halo
        self.consumes = consumes

    def __call__(self, original: Forward, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.strips.is_one(hidden_states):
            return original(hidden_states, *args, **kwargs)
        self.strips.spare = None
        if self.consumes:
            hidden_states = _compact(hidden_states)
        height, width = (int(length * self.scale) for length in hidden_states.shape[-2:])
        cuts = self.strips.cut(hidden_states, self.scale)
        output = None
        for strip, above, block in self.strips.read(hidden_states, cuts, self.halo):
            result = original(block, *args, **kwargs)
            if output is None:
                output = result.new_empty(*result.shape[:2], height, width)
            place, top = strip.scaled(self.scale), int(above * self.scale)
            output[:, :, place.rows] = result[:, :, top : top + place.height]
        assert output is not None  # there is at least one strip
        return output


class StripUpsample(StripResample):
    """Takes the place of the ``forward`` of an ``Upsample2D`` in a U-Net.

    A map that is not just doubled (where the skip connection to come is odd) and a call that is differentiated go
    through the original.
    """

    def __init__(self, module: Upsample2D, strips: Strips) -> None:
        super().__init__(strips, Fraction(2), halo=1, consumes=False)
        self.module: nn.Module = module

    def __call__(
        self, original: Forward, hidden_states: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        doubled = [2 * length for length in hidden_states.shape[-2:]]
        if (output_size is None or list(output_size) == doubled) and not _is_differentiated(self.module, hidden_states):
            return super().__call__(original, hidden_states, None, *args, **kwargs)
        return original(hidden_states, output_size, *args, **kwargs)


def _compact(hidden_states: torch.Tensor) -> torch.Tensor:
    """The map alone, where it is a part of a larger one whose rest nobody needs any more.

    Callers up the stack still hold the larger one. They will not read it, so its memory is freed under them.
    """
    if hidden_states.untyped_storage().nbytes() == hidden_states.numel() * hidden_states.element_size():
        return hidden_states
    compact = hidden_states.clone(memory_format=torch.contiguous_format)
    hidden_states.untyped_storage().resize_(0)
    return compact


class StripNorm:
    """Takes the place of ``GroupNorm.forward``, in place."""

    def __init__(self, norm: nn.GroupNorm, strips: Strips) -> None:
        self.groups = norm.num_groups
        self.strips = strips

    def __call__(self, original: Forward, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.strips.is_one(hidden_states):
            return original(hidden_states)
        with GivenStatistics(self.strips.statistics(hidden_states, self.groups)):
            for strip in self.strips.cut(hidden_states):
                hidden_states[:, :, strip.rows] = original(hidden_states[:, :, strip.rows])
        return hidden_states


class StripActivation:
    """Takes the place of an activation's ``forward``, in place."""

    def __init__(self, strips: Strips) -> None:
        self.strips = strips

    def __call__(self, original: Forward, hidden_states: torch.Tensor) -> torch.Tensor:
        for strip in self.strips.cut(hidden_states):
            hidden_states[:, :, strip.rows] = original(hidden_states[:, :, strip.rows])
        return hidden_states


def _replacement(module: nn.Module, path: str, strips: Strips) -> Forward:
    match module:
        case ResnetBlock2D(upsample=None, downsample=None, time_emb_proj=None):
            return StripResnet(module, strips, consumes=True)
        case Upsample2D(norm=None, interpolate=True, use_conv_transpose=False):
            return StripResample(strips, Fraction(2), halo=1, consumes=True)
        case Downsample2D(norm=None, use_conv=True, padding=0):
            return StripResample(strips, Fraction(1, 2), halo=2, consumes=True)
        case nn.Conv2d(stride=(1, 1)):
            return StripResample(strips, Fraction(1), halo=_reach(module), consumes=False)
        case nn.GroupNorm():
            return StripNorm(module, strips)
        case nn.SiLU():
            return StripActivation(strips)
    raise ValueError(f"vae_mode 'exact' does not know how to run {path} ({type(module).__name__}) strip by strip")


# What only calls its children one after another, so that it runs as it is.
CONTAINERS = ("Encoder", "Decoder", "DownEncoderBlock2D", "UpDecoderBlock2D", "UNetMidBlock2D", "ModuleList")


def replacements(model: nn.Module, strips: Strips, path: str) -> Iterator[tuple[str, nn.Module, Forward]]:
    """Path, module and strip-wise forward for all of an encoder or decoder. Attention stays whole.

    Raises:
        ValueError: there is a module in it that cannot be run strip by strip; `path` and the module's name say which.
    """
    for name, child in model.named_children():
        where = f"{path}.{name}"
        if type(child).__name__ in CONTAINERS:
            yield from replacements(child, strips, where)
        elif not isinstance(child, Attention):
            replacement = _replacement(child, where, strips)
            yield where, child, replacement


def unet_replacements(model: nn.Module, strips: Strips, path: str) -> Iterator[tuple[str, nn.Module, Forward]]:
    """Path, module and strip-wise forward for what a U-Net or ControlNet holds; any other module is left alone."""
    for name, module in model.named_modules(prefix=path):
        match module:
            case ResnetBlock2D(upsample=None, downsample=None, norm1=nn.GroupNorm(), norm2=nn.GroupNorm()):
                # Else the memory of the map between the convolutions is not the output's size.
                if _bare(module.conv2).out_channels == module.out_channels:
                    yield name, module, StripResnet(module, strips, consumes=False)
            case Upsample2D(norm=None, interpolate=True, use_conv_transpose=False):
                yield name, module, StripUpsample(module, strips)
