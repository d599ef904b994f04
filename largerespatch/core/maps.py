"""The kinds of maps: `StoredMap` has its memory on its device or on the host, `JoinedMap` is several maps side by side,
`ComputedMap` is computed anew whenever it is read, `TurnedMap` has its channels last. Exact.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .hosts import Host, HostRows, by_samples
from .pieces import side_by_side
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
        if len(self.parts) == 1:
            return fetch(self.parts[0], runs)
        rows = side_by_side(*(fetch(part, runs) for part in self.parts))
        return map(partial(torch.cat, dim=self.along), rows)

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
