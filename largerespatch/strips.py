"""Exact strip-wise execution of convolutional modules.

A map is visited in strips (bands of rows at full width), each read with the halo that its convolution needs. Group
norms get the statistics of the whole map, recorded strip by strip beforehand. So every module returns its unpatched
result to rounding, while no normalized, activated or upsampled copy of a whole map is ever alive. A map that is one
strip goes through the original forward.

In an encoder or decoder each map has a single reader, so modules work *in place* there: the memory of an input becomes
that of the output wherever it can. A U-Net keeps its maps for skip connections; there inputs are left as they are.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from math import ceil
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from .groupnorm import GivenStatistics, GroupStatistics, pool, record
from .rehearsal import pieces
from .shuttle import Shuttle
from .tilings import Tile, even_cuts, window

Forward = Callable[..., torch.Tensor]


class Upsampled:
    """The output of an upsampler, ``[B, C, H, W]``, that is computed anew, strip by strip, each time it is read."""

    def __init__(self, source: torch.Tensor, channels: int, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.source = source
        self.forward = forward
        self.shape = torch.Size([source.shape[0], channels, 2 * source.shape[2], 2 * source.shape[3]])


Map = torch.Tensor | Upsampled


class Strips:
    """How maps are cut: into strips of at most `rows` rows; `wrap` where top and bottom are neighbours.

    `spare` is memory that the last residual block has no more use for and the next one may take. `shuttle` says that
    whole maps live on its host (None: on the device). `finest` is the height of maps so large that recomputing them
    is better than keeping them (None: there are none); `deferred` the one of them that the next module reads.
    """

    def __init__(self, rows: int, wrap: bool) -> None:
        self.rows = rows
        self.wrap = wrap
        self.spare: torch.Tensor | None = None
        self.shuttle: Shuttle | None = None
        self.finest: int | None = None
        self.deferred: Upsampled | None = None

    def cut(self, plane: Map, scale: Fraction = Fraction(1)) -> Sequence[Tile]:
        """Strips of ``[B, C, H, W]``, for a module that scales them: no more rows than allowed before and after."""
        height, width = plane.shape[-2:]
        step = 2 if isinstance(plane, Upsampled) else scale.denominator
        cuts = even_cuts(height // step, max(self.rows // max(scale.numerator, step), 1))
        return pieces([Tile(top * step, 0, bottom * step, width) for top, bottom in pairwise(cuts)], Tile.size)

    def is_one(self, plane: torch.Tensor) -> bool:
        return plane.shape[-2] <= self.rows

    def read(self, plane: Map, strips: Sequence[Tile], halo: int) -> Iterator[tuple[Tile, int, torch.Tensor]]:
        """Yield each strip with its halo, as ``(strip, rows above it, block)``, the block on the device.

        The strip's own rows may be overwritten before the next one is asked for: what later strips need of them is
        kept aside. The block may be the very memory of the map.
        """
        if isinstance(plane, Upsampled):
            yield from self._read_upsampled(plane, strips, halo)
            return
        height, width = plane.shape[-2:]
        outers = [window(strip, halo, height, width, self.wrap).outer for strip in strips]
        around = self.wrap and halo > 0
        first = self.on_device(plane[:, :, :halo]).clone() if around else None
        above = self.on_device(plane[:, :, height - halo :]).clone() if around else None
        pieces = (
            plane[:, :, strip.top : min(outer.bottom, height)] for strip, outer in zip(strips, outers, strict=True)
        )
        for strip, outer, piece in zip(strips, outers, self._fetched(pieces), strict=True):
            parts = [piece]
            if above is not None and strip.top > outer.top:
                parts.insert(0, above[:, :, outer.top - strip.top :])
            if first is not None and outer.bottom > height:
                parts.append(first[:, :, : outer.bottom - height])
            block = torch.cat(parts, dim=2) if len(parts) > 1 else piece
            if halo:
                end = strip.bottom - outer.top
                above = block[:, :, max(end - halo, 0) : end].clone()
            yield strip, strip.top - outer.top, block

    def _read_upsampled(
        self, plane: Upsampled, strips: Sequence[Tile], halo: int
    ) -> Iterator[tuple[Tile, int, torch.Tensor]]:
        halves = [strip.scaled(Fraction(1, 2)) for strip in strips]
        blocks = self.read(plane.source, halves, halo=(halo + 1) // 2 + 1)  # one more for the upsampler itself
        for strip, (_, above, block) in zip(strips, blocks, strict=True):
            result = plane.forward(block)
            top, bottom = 2 * above, 2 * above + strip.height
            rows_above = min(halo, top)
            yield strip, rows_above, result[:, :, top - rows_above : bottom + halo]

    def _fetched(self, pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        return iter(pieces) if self.shuttle is None else self.shuttle.fetch(pieces)

    def on_device(self, plane: torch.Tensor) -> torch.Tensor:
        """All of a map, wherever it lives. It comes strip by strip, lest the device hold it in two layouts at once."""
        if self.shuttle is None:
            return plane
        whole = torch.empty(plane.shape, dtype=plane.dtype, device=self.shuttle.device)
        for strip, _, block in self.read(plane, self.cut(plane), 0):
            whole[:, :, strip.rows] = block
        return whole

    def write(self, plane: torch.Tensor, strip: Tile, values: torch.Tensor) -> None:
        """`values` into the rows of a `strip`, wherever `plane` lives."""
        if self.shuttle is None or plane.device == values.device:
            plane[:, :, strip.rows] = values
        else:
            self.shuttle.store(plane[:, :, strip.rows], values)

    def statistics(self, plane: Map, groups: int) -> GroupStatistics:
        return pool([record(block, groups) for _, _, block in self.read(plane, self.cut(plane), 0)])

    def empty(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory for a whole map, of the dtype of `like`."""
        return like.new_empty(shape) if self.shuttle is None else self.shuttle.empty(shape, like.dtype)

    def take(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The same; the spare memory where it fits."""
        spare, self.spare = self.spare, None
        return spare if spare is not None and spare.shape == shape else self.empty(like, shape)


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
    """What a time embedding does around the second norm of a block: a term before it, or a factor and a term after."""

    before: torch.Tensor | None = None
    after: tuple[torch.Tensor, torch.Tensor] | None = None


class StripResnet:
    """Takes the place of ``ResnetBlock2D.forward``: norm, activation, convolution, twice, plus the shortcut.

    Alive at once are the input and the map between the two convolutions, whose memory becomes that of the output. If
    nobody else reads the input (`consumes`), the output takes the input's memory instead where it fits, and a block
    that at least halves its channels needs no more than its input: shortcut and middle map fit into it. On a map of
    the finest level the middle map is not kept where it would be a second one; it is computed twice.

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
        strips, shortcut = self.strips, self.module.conv_shortcut
        if (
            strips.is_one(input_tensor)
            or (temb is None) != (self.module.time_emb_proj is None)  # the original knows what to say or do
            or _is_differentiated(self.module, input_tensor, temb)
        ):
            return original(strips.on_device(input_tensor), temb, *args, **kwargs)
        time, channels = self._time(temb), self.module.out_channels
        source, strips.deferred = strips.deferred or input_tensor, None
        if isinstance(source, Upsampled):
            middle = strips.empty(input_tensor, (source.shape[0], channels, *source.shape[2:]))
            self._second_half(middle, self._first_half(source, middle, None, time), source, middle, shortcut, time)
            _free(source.source)
            return middle
        if self.consumes and shortcut is None and source.shape[-2] == strips.finest:
            strips.spare = None
            self._at_once(source, time)
            return source
        if self.consumes and shortcut is not None and 2 * channels <= source.shape[1] and strips.shuttle is None:
            strips.spare = None
            residual, middle = source[:, :channels], source[:, channels : 2 * channels]
            self._second_half(middle, self._first_half(source, middle, residual, time), residual, residual, None, time)
            strips.spare = middle
            return residual
        middle = strips.take(source, (source.shape[0], channels, *source.shape[2:]))
        output, unused = (source, middle) if self.consumes and shortcut is None else (middle, None)
        self._second_half(middle, self._first_half(source, middle, None, time), source, output, shortcut, time)
        strips.spare = unused
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
        return _Time(after=(1 + scale, shift))

    def _first_half(
        self, source: Map, middle: torch.Tensor, shortcut: torch.Tensor | None, time: _Time
    ) -> GroupStatistics:
        """``conv1(act(norm1(source)))`` into `middle`; meanwhile the shortcut, if given its place.

        Returns the statistics of `middle`.
        """
        module, strips = self.module, self.strips
        statistics = strips.statistics(source, module.norm1.num_groups)
        recorded = []
        for strip, above, block in strips.read(source, strips.cut(source), _reach(module.conv1)):
            own = slice(above, above + strip.height)
            result = self._conv1(block, statistics, time)[:, :, own]
            recorded.append(record(result, module.norm2.num_groups))
            if shortcut is not None:
                strips.write(shortcut, strip, module.conv_shortcut(block[:, :, own]))
            strips.write(middle, strip, result)
        return pool(recorded)

    def _second_half(
        self,
        middle: torch.Tensor,
        statistics: GroupStatistics,
        residual: Map,
        output: torch.Tensor,
        shortcut: nn.Module | None,
        time: _Time,
    ) -> None:
        """``(residual + conv2(act(norm2(middle)))) / scale`` into `output`, which may be either of the two."""
        module, strips = self.module, self.strips
        cuts = strips.cut(residual)
        blocks, residuals = strips.read(middle, cuts, _reach(module.conv2)), strips.read(residual, cuts, 0)
        for (strip, above, block), (_, _, own) in zip(blocks, residuals, strict=True):
            block = self._conv2(block, statistics, time)[:, :, above : above + strip.height]
            block = block + (own if shortcut is None else shortcut(own))
            strips.write(output, strip, block / module.output_scale_factor)

    def _at_once(self, plane: torch.Tensor, time: _Time) -> None:
        """The block in place: the middle map is computed once for its statistics and once more to be used."""
        module, strips = self.module, self.strips
        cuts, reach = strips.cut(plane), _reach(module.conv1) + _reach(module.conv2)
        outer = strips.statistics(plane, module.norm1.num_groups)
        inner = pool(
            [
                record(self._conv1(block, outer, time)[:, :, above : above + strip.height], module.norm2.num_groups)
                for strip, above, block in strips.read(plane, cuts, _reach(module.conv1))
            ]
        )
        for strip, above, block in strips.read(plane, cuts, reach):
            own = block[:, :, above : above + strip.height]
            # The outermost rows saw padding in place of their neighbours, but no row of the strip's own sees them.
            result = self._conv2(self._conv1(block, outer, time), inner, time)[:, :, above : above + strip.height]
            strips.write(plane, strip, (own + result) / module.output_scale_factor)

    def _conv1(self, block: torch.Tensor, statistics: GroupStatistics, time: _Time) -> torch.Tensor:
        with GivenStatistics(statistics):
            block = self.module.norm1(block)
        block = self.module.conv1(self.module.nonlinearity(block))
        return block if time.before is None else block + time.before

    def _conv2(self, block: torch.Tensor, statistics: GroupStatistics, time: _Time) -> torch.Tensor:
        with GivenStatistics(statistics):
            block = self.module.norm2(block)
        if time.after is not None:
            factor, term = time.after
            block = block * factor + term
        convolved: torch.Tensor = self.module.conv2(self.module.dropout(self.module.nonlinearity(block)))
        return convolved


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
        if self.strips.is_one(hidden_states) or hidden_states.shape[-2] < self.halo:
            return original(self.strips.on_device(hidden_states), *args, **kwargs)
        self.strips.spare = None
        if self.consumes:
            hidden_states = _compact(hidden_states)
        height, width = (int(length * self.scale) for length in hidden_states.shape[-2:])
        cuts = self.strips.cut(hidden_states, self.scale)
        output = None
        for strip, above, block in self.strips.read(hidden_states, cuts, self.halo):
            result = original(block, *args, **kwargs)
            if output is None:
                output = self.strips.empty(result, (*result.shape[:2], height, width))
            place, top = strip.scaled(self.scale), int(above * self.scale)
            self.strips.write(output, place, result[:, :, top : top + place.height])
        assert output is not None  # there is at least one strip
        return output


class StripUpsample(StripResample):
    """Takes the place of the ``forward`` of an ``Upsample2D``.

    Where its output belongs to the finest level, it hands its input on, and the next module reads the output strip
    by strip. In a U-Net (not `consumes`), a map that is not just doubled, since the skip connection to come is odd, and
    a call that is differentiated go through the original.
    """

    def __init__(self, module: Upsample2D, strips: Strips, consumes: bool) -> None:
        super().__init__(strips, Fraction(2), halo=1, consumes=consumes)
        self.module: Any = module

    def __call__(
        self, original: Forward, hidden_states: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        doubled = [2 * length for length in hidden_states.shape[-2:]]
        if (output_size is not None and list(output_size) != doubled) or _is_differentiated(self.module, hidden_states):
            return original(hidden_states, output_size, *args, **kwargs)
        if doubled[0] != self.strips.finest or self.strips.is_one(hidden_states):
            return super().__call__(original, hidden_states, None, *args, **kwargs)
        self.strips.spare = None
        source = _compact(hidden_states)
        self.strips.deferred = Upsampled(
            source, self.module.out_channels, lambda block: original(block, None, *args, **kwargs)
        )
        return source


def _compact(hidden_states: torch.Tensor) -> torch.Tensor:
    """The map alone, where it is a part of a larger one whose rest nobody needs any more."""
    if hidden_states.untyped_storage().nbytes() == hidden_states.numel() * hidden_states.element_size():
        return hidden_states
    compact = hidden_states.clone(memory_format=torch.contiguous_format)
    _free(hidden_states)
    return compact


def _free(plane: torch.Tensor) -> None:
    """Callers up the stack still hold this map. They will not read it, so its memory is freed under them."""
    plane.untyped_storage().resize_(0)


class StripNorm:
    """Takes the place of ``GroupNorm.forward``, in place."""

    def __init__(self, norm: nn.GroupNorm, strips: Strips) -> None:
        self.groups = norm.num_groups
        self.strips = strips

    def __call__(self, original: Forward, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.strips.is_one(hidden_states):
            return original(self.strips.on_device(hidden_states))
        with GivenStatistics(self.strips.statistics(hidden_states, self.groups)):
            return _in_place(original, hidden_states, self.strips)


class StripActivation:
    """Takes the place of an activation's ``forward``, in place."""

    def __init__(self, strips: Strips) -> None:
        self.strips = strips

    def __call__(self, original: Forward, hidden_states: torch.Tensor) -> torch.Tensor:
        return _in_place(original, hidden_states, self.strips)


def _in_place(forward: Forward, plane: torch.Tensor, strips: Strips) -> torch.Tensor:
    for strip, _, block in strips.read(plane, strips.cut(plane), 0):
        strips.write(plane, strip, forward(block))
    return plane


class Whole:
    """Takes the place of the ``forward`` of a module that needs all of a map (attention), in place.

    Where maps live on a host, this one is on the device for the length of the call.
    """

    def __init__(self, strips: Strips) -> None:
        self.strips = strips

    def __call__(self, original: Forward, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = original(self.strips.on_device(hidden_states), *args, **kwargs)
        if result.device == hidden_states.device:
            return result
        for strip in self.strips.cut(result):
            self.strips.write(hidden_states, strip, result[:, :, strip.rows])
        return hidden_states


def _replacement(module: nn.Module, path: str, strips: Strips) -> Forward:
    match module:
        case ResnetBlock2D(upsample=None, downsample=None, time_emb_proj=None):
            return StripResnet(module, strips, consumes=True)
        case Upsample2D(norm=None, interpolate=True, use_conv_transpose=False):
            return StripUpsample(module, strips, consumes=True)
        case Downsample2D(norm=None, use_conv=True, padding=0):
            return StripResample(strips, Fraction(1, 2), halo=2, consumes=True)
        case nn.Conv2d(stride=(1, 1)):
            return StripResample(strips, Fraction(1), halo=_reach(module), consumes=False)
        case nn.GroupNorm():
            return StripNorm(module, strips)
        case nn.SiLU():
            return StripActivation(strips)
        case Attention():
            return Whole(strips)
    raise ValueError(f"vae_mode 'exact' does not know how to run {path} ({type(module).__name__}) strip by strip")


# What only calls its children one after another, so that it runs as it is.
CONTAINERS = ("Encoder", "Decoder", "DownEncoderBlock2D", "UpDecoderBlock2D", "UNetMidBlock2D", "ModuleList")


def replacements(model: nn.Module, strips: Strips, path: str) -> Iterator[tuple[str, nn.Module, Forward]]:
    """Path, module and forward for all of an encoder or decoder: strip by strip, but attention, which stays whole.

    Raises:
        ValueError: there is a module in it that cannot be run strip by strip; `path` and the module's name say which.
    """
    if type(model).__name__ not in CONTAINERS:
        yield path, model, _replacement(model, path, strips)
        return
    for name, child in model.named_children():
        yield from replacements(child, strips, f"{path}.{name}")


def known_replacements(model: nn.Module, strips: Strips, path: str) -> list[tuple[str, nn.Module, Forward]]:
    """The same where all modules are known; else none."""
    try:
        return list(replacements(model, strips, path))
    except ValueError:
        return []


def _strip_embedding(module: nn.Module, strips: Strips) -> StripResample:
    """For a ControlNet's embedding of its picture: centred convolutions, some with a stride, and no norm between."""
    reach, step = 0, 1
    for convolution in module.modules():
        if isinstance(convolution, nn.Conv2d):
            reach += step * _reach(convolution)
            step *= convolution.stride[0]
    return StripResample(strips, Fraction(1, step), halo=step * ceil(reach / step), consumes=False)


def unet_replacements(model: nn.Module, strips: Strips, path: str) -> Iterator[tuple[str, nn.Module, Forward]]:
    """Path, module and strip-wise forward for what a U-Net or ControlNet holds; any other module is left alone."""
    for name, module in model.named_modules(prefix=path):
        match module:
            case ResnetBlock2D(upsample=None, downsample=None, norm1=nn.GroupNorm(), norm2=nn.GroupNorm()):
                # Else the memory of the map between the convolutions is not the output's size.
                if _bare(module.conv2).out_channels == module.out_channels:
                    yield name, module, StripResnet(module, strips, consumes=False)
            case Upsample2D(norm=None, interpolate=True, use_conv_transpose=False):
                yield name, module, StripUpsample(module, strips, consumes=False)
            case _ if type(module).__name__ == "ControlNetConditioningEmbedding":  # its class brings transformers along
                yield name, module, _strip_embedding(module, strips)
