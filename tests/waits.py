"""What would make the host wait for a device, or fail there, told without one: by calls on torch's meta device.

A wait stops everything: the device has nothing to do until the host has asked for more. torch makes the host wait for
numbers that are read, which fails on meta, and for numbers and tensors that are brought there in passing, which is seen
here. So is what is asked of tensors on two devices at once, of which most fails on a GPU alone.
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import largerespatch
from largerespatch.core.families import families_in
from largerespatch.core.pieces import rehearsal
from largerespatch.memory.estimate import as_called, play

OURS, TORCHS = (str(Path(each.__file__).parent) for each in (largerespatch, torch))
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
MAKE = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)  # of Python's numbers
INDEX = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


def waits(pipe, stage, width, height, **options):
    """Where our code, patched, would wait in a stage."""
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            model.to("meta")
    models, found = list(families_in(pipe).values()), Counter()
    patch = largerespatch.LargeResPatch(pipe, width, height, memory_limit=None, **options)
    with patch, rehearsal(), torch.no_grad(), as_called(stage, models, pipe), _Calls(found), _Operations(found):
        play(stage, models, pipe, height, width)
    return found


def _note(found, what):
    """If it is our code that asks."""
    frame = sys._getframe(1)
    while (path := frame.f_code.co_filename) == __file__ or path.startswith(TORCHS):
        frame = frame.f_back
    if path.startswith(OURS):
        found[f"{what}, {path[len(OURS) + 1 :]}: {frame.f_code.co_name}"] += 1


def _device(each):
    """Where a tensor's numbers are; a single one from the host is passed with the call."""
    return each.device.type if isinstance(each, torch.Tensor) and (each.is_meta or each.ndim) else None


class _Calls(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in MAKE and result.is_meta and not isinstance(args[-1], torch.Tensor):
            _note(self.found, "numbers brought")
        if func in INDEX and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(each, list) for each in index):
                _note(self.found, "indices brought")
        return result


class _Operations(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if operation in COPIES:
            devices = {_device(each) for each in (*args[:2], result)} - {None}
            if len(devices) > 1 and not (kwargs.get("non_blocking") or any(each is True for each in args)):
                _note(self.found, "a tensor brought")
        elif len({_device(each) for each in tree_leaves((args, kwargs))} - {None}) > 1:
            _note(self.found, f"two devices in {operation}")
        return result
