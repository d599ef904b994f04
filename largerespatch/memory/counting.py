"""Counting bytes: of tensors alive, in words, and from words."""

import math
import operator
import re
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

R = TypeVar("R")
Sizes = dict[str, int]  # bytes by types of device

GIB = 2**30
MOST_BYTES = 2**62  # of which an index of bytes still has room for double

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def gibibytes(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


def parse_bytes(text: str) -> int | None:
    """Bytes of ``"8GiB"``, ``"8 GB"``, ``"512MiB"`` or ``"1.5GiB"``; None for what is not such an amount."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]+)\s*", text, flags=re.ASCII)
    if match is None or match[2].upper() not in _UNITS:
        return None
    size = float(match[1]) * _UNITS[match[2].upper()]
    return math.floor(size) if math.isfinite(size) else None


def amount(option: str, value: object) -> int | str | None:
    """Checks that `value` is an amount such as ``"8GiB"``, a number of bytes, ``"auto"`` or None, and returns it.

    Raises:
        TypeError, ValueError: it is none of these, or no device could hold as much.
    """
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    message = (
        f"{option} must be None, a positive amount such as '8GiB', '7.5 GB' or a whole number of bytes, or 'auto'; got "
        f"{value!r}"
    )
    if isinstance(value, bool):
        raise TypeError(message)
    try:
        found = parse_bytes(value) if isinstance(value, str) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(message) from None
    if found is None or not 0 < found < MOST_BYTES:
        raise ValueError(message)
    return value if isinstance(value, str) else found


class _Storage(NamedTuple):
    reference: "weakref.KeyedRef[int, torch.UntypedStorage]"
    device: str
    counted: int


@cache
def makes_views(func: Any) -> bool:
    """Whether all results of an operation are the memory of its arguments, written to or not."""
    returns = func._schema.returns
    # One view says that it is none: its argument is gone by then.
    return func is torch.ops.aten._unsafe_view.default or all(result.alias_info is not None for result in returns)


class TooManyBytesError(Exception):
    """More bytes were alive than it was worth while to go on for."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that come to life inside the block on devices of type `device` and of the `others`.

    `peaks` says of each type what was alive at most at once, `peak` and `alive` speak of the first alone. What existed
    before, and views of it, count nothing; nor does the private workspace of kernels.

    Raises:
        TooManyBytesError: more than `most` were alive on `device`.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to keep each operation from being compiled takes longer than to count it, and none is."""
        return False

    def __init__(self, device: str, *others: str, most: float = math.inf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.most = most
        self.peaks: Sizes = dict.fromkeys((device, *others), 0)
        self._alive = dict(self.peaks)  # upper bounds: a storage may have been shrunk or be gone since it was counted
        self._known: dict[int, _Storage] = {}
        self._gone: list[weakref.KeyedRef[int, torch.UntypedStorage]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self.run(func, types, args, kwargs or {})
        if makes_views(func):
            return result
        self._forget()
        for tensor in (result,) if isinstance(result, torch.Tensor) else _tensors(result):
            self._note(tensor)
        if workspace := self.workspace(func, args, result):
            self.rise({self.device: workspace})
        return result

    def run(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation, whose result is then counted."""
        return func(*args, **kwargs)

    def workspace(self, func: Any, args: tuple[Any, ...], result: Any) -> int:
        """Bytes of the first device that an operation takes beside its result. Those of real ones are not seen."""
        return 0

    @property
    def peak(self) -> int:
        return self.peaks[self.device]

    @property
    def alive(self) -> int:
        """Bytes alive now."""
        return self.all_alive()[self.device]

    def all_alive(self) -> Sizes:
        """Bytes alive now, of each type of device."""
        self._forget()
        self._measure_again()
        return self._alive.copy()

    def peaks_of(self, work: Callable[[], R]) -> tuple[R, Sizes]:
        """The result of `work`, and the most bytes that were alive during it."""
        before, self.peaks = self.peaks, self.all_alive()
        result = work()
        during, self.peaks = self.peaks, {device: max(self.peaks[device], peak) for device, peak in before.items()}
        return result, during

    def rise(self, sizes: Sizes) -> None:
        """Count so many bytes more than are alive now, for a moment."""
        alive = self.all_alive()
        for device, size in sizes.items():
            self.peaks[device] = max(self.peaks[device], alive[device] + size)
        if self.peak > self.most:
            raise TooManyBytesError

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, device = storage._cdata, tensor.device.type
        if key in self._known or device not in self._alive:
            return
        # No function of ours is called when a storage dies: an interrupt that comes in there is lost.
        reference = weakref.KeyedRef(storage, self._gone.append, key)
        size = storage.nbytes()
        self._known[key] = _Storage(reference, device, size)
        self._alive[device] += size
        if self._alive[device] > self.peaks[device]:
            self.rise({device: 0})

    def _forget(self) -> None:
        while self._gone:
            _, device, counted = self._known.pop(self._gone.pop().key)
            self._alive[device] -= counted

    def _measure_again(self) -> None:
        for key, (reference, device, counted) in list(self._known.items()):
            storage = reference()
            if storage is not None and counted != (size := min(counted, storage.nbytes())):
                self._known[key] = _Storage(reference, device, size)
                self._alive[device] += size - counted


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class KernelsInOne(TorchFunctionMode):
    """Makes attention and linear layers put out an empty result at once, in the layout of the kernels that do so.

    On tensors without data, attention would fall apart into its quadratic form, which no device runs, and a linear
    layer into many small steps, which take the longer part of an estimate.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _has_heads(*args, **kwargs):  # else no kernel takes it
            return _attention(*args, **kwargs)
        if func is F.linear and args[0].is_contiguous():  # others are copied first
            return args[0].new_empty(*args[0].shape[:-1], args[1].shape[0])
        return func(*args, **kwargs)


def _has_heads(query: torch.Tensor, *_: object, **__: object) -> bool:
    return query.ndim > 3


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    *batch, heads, tokens, _channels = query.shape
    result = query.new_empty(*batch, tokens, heads, value.shape[-1])
    query.new_empty(*batch, tokens, heads, dtype=torch.float32)  # the logarithm of each row's sum, dropped by torch
    return result.transpose(-2, -3)
