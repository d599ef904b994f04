"""Count live bytes per device; on tensors without data, where "meta" stands for an accelerator, without any memory."""

import weakref
from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from largerespatch.memory.weightless import WithoutData


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, per type of device, until freed; `peak` is the most at once."""

    def __init__(self):
        super().__init__()
        self.now, self.peak = Counter(), Counter()
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tensors((args, tuple((kwargs or {}).values()))):
            self._known.add(tensor.untyped_storage())  # not ours: a view of it is no new memory
        result = func(*args, **(kwargs or {}))
        for tensor in tensors(result):
            self._count(tensor.untyped_storage(), tensor.device.type)
        return result

    def _count(self, storage, device):
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now[device] += size
        self.peak[device] = max(self.peak[device], self.now[device])
        weakref.finalize(storage, self.now.subtract, {device: size})


def tensors(tree):
    """Those in what an operation is given or gives."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for each in tree:
            yield from tensors(each)


class _EmptyAttention(TorchFunctionMode):
    """On "meta" attention would fall apart into its quadratic form; fused kernels hold no more than their output."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return args[0].new_empty(*args[0].shape[:-1], args[2].shape[-1])
        return func(*args, **(kwargs or {}))


@contextmanager
def fake():
    """Inside, tensors have no data."""
    with WithoutData("meta"), _EmptyAttention():
        yield
