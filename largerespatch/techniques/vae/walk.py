"""Exact execution of an encoder or decoder, strip by strip: one walk that knows what is alive.

Between its modules travel maps that are passed on: each has one reader, who takes it and may write over it. So a
module works in place wherever it can, and whoever holds such a map afterwards, up the stack, holds nothing.

Where a forward hook of the user may keep what it is given, maps are not passed on but kept as they are, at the cost of
more memory: what a hook holds stays right.
"""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from ...core.bands import Bands
from ...core.hosts import Host
from ...core.maps import ComputedMap, StoredMap
from ...core.planes import Map
from ..strips.cuts import Strips
from ..strips.strips import Forward
from .images import wanted
from .stages import measure

# What a walk must know the inside of: that containers call their children in turn, each with what the last one gave.
LEANS_ON = (
    "diffusers.models.autoencoders.vae.Encoder.forward",
    "diffusers.models.autoencoders.vae.Decoder.forward",
    "diffusers.models.unets.unet_2d_blocks.DownEncoderBlock2D.forward",
    "diffusers.models.unets.unet_2d_blocks.UpDecoderBlock2D.forward",
    "diffusers.models.unets.unet_2d_blocks.UNetMidBlock2D.forward",
)

# Of a strip of a map on the host, or of what is made of it, whichever is more: it is there about seven times over,
# normalized, activated, convolved and in the workspace of convolutions. At 16384 x 16384 in float32 it has four rows.
STRIP_BYTES = 2**26


class Walk(Strips):
    """Strips of maps that are passed on from module to module, and the memory that is free meanwhile.

    Where maps live on a host, strips have fewer rows of wide ones, so that the device holds no more of them.

    Args:
        rows, wrap, bands: see `Strips`.
        host: where maps live; None: on the device.
        passing: whether maps may be written over by their reader.
        finest: height of the largest maps, where these may be computed anew rather than kept; None: they may not.
        recompute: whether to do so at the cost of time.
        by_rows: whether the largest maps lie row by row, where they are on the device (see `WalkedDownsample`).
    """

    repeats = False

    def __init__(
        self,
        rows: int,
        wrap: bool,
        host: Host | None = None,
        passing: bool = True,
        finest: int | None = None,
        recompute: bool = False,
        by_rows: bool = False,
        bands: Bands | None = None,
    ) -> None:
        super().__init__(rows, wrap, bands)
        self.host = host
        self.passing = passing
        self.finest = finest
        self.recompute = recompute
        self.by_rows = by_rows
        self.spare: StoredMap | None = None
        self.delivers = False  # whether what is made now is the result
        self.values = Fraction(0)  # most that is made now of a cell that is read

    def technique(self, module: nn.Module, path: str) -> Forward:
        """The strip-wise forward of a module. See `walked`."""
        strip_wise, values = walked(module, path, self), measure(module).values

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.values = values
            return strip_wise(*args, **kwargs)  # type: ignore[no-any-return]

        return forward

    def most_rows(self, plane: torch.Tensor) -> int:
        if self.host is None or not self.host.serves(plane.device):
            return super().most_rows(plane)
        return self.rows_in(STRIP_BYTES, plane)

    def rows_in(self, size: int, plane: torch.Tensor) -> int:
        """Rows of a map of which no more than so many bytes are there, or are made."""
        batch, channels, _, width = plane.shape
        row = batch * max(Fraction(channels), self.values) * width * plane.element_size()
        return int(size / (2 * row if isinstance(plane, ComputedMap) else row))  # which is there to compute it

    def empty(self, like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        host = self.host
        if self.delivers:
            if (image := wanted(like, shape)) is not None:
                return image
            if host is not None and not host.is_large(like, shape):
                host = None
        return StoredMap.empty(shape, like, host, self.passing)

    def reuse(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The same, or the memory that the last residual block has no more use for, where it fits."""
        spare, self.spare = self.spare, None
        return spare if spare is not None and spare.shape == shape else self.empty(like, shape)

    def taken(self, plane: torch.Tensor) -> torch.Tensor:
        """A map for its reader: to be written over where it was passed on. What was spare is freed."""
        self.spare = None
        return plane.claim() if isinstance(plane, Map) and plane.passing else plane

    def compact(self, plane: torch.Tensor) -> torch.Tensor:
        """A map alone, taken, where it is a part of a larger one whose rest nobody needs any more."""
        plane = self.taken(plane)
        if not isinstance(plane, StoredMap) or plane.away:
            return plane
        memory = plane.whole()
        if memory.untyped_storage().nbytes() == memory.numel() * memory.element_size():
            return plane
        return StoredMap.of(memory.clone(memory_format=torch.contiguous_format), self.host, self.passing)


# What gives the strip-wise forward of a module, or None for one that is not its kind: ``(module, walk)``.
Way = Callable[[Any, Walk], Any]

_WAYS: list[Way] = []

# What only calls its children one after another, so that it runs as it is.
CONTAINERS = {"Encoder", "Decoder", "DownEncoderBlock2D", "UpDecoderBlock2D", "UNetMidBlock2D", "ModuleList"}


def register_way(way: Way) -> Way:
    """Makes a way to run modules strip by strip known; to be written over it. Families add to `CONTAINERS`, too."""
    _WAYS.append(way)
    return way


def walked(module: nn.Module, path: str, walk: Walk) -> Any:
    """The strip-wise forward of a module of an encoder or decoder.

    Raises:
        ValueError: there is none for such a module; `path` and its name say which.
    """
    for way in _WAYS:
        if (found := way(module, walk)) is not None:
            return found
    raise ValueError(f"vae_mode 'exact' does not know how to run {path} ({type(module).__name__}) strip by strip")


def steps(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of what an encoder or decoder calls in turn."""
    if type(model).__name__ not in CONTAINERS:
        yield path, model
        return
    for name, child in model.named_children():
        yield from steps(child, f"{path}.{name}")


def inner_modules(model: nn.Module, path: str) -> dict[str, nn.Module]:
    """What the modules that an encoder or decoder calls in turn are made of: they see strips."""
    return {
        f"{place}.{name}": each for place, module in steps(model, path) for name, each in module.named_modules() if name
    }


def can_be_walked(model: nn.Module) -> bool:
    """Whether all that a model calls can be run strip by strip."""
    try:
        return all(walked(module, path, Walk(1, False)) for path, module in steps(model, ""))
    except ValueError:
        return False
