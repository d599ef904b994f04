"""Feature maps that wait on the host and act as if they were on their device.

A `Waiting` map stands for one ``[B, C, H, W]`` tensor that may leave its device and is read from the host where it is
needed; a `Joined` one stands for a concatenation that need not exist as a whole. Both are tensors: whoever reads rows
of them (``map[:, :, top:bottom]``, as strip-wise modules do) gets just these, sums and products are formed band by
band and wait like their terms, and any other operation brings the whole map back. So nothing can read a wrong value,
and what is not read costs the device no memory. All of this is exact.

On CUDA copies run on a stream of their own, to and from pinned memory, a band of rows ahead of what is read. That
memory comes from torch's own pool, which uses it again from step to step.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch.utils._pytree import tree_map_only

BAND_BYTES = 2**24  # of one copy: long enough for the bus, small beside any map that is worth moving


class Link:
    """The way between devices and the host. Maps that lie on `host` stay where they are."""

    def __init__(self, host: str = "cpu", band_bytes: int = BAND_BYTES) -> None:
        self.host = torch.device(host)
        self.band_bytes = band_bytes
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._sent: torch.cuda.Event | None = None

    def moves(self, value: object) -> bool:
        """Whether `value` is a map that can leave its device; one that gradients pass through cannot."""
        return (
            isinstance(value, torch.Tensor)
            and not isinstance(value, OffMap)
            and value.ndim == 4
            and value.device != self.host
            and not value.requires_grad
        )

    def cuts(self, plane: torch.Tensor) -> list[tuple[int, int]]:
        """Rows of the bands in which `plane` travels."""
        height = plane.shape[2]
        rows = max(self.band_bytes * height // max(plane.numel() * plane.element_size(), 1), 1)
        return [(top, min(top + rows, height)) for top in range(0, height, rows)]

    def send(self, band: torch.Tensor) -> torch.Tensor:
        """Copy a band to the host; the copy is complete for whatever `fetch` does later."""
        side = self._side(band.device)
        if side is None:
            return torch.empty(band.shape, dtype=band.dtype, device=self.host).copy_(band)
        side.wait_stream(torch.cuda.current_stream(band.device))
        with torch.cuda.stream(side):
            kept = torch.empty(band.shape, dtype=band.dtype, pin_memory=True)
            kept.copy_(band.contiguous(), non_blocking=True)
        band.record_stream(side)
        return kept

    def settle(self, device: torch.device) -> None:
        """Wait until the maps before the last one have left, lest their memory be missing for what comes next."""
        side = self._side(device)
        if side is not None:
            if self._sent is not None:
                self._sent.synchronize()
            self._sent = side.record_event()

    def fetch(self, band: torch.Tensor, device: torch.device) -> "Arriving":
        return Arriving(band, device, self._side(device))

    def _side(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


class Arriving:
    """A band on its way to `device`."""

    def __init__(self, band: torch.Tensor, device: torch.device, side: torch.cuda.Stream | None) -> None:
        self._side = side
        with self._on_side():
            self._copy = band.to(device, non_blocking=True, copy=True)
        self._done = None if side is None else side.record_event()

    def _on_side(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def here(self) -> torch.Tensor:
        if self._done is not None:
            reader = torch.cuda.current_stream(self._copy.device)
            reader.wait_event(self._done)
            self._copy.record_stream(reader)
        return self._copy


class _Parked:
    """A map in bands of rows on the host, read from `device`."""

    def __init__(
        self, link: Link, device: torch.device, cuts: Sequence[tuple[int, int]], bands: Sequence[torch.Tensor]
    ) -> None:
        self.link = link
        self.device = device
        self.cuts = cuts
        self.bands = bands
        self._near: dict[int, Arriving] = {}

    def read(self, top: int, bottom: int) -> torch.Tensor:
        """Rows `top` to `bottom` on the device; the band behind them starts to travel, too."""
        wanted = [i for i, (first, last) in enumerate(self.cuts) if first < bottom and top < last]
        if not wanted:
            return torch.empty_like(self.bands[0][:, :, :0], device=self.device)
        ahead = [wanted[-1] + 1] if wanted[-1] + 1 < len(self.cuts) else []
        self._near = {i: self._near.get(i) or self.link.fetch(self.bands[i], self.device) for i in (*wanted, *ahead)}
        parts = []
        for i in wanted:
            first, last = self.cuts[i]
            parts.append(self._near[i].here()[:, :, max(top - first, 0) : min(bottom, last) - first])
        if not ahead:
            self._near = {}
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def samples(self, which: slice) -> "_Parked":
        return _Parked(self.link, self.device, self.cuts, [band[which] for band in self.bands])


class OffMap(torch.Tensor):
    """What `Waiting` and `Joined` share: tensors without memory of their own whose reads the subclass answers."""

    link: Link
    _here: torch.Tensor | None  # all of it, on the device

    @staticmethod
    def __new__(cls, shape: Sequence[int], like: torch.Tensor, *_: object) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        return made

    @property
    @abstractmethod
    def away(self) -> bool:
        """Whether a part of the map is not on the device."""

    @abstractmethod
    def leave(self) -> None:
        """Free what the map holds on the device."""

    @abstractmethod
    def whole(self) -> torch.Tensor:
        """The map on its device, where it stays until it is told to leave."""

    @abstractmethod
    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows `top` to `bottom` on the device."""

    @abstractmethod
    def samples(self, which: slice) -> torch.Tensor:
        """``map[which]``; of a map that is away, another one that is."""

    def copy_into(self, target: torch.Tensor) -> None:
        for top, bottom in self.link.cuts(self):
            target[:, :, top:bottom] = self.rows(top, bottom)

    def fetched(self) -> torch.Tensor:
        """The map on its device, for one reader alone."""
        if self._here is not None:
            return self._here
        plane = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self.copy_into(plane)
        return plane

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN_WITHOUT_DATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        result = _SPECIAL[func](func, *args, **kwargs) if func in _SPECIAL else NotImplemented
        if result is NotImplemented:
            args, kwargs = tree_map_only(OffMap, _whole, (args, kwargs))
            return func(*args, **kwargs)
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(OffMap, _whole, (args, kwargs or {}))
        return func(*args, **kwargs)


class Waiting(OffMap):
    """One map: on its device until `leave`, then on the host until something needs all of it."""

    def __init__(self, shape: Sequence[int], like: torch.Tensor, link: Link, place: "torch.Tensor | _Parked") -> None:
        self.link = link
        self._here = place if isinstance(place, torch.Tensor) else None
        self._parked = None if isinstance(place, torch.Tensor) else place

    @classmethod
    def on_device(cls, plane: torch.Tensor, link: Link) -> "Waiting":
        return cls(plane.shape, plane, link, plane)

    @classmethod
    def on_host(cls, bands: Iterator[torch.Tensor], like: torch.Tensor, link: Link) -> "Waiting":
        """From bands on the device, made one by one and cut as ``link.cuts(like)`` says."""
        kept = []
        for band in bands:
            kept.append(link.send(band))
        link.settle(like.device)
        shape = (*band.shape[:2], like.shape[2], band.shape[3])
        return cls(shape, band, link, _Parked(link, like.device, link.cuts(like), kept))

    @property
    def away(self) -> bool:
        return self._here is None

    def leave(self) -> None:
        if self._here is not None:
            plane = self._here
            bands = (plane[:, :, top:bottom] for top, bottom in self.link.cuts(plane))
            self._parked = Waiting.on_host(bands, plane, self.link)._parked
            self._here = None

    def whole(self) -> torch.Tensor:
        self._here, self._parked = self.fetched(), None
        return self._here

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        return self._parked.read(top, bottom) if self._parked else self.whole()[:, :, top:bottom]

    def samples(self, which: slice) -> torch.Tensor:
        if self._parked is None:
            return self.whole()[which]
        shape = (len(range(*which.indices(len(self)))), *self.shape[1:])
        return Waiting(shape, self, self.link, self._parked.samples(which))


class Joined(OffMap):
    """Maps side by side, along their channels (`along` 1) or as the samples of a batch (`along` 0)."""

    def __init__(self, shape: Sequence[int], like: torch.Tensor, parts: Sequence[torch.Tensor], along: int) -> None:
        self.parts = list(parts)
        self.along = along
        self.link = next(part.link for part in parts if isinstance(part, OffMap))
        self._here = None

    @classmethod
    def of(cls, parts: Sequence[torch.Tensor], along: int) -> "Joined":
        shape = list(parts[0].shape)
        shape[along] = sum(part.shape[along] for part in parts)
        return cls(shape, parts[0], parts, along)

    @property
    def away(self) -> bool:
        return any(isinstance(part, OffMap) and part.away for part in self.parts)

    def leave(self) -> None:
        for part in self.parts:
            if isinstance(part, OffMap):
                part.leave()

    def whole(self) -> torch.Tensor:
        if self._here is None:
            self._here = self.fetched()
            self.leave()
            self.parts = []
        return self._here

    def copy_into(self, target: torch.Tensor) -> None:
        start = 0
        for part in self.parts:
            size = part.shape[self.along]
            place = target.narrow(self.along, start, size)
            start += size
            if isinstance(part, OffMap):
                part.copy_into(place)
            else:
                place.copy_(part)

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        if self._here is not None:
            return self._here[:, :, top:bottom]
        return torch.cat([_rows(part, top, bottom) for part in self.parts], dim=self.along)

    def samples(self, which: slice) -> torch.Tensor:
        start, stop, _ = which.indices(len(self))
        first = 0
        for part in self.parts if self.along == 0 else ():
            if (first, first + len(part)) == (start, stop):
                return part
            first += len(part)
        return self.whole()[which]


def _whole(plane: OffMap) -> torch.Tensor:
    return plane.whole()


def _rows(plane: torch.Tensor, top: int, bottom: int) -> torch.Tensor:
    return plane.rows(top, bottom) if isinstance(plane, OffMap) else plane[:, :, top:bottom]


def _index(func: object, plane: Any, index: object) -> Any:
    """``map[:, :, top:bottom]`` and ``map[first:last]``."""
    match index:
        case slice(step=None):
            return plane.samples(index)
        case (slice(start=None, stop=None, step=None), slice(start=None, stop=None, step=None), slice(step=None)):
            return plane.rows(*index[2].indices(plane.shape[2])[:2])
    return NotImplemented


def _concatenate(func: object, tensors: Sequence[torch.Tensor], dim: int = 0, **others: object) -> Any:
    alike = all(part.ndim == 4 and part.dtype == tensors[0].dtype for part in tensors)
    return Joined.of(tensors, 1) if alike and dim in (1, -3) and not others else NotImplemented


def _combine(func: Callable[..., torch.Tensor], *terms: Any, **others: object) -> Any:
    """A sum or product, elementwise, band by band where one of its terms is away."""
    away = [term for term in terms if isinstance(term, OffMap) and term.away]
    maps = [term for term in terms if isinstance(term, torch.Tensor) and term.ndim]
    if others or not away or any(term.shape != away[0].shape for term in maps):
        return NotImplemented
    plane = away[0]

    def band(top: int, bottom: int) -> torch.Tensor:
        return func(
            *(_rows(term, top, bottom) if isinstance(term, torch.Tensor) and term.ndim else term for term in terms)
        )

    return Waiting.on_host((band(*cut) for cut in plane.link.cuts(plane)), plane, plane.link)


def _make_like(func: Callable[..., torch.Tensor], plane: OffMap, *args: Any, **kwargs: Any) -> torch.Tensor:
    return func(torch.empty(0, dtype=plane.dtype, device=plane.device), *args, **kwargs)


def _move(func: object, plane: OffMap, *args: Any, **kwargs: Any) -> Any:
    """``map.to(...)`` where nothing changes, as helpers that see to the device of arguments call it."""
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    same_device = device is None or (device.type == plane.device.type and device.index in (None, plane.device.index))
    same = same_device and dtype in (None, plane.dtype) and memory_format is None and not kwargs.get("copy")
    return plane if same else NotImplemented


_TENSOR: Any = torch.Tensor
_KNOWN_WITHOUT_DATA = {
    *(getattr(_TENSOR, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")),
    *(getattr(_TENSOR, name).__get__ for name in ("is_cuda", "is_meta", "is_sparse", "is_quantized", "is_leaf")),
    *(getattr(_TENSOR, name) for name in ("size", "dim", "numel", "nelement", "element_size", "__len__", "ndimension")),
    *(getattr(_TENSOR, name) for name in ("is_floating_point", "is_complex", "get_device")),
    *(torch.numel, torch.is_floating_point, torch.is_complex),
}
_SPECIAL: dict[Any, Callable[..., Any]] = {
    _TENSOR.__getitem__: _index,
    _TENSOR.to: _move,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _concatenate),
    **dict.fromkeys((_TENSOR.new_empty, _TENSOR.new_zeros, _TENSOR.new_full, _TENSOR.new_ones), _make_like),
    **dict.fromkeys((torch.add, _TENSOR.add, _TENSOR.__add__, _TENSOR.__radd__), _combine),
    **dict.fromkeys((torch.mul, _TENSOR.mul, _TENSOR.__mul__, _TENSOR.__rmul__), _combine),
}
