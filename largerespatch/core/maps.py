"""The kinds of maps: `StoredMap` has its memory on its device or on the host, `JoinedMap` is several maps side by side,
`ComputedMap` is computed anew whenever it is read, `TurnedMap` has its channels last; and what can be done to them
without bringing them to their device.

Rows are read, sums and products formed run by run; they live where their terms do. Exact.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .hosts import Host, HostRows, by_samples
from .pieces import assemble
from .planes import OPERATIONS, Map, copy, fetch, whole
from .tilings import Run, Tile

_TENSOR: Any = torch.Tensor
_PASSED_ON = "this map was passed on: the module that read it has written over it"


class StoredMap(Map):
    """A map with memory: on its device until told to `leave`, then on the host until something needs all of it."""

    def __init__(
        self,
        shape: Sequence[int],
        like: torch.Tensor,
        host: Host | None,
        memory: "torch.Tensor | HostRows | None",
        passing: bool = False,
    ) -> None:
        self.host = host
        self.passing = passing
        self._memory = memory

    @classmethod
    def of(cls, plane: torch.Tensor, host: Host | None = None, passing: bool = False) -> "StoredMap":
        """A map that is on its device."""
        return cls(plane.shape, plane, host, plane, passing)

    @classmethod
    def empty(
        cls, shape: Sequence[int], like: torch.Tensor, host: Host | None = None, passing: bool = False
    ) -> "StoredMap":
        """One that is to be written: on the host, if the device of `like` has one, else there."""
        if host is None or not host.serves(like.device):
            return cls.of(torch.empty(tuple(shape), dtype=like.dtype, device=like.device), host, passing)
        return cls(shape, like, host, HostRows.empty(host, shape, like.dtype, like.device), passing)

    @property
    def away(self) -> bool:
        return isinstance(self._memory, HostRows)

    @property
    def memory(self) -> "torch.Tensor | HostRows":
        if self._memory is None:
            raise RuntimeError(_PASSED_ON)
        return self._memory

    def claim(self) -> "StoredMap":
        taken = StoredMap(self.shape, self, self.host, self.memory, self.passing)
        self._memory = None
        return taken

    def fetch(self, runs: Sequence[Run]) -> Iterator[torch.Tensor]:
        memory, width = self.memory, self.shape[-1]
        if isinstance(memory, HostRows):
            yield from memory.host.fetch(memory, (Tile(top, 0, bottom, width) for top, bottom in runs), _by_channels)
        else:
            yield from (memory[:, :, top:bottom] for top, bottom in runs)

    def part(self, tile: Tile) -> torch.Tensor:
        memory = self.memory
        if isinstance(memory, HostRows):  # the device does not get more than it asked for
            return next(memory.host.fetch(memory, [tile], _by_channels))
        return super().part(tile)

    def write(self, tile: Tile, values: torch.Tensor) -> None:
        memory = self.memory
        if isinstance(memory, HostRows):
            memory.host.store(memory, tile, values)
        else:
            memory[:, :, tile.rows, tile.columns] = values

    def leave(self) -> None:
        if self.host is not None and self.host.serves(self.device) and not self.away:
            rows = StoredMap.empty(self.shape, self, self.host)
            self._memory = copy(whole(self), rows, self.host).memory

    def whole(self) -> torch.Tensor:
        if isinstance(self.memory, HostRows):
            self._memory = self.copied()
        plane = self.memory
        assert isinstance(plane, torch.Tensor)
        return plane

    def samples(self, which: slice) -> torch.Tensor:
        memory = self.memory
        if not isinstance(memory, HostRows):
            return memory[which]
        shape = (len(range(*which.indices(len(self)))), *self.shape[1:])
        return StoredMap(shape, self, self.host, memory.samples(which))

    def delivered(self, stays: bool = False) -> torch.Tensor:
        """A finished map as a plain tensor: on its device, or on the host where it is, is large, and `stays` there."""
        memory = self.memory
        if not isinstance(memory, HostRows):
            return memory.contiguous()
        if stays and memory.host.is_large(self):
            return memory.gather(Tile(0, 0, *self.shape[2:])).contiguous()
        return self.copied().contiguous()


class JoinedMap(Map):
    """Maps side by side, along their channels (`along` 1) or as the samples of a batch (`along` 0)."""

    def __init__(self, shape: Sequence[int], like: torch.Tensor, parts: Sequence[torch.Tensor], along: int) -> None:
        self.parts = list(parts)
        self.along = along
        self.host = next((part.host for part in parts if isinstance(part, Map)), None)

    @classmethod
    def of(cls, parts: Sequence[torch.Tensor], along: int) -> "JoinedMap":
        shape = list(parts[0].shape)
        shape[along] = sum(part.shape[along] for part in parts)
        return cls(shape, parts[0], parts, along)

    @property
    def away(self) -> bool:
        return any(isinstance(part, Map) and part.away for part in self.parts)

    def leave(self) -> None:
        for part in self.parts:
            if isinstance(part, Map):
                part.leave()

    def whole(self) -> torch.Tensor:
        if len(self.parts) > 1 or isinstance(self.parts[0], Map):
            plane = self.copied()
            self.leave()
            self.parts = [plane]
        return self.parts[0]

    def copied(self) -> torch.Tensor:
        plane = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        places = plane.split_with_sizes([part.shape[self.along] for part in self.parts], dim=self.along)
        for part, place in zip(self.parts, places, strict=True):
            copy(part, place, self.host or Host())
        return plane

    def fetch(self, runs: Sequence[Run]) -> Iterator[torch.Tensor]:
        for rows in zip(*(fetch(part, runs) for part in self.parts), strict=True):
            yield rows[0] if len(rows) == 1 else torch.cat(rows, dim=self.along)

    def samples(self, which: slice) -> torch.Tensor:
        start, stop, _ = which.indices(len(self))
        first = 0
        for part in self.parts if self.along == 0 else ():
            if (first, first + len(part)) == (start, stop):
                return part
            first += len(part)
        return self.whole()[which]


class ComputedMap(Map):
    """A map that is computed anew, run by run, each time it is read; `compute` is its `fetch`."""

    host = None

    def __init__(
        self,
        shape: Sequence[int],
        like: torch.Tensor,
        compute: Callable[[Sequence[Run]], Iterator[torch.Tensor]] | None,
        passing: bool = False,
    ) -> None:
        self.compute = compute
        self.passing = passing

    def claim(self) -> "ComputedMap":
        taken, self.compute = ComputedMap(self.shape, self, self.compute, self.passing), None
        return taken

    def fetch(self, runs: Sequence[Run]) -> Iterator[torch.Tensor]:
        if self.compute is None:
            raise RuntimeError(_PASSED_ON)
        return self.compute(runs)


class TurnedMap(Map):
    """A map with its channels last, ``[B, H, W, C]``, as norms over them want it. Turned back it is the same map.

    All else is done to the whole of it.
    """

    host = None

    def __init__(self, shape: Sequence[int], like: torch.Tensor, turned: Map) -> None:
        self.turned = turned

    @classmethod
    def of(cls, plane: Map) -> "TurnedMap":
        batch, channels, height, width = plane.shape
        return cls((batch, height, width, channels), plane, plane)

    @property
    def away(self) -> bool:
        return False

    def whole(self) -> torch.Tensor:
        return self.turned.whole().movedim(1, -1)

    def fetch(self, runs: Sequence[Run]) -> Iterator[torch.Tensor]:
        return fetch(self.whole(), runs)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _TENSOR.movedim and args[1:] == (-1, 1) and args[0].ndim == 4:
            return args[0].turned
        if func in OPERATIONS:  # they know channels where they are first
            args, kwargs = tree_map_only(TurnedMap, whole, (args, kwargs or {}))
            return func(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)


def _by_channels(cells: torch.Tensor) -> torch.Tensor:
    """``[B, C, h, w]`` as convolutions want it, of cells as they come from the host."""
    return by_samples(cells).contiguous()


def taken(plane: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """All of a tensor or map, on the device, and whether its reader may write over it."""
    match plane:
        case StoredMap(passing=True):
            return plane.claim().whole(), True
        case Map(away=True):
            return plane.copied(), True
    return whole(plane), False


def _index(func: object, plane: Map, index: Any) -> Any:
    """``map[:, :, top:bottom]`` and ``map[first:last]``."""
    match index:
        case slice(step=None):
            return plane.samples(index)
        case (slice(start=None, stop=None, step=None), slice(start=None, stop=None, step=None), slice(step=None)):
            top, bottom, _ = index[2].indices(plane.shape[2])
            return next(plane.fetch([(top, bottom)]))
    return NotImplemented


def _put(func: object, plane: torch.Tensor, index: Any, values: Any) -> Any:
    """``map[:, :, top:bottom] = values``, or with columns as well; all else is written to the whole map."""
    if isinstance(plane, ComputedMap):
        raise TypeError("a map that is computed whenever it is read cannot be written to")
    match index:
        case (slice(start=None, stop=None), slice(start=None, stop=None), slice(step=None), *more) if (
            isinstance(plane, Map) and isinstance(values, torch.Tensor) and len(more) < 2
        ):
            top, bottom, _ = index[2].indices(plane.shape[2])
            left, right, _ = (more[0] if more else slice(None)).indices(plane.shape[3])
            tile = Tile(top, left, bottom, right)
            plane.write(tile, whole(values).expand(*plane.shape[:2], *tile.size()))
            return None
    return NotImplemented


def _concatenate(func: object, tensors: Sequence[torch.Tensor], dim: int = 0, **others: object) -> Any:
    alike = all(each.ndim == 4 and each.dtype == tensors[0].dtype for each in tensors)
    return JoinedMap.of(tensors, 1) if len(tensors) > 1 and alike and dim in (1, -3) and not others else NotImplemented


def _combine(func: Callable[..., torch.Tensor], *terms: Any, **others: object) -> Any:
    """A sum or product, elementwise, run by run: in the memory of a term that was passed on, else away as a term is."""
    planes = [term for term in terms if isinstance(term, torch.Tensor) and term.ndim]
    passed = next((term for term in planes if isinstance(term, StoredMap) and term.passing), None)
    away = next((term for term in planes if isinstance(term, Map) and term.away), None)
    first = passed if passed is not None else away
    if others or first is None or (passed is None and first.host is None) or not _alike(first, planes):
        return NotImplemented
    into = None if passed is None else passed.claim()
    return _combined(func, [into if term is passed and into is not None else term for term in terms], first, into)


def _combine_there(func: Callable[..., torch.Tensor], plane: Any, *terms: Any, **others: object) -> Any:
    """The same in the memory of a map that is away, for all who hold it."""
    there = isinstance(plane, StoredMap) and plane.away
    if others or not there or not _alike(plane, [term for term in terms if isinstance(term, torch.Tensor)]):
        return NotImplemented
    return _combined(_COPYING[func], [plane, *terms], plane, plane)


def _combined(func: Callable[..., torch.Tensor], terms: Sequence[Any], first: Map, into: Map | None) -> Any:
    def combined(run: Run, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        given = iter(rows)
        return func(*(next(given) if isinstance(term, torch.Tensor) and term.ndim else term for term in terms))

    host = first.host or Host()
    planes = [term for term in terms if isinstance(term, torch.Tensor) and term.ndim]
    return assemble(
        host.cuts(first),
        combined,
        place=lambda run: (slice(None), slice(None), slice(*run)),
        make=lambda rows: StoredMap.empty((*rows.shape[:2], *first.shape[2:]), rows, host),
        into=into,
        read=lambda runs: zip(*(fetch(plane, runs) for plane in planes), strict=True),
    )


# What makes a new map of what the other writes to its first term.
_COPYING = dict.fromkeys((_TENSOR.add_, _TENSOR.__iadd__), torch.add)
_COPYING |= dict.fromkeys((_TENSOR.mul_, _TENSOR.__imul__), torch.mul)


def _alike(plane: Map, others: Sequence[torch.Tensor]) -> bool:
    """Whether others are as `plane` is, but for one channel in place of many."""
    batch, channels, *size = plane.shape
    shapes = ((batch, channels, *size), (batch, 1, *size))
    return all(tuple(each.shape) in shapes and each.dtype == plane.dtype for each in others)


def _turn(func: object, plane: Map, *axes: Any, **named: Any) -> Any:
    """``map.movedim(1, -1)``"""
    return TurnedMap.of(plane) if axes == (1, -1) and not named else NotImplemented


def _activate(func: Callable[..., torch.Tensor], plane: Map, *more: Any, **named: Any) -> Any:
    """``relu(map)``, of rows when they are read: the map itself may be wanted, too."""
    return (
        NotImplemented if more or named else ComputedMap(plane.shape, plane, lambda runs: map(func, plane.fetch(runs)))
    )


def _make_like(func: Callable[..., torch.Tensor], plane: Map, *args: Any, **kwargs: Any) -> torch.Tensor:
    return func(torch.empty(0, dtype=plane.dtype, device=plane.device), *args, **kwargs)


def _move(func: object, plane: Map, *args: Any, **kwargs: Any) -> Any:
    """``map.to(...)`` where nothing changes, as helpers that see to the device of arguments call it."""
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    same_device = device is None or (device.type == plane.device.type and device.index in (None, plane.device.index))
    same = same_device and dtype in (None, plane.dtype) and memory_format is None and not kwargs.get("copy")
    return plane if same else NotImplemented


OPERATIONS |= {
    _TENSOR.__getitem__: _index,
    _TENSOR.__setitem__: _put,
    _TENSOR.to: _move,
    _TENSOR.movedim: _turn,
    **dict.fromkeys((torch.relu, _TENSOR.relu), _activate),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _concatenate),
    **dict.fromkeys((_TENSOR.new_empty, _TENSOR.new_zeros, _TENSOR.new_full, _TENSOR.new_ones), _make_like),
    **dict.fromkeys((torch.add, _TENSOR.add, _TENSOR.__add__, _TENSOR.__radd__), _combine),
    **dict.fromkeys(_COPYING, _combine_there),
    **dict.fromkeys((torch.mul, _TENSOR.mul, _TENSOR.__mul__, _TENSOR.__rmul__), _combine),
}
