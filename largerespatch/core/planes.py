"""A feature map that is read and written by rows, wherever it lives: what all kinds of them have in common.

A `Map` is a ``[B, C, H, W]`` tensor whose memory may be elsewhere. Whoever reads rows of it (``map[:, :, top:bottom]``)
gets just these, and any operation that no kind of map knows better brings the whole map to its device. So nothing can
read a wrong value, and what is not read costs the device no memory. Exact.

`fetch`, `part` and `whole` read plain tensors and maps alike; ``plane[:, :, rows, columns] = values`` writes either.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch.utils._pytree import tree_map_only

from .hosts import Host
from .pieces import assemble
from .tilings import Run, Tile, around

_TENSOR: Any = torch.Tensor
_KNOWN_WITHOUT_DATA = {
    *(getattr(_TENSOR, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")),
    *(getattr(_TENSOR, name).__get__ for name in ("is_cuda", "is_meta", "is_sparse", "is_quantized", "is_leaf")),
    *(getattr(_TENSOR, name) for name in ("size", "dim", "numel", "nelement", "element_size", "__len__", "ndimension")),
    *(getattr(_TENSOR, name) for name in ("is_floating_point", "is_complex", "get_device")),
    *(torch.numel, torch.is_floating_point, torch.is_complex),
}

# What maps do otherwise than by being brought to their device: `core.maps` says. NotImplemented: in this case not.
OPERATIONS: dict[Any, Callable[..., Any]] = {}


class Map(torch.Tensor):
    """A map ``[B, C, H, W]`` without memory of its own, whose reads the subclass answers with tensors on `device`."""

    host: Host | None
    passing = False  # whether it has a single reader, which may write over it

    @staticmethod
    def __new__(cls, shape: Sequence[int], like: torch.Tensor, *_: object, **__: object) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        return made

    @abstractmethod
    def fetch(self, runs: Sequence[Run]) -> Iterator[torch.Tensor]:
        """Runs of rows ``[B, C, h, W]``, in turn; the next one may be on its way while one is used.

        A run may be the very memory of the map. Rows may be written over once the run that they are in was yielded.
        """

    @property
    def away(self) -> bool:
        """Whether a part of the map is not on the device."""
        return True

    def leave(self) -> None:
        """Free what the map holds on the device, where it can leave it."""

    def part(self, tile: Tile) -> torch.Tensor:
        """A tile of the map, ``[B, C, h, w]``."""
        return next(self.fetch([(tile.top, tile.bottom)]))[..., tile.columns]

    def write(self, tile: Tile, values: torch.Tensor) -> None:
        """`values` into a tile of the map."""
        self.whole()[:, :, tile.rows, tile.columns] = values

    def claim(self) -> "Map":
        """This map for its one reader, who may write over it: whoever else holds it holds nothing from then on."""
        return self

    def whole(self) -> torch.Tensor:
        """The map on its device, where it stays until it is told to leave."""
        return self.copied()

    def copied(self) -> torch.Tensor:
        """The map on its device, for one reader alone. It comes run by run: in two layouts at once it is too large."""
        plane = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        copy(self, plane, self.host or Host())
        return plane

    def samples(self, which: slice) -> torch.Tensor:
        """``map[which]``; of a map that is away, another one that is."""
        return self.whole()[which]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN_WITHOUT_DATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        result = OPERATIONS[func](func, *args, **kwargs) if func in OPERATIONS else NotImplemented
        if result is NotImplemented:
            args, kwargs = tree_map_only(Map, whole, (args, kwargs))
            return func(*args, **kwargs)
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(Map, whole, (args, kwargs or {}))
        return func(*args, **kwargs)


def fetch(plane: torch.Tensor, runs: Sequence[Run]) -> Iterator[torch.Tensor]:
    """Runs of rows of a tensor or map ``[B, C, H, W]``, in turn, on the device. See `Map.fetch`."""
    if isinstance(plane, Map):
        return plane.fetch(runs)
    return (plane[:, :, top:bottom] for top, bottom in runs)


def part(plane: torch.Tensor, *tiles: Tile) -> torch.Tensor:
    """A tile of a tensor or map ``[B, C, H, W]``, on the device; several of one size become samples of a batch.

    What of a tile lies over an edge comes from the opposite one.
    """
    return concatenated([_around(plane, tile) for tile in tiles], dim=0)


def _around(plane: torch.Tensor, tile: Tile) -> torch.Tensor:
    height, width = plane.shape[-2:]
    rows, columns = around(tile.top, tile.bottom, height), around(tile.left, tile.right, width)
    inside = ([Tile(top, left, bottom, right) for left, right in columns] for top, bottom in rows)
    return concatenated([concatenated([_within(plane, each) for each in band], dim=3) for band in inside], dim=2)


def _within(plane: torch.Tensor, tile: Tile) -> torch.Tensor:
    return plane.part(tile) if isinstance(plane, Map) else plane[:, :, tile.rows, tile.columns]


def concatenated(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """One after another; a single one as it is, not a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def whole(plane: torch.Tensor) -> torch.Tensor:
    """All of a tensor or map, on the device."""
    return plane.whole() if isinstance(plane, Map) else plane


def copy(source: torch.Tensor, target: Any, host: Host) -> Any:
    """Copies a map into another one, in the runs in which maps travel; returns `target`."""
    return assemble(
        host.cuts(source),
        lambda run, rows: rows,
        place=lambda run: (slice(None), slice(None), slice(*run)),
        into=target,
        read=partial(fetch, source),
    )
