"""What can be done to maps without bringing them to their device.

Rows are read, sums and products formed run by run; they live where their terms do. Exact.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .hosts import Host
from .maps import ComputedMap, JoinedMap, StoredMap, TurnedMap
from .pieces import assemble, side_by_side
from .planes import OPERATIONS, Map, fetch, whole
from .tilings import Run, Tile

_TENSOR: Any = torch.Tensor


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
        read=lambda runs: side_by_side(*(fetch(plane, runs) for plane in planes)),
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
