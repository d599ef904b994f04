"""Tensors without data: they have a shape, a layout, a dtype and a device, and an operation on them makes others.

They do what fake tensors of torch do, for a tenth of the time, since no more is asked of them: the memory of one is a
storage on ``meta``, and what an operation makes of arguments that look the same is worked out once. Those of an
accelerator are tensors on ``meta``; those that are elsewhere are `Weightless`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from .counting import LiveBytes, makes_views

_META, _HOST = torch.device("meta"), torch.device("cpu")


class Look(NamedTuple):
    """All of a tensor that memory may depend on."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Look":
        return cls(tensor.size(), tensor.stride(), tensor.dtype, tensor.device)

    def made(self) -> torch.Tensor:
        """A new tensor that looks like this."""
        plain = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=_META)
        return plain if self.device == _META else Weightless(plain, self.device)


class Weightless(torch.Tensor):
    """Looks like a tensor on `device`. Its memory is that of `plain`, a tensor on ``meta``."""

    plain: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, plain: torch.Tensor, device: torch.device) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            plain.size(),
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            device=device,
        )
        made.plain = plain
        return made

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.plain.untyped_storage()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run(func, types, args, kwargs or {})


class WithoutData(LiveBytes):  # type: ignore[no-untyped-call]
    """Inside, whatever makes a tensor makes one without data; those on `device` count as if they had any.

    So does the workspace of convolutions, but not on the host: cuDNN lays input, kernel and result out anew.
    """

    def run(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return run(func, types, args, kwargs)

    def new(self, look: Look) -> torch.Tensor:
        """A new tensor that looks like this, counted. No operation is looked up for it, as for others."""
        with torch._C._DisableTorchDispatch():
            made = look.made()
        self._forget()
        self._note(made)
        return made

    def _measure_again(self) -> None:
        """What has no data does not shrink."""

    def workspace(self, func: Any, args: tuple[Any, ...], result: Any) -> int:
        if func is not torch.ops.aten.convolution.default or self.device == _HOST.type:
            return 0
        plane, kernel = args[:2]
        pointwise = kernel.shape[2:].numel() == 1  # a product of matrices as it stands
        return 0 if pointwise else sum(each.numel() * each.element_size() for each in (plane, kernel, result))


@cache
def _writes(func: Any) -> bool:
    """Whether an operation writes to its first argument, and gives that back."""
    arguments = func._schema.arguments
    return bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write


def run(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on tensors of which some are without data."""
    if not _KNOWN.issuperset(types):
        return NotImplemented  # a subclass that knows what to do comes next
    if _writes(func):
        return args[0]
    if makes_views(func):
        device = args[0].device
        if device == _META:
            return func(*args, **kwargs)
        return _each(func(*_plain(args), **_plain(kwargs)), torch.Tensor, lambda plain: Weightless(plain, device))
    key = func, looks(args), looks(tuple(kwargs.items())) if kwargs else ()
    if key not in _MADE:
        if len(_MADE) >= _MOST_MADE:
            _MADE.clear()
        _MADE[key] = _work_out(func, args, kwargs)
    return _each(_MADE[key], Look, Look.made)


_KNOWN = {torch.Tensor, nn.Parameter, Weightless}
_MADE: dict[Any, Any] = {}
_MOST_MADE = 2**14

# Norms: how their result lies, and the size of the statistics beside it. Torch takes a millisecond to tell.
_Sizes = Callable[..., tuple[int, ...]]
_NORMS: dict[Any, tuple[torch.memory_format, _Sizes]] = {
    torch.ops.aten.native_group_norm.default: (
        torch.preserve_format,
        lambda plane, weight, bias, batch, channels, cells, groups, eps: (batch, groups),
    ),
    torch.ops.aten.native_layer_norm.default: (
        torch.contiguous_format,
        lambda tokens, shape, weight, bias, eps: (*tokens.shape[: -len(shape)], *[1] * len(shape)),
    ),
    # They are given.
    torch.ops.aten.native_batch_norm.default: (torch.preserve_format, lambda plane, *others: (0,)),
}

# Operations that make of tensors that look the same one that looks like them, where these leave no gaps.
_BY_VALUE = {
    getattr(torch.ops.aten, name)
    for name in ("add", "sub", "mul", "div", "neg", "exp", "sqrt", "rsqrt", "clamp", "silu", "gelu", "relu", "sigmoid")
}


def _looks_like(args: Any) -> Look | None:
    """How all of the tensors look that are given, if they look the same, leave no gaps and are not of whole numbers."""
    given = [each for each in args if isinstance(each, torch.Tensor)]
    first, *others = {Look.of(each) for each in given}
    formats = (torch.contiguous_format, torch.channels_last) if len(first.size) == 4 else (torch.contiguous_format,)
    gapless = any(given[0].is_contiguous(memory_format=layout) for layout in formats)
    return first if gapless and not others and first.dtype.is_floating_point else None


def _work_out(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation makes, each tensor as its look. It is not on the host where one of its arguments is not."""
    if func.overloadpacket in _BY_VALUE and (look := _looks_like(args)):
        return look
    if func in _NORMS and not kwargs and not any(each is True for each in args):
        layout, statistics_of = _NORMS[func]
        given = _plain(args[0])
        precise = torch.promote_types(given.dtype, torch.float32)
        statistics = torch.empty(statistics_of(*args), dtype=precise, device=_META)
        made = (torch.empty_like(given, memory_format=layout), statistics, statistics)
        return tuple(Look.of(each)._replace(device=args[0].device) for each in made)
    devices: set[torch.device] = set()
    _each((*args, *kwargs.values()), torch.Tensor, lambda tensor: devices.add(tensor.device))
    device = torch.device(kwargs.get("device") or next(iter(devices - {_HOST}), _HOST))
    if "device" in kwargs:
        kwargs = kwargs | {"device": _META}
    made = func(*_plain(args), **_plain(kwargs))
    return _each(made, torch.Tensor, lambda tensor: Look.of(tensor)._replace(device=device))


def _each(result: Any, kind: Any, change: Callable[[Any], Any]) -> Any:
    """A tree of tuples and lists, as an operation is given or gives, with each thing of a kind changed."""
    if isinstance(result, kind):
        return change(result)
    if isinstance(result, tuple | list):
        return type(result)([_each(each, kind, change) for each in result])
    return result


def _plain(tree: Any) -> Any:
    if isinstance(tree, Weightless):
        return tree.plain
    if isinstance(tree, torch.Tensor):
        return torch.empty_strided(tree.size(), tree.stride(), dtype=tree.dtype, device=_META)
    if isinstance(tree, tuple | list):
        return type(tree)([_plain(each) for each in tree])
    if isinstance(tree, dict):
        return {name: _plain(value) for name, value in tree.items()}
    return tree


def looks(tree: Any) -> Any:
    """Something to be looked up by. (A number and a truth value that are equal are not the same argument.)"""
    if isinstance(tree, torch.Tensor):
        return tree.size(), tree.stride(), tree.dtype, tree.device
    if isinstance(tree, tuple | list):
        return tuple(map(looks, tree))
    return (type(tree), tree) if isinstance(tree, bool | float) else tree
