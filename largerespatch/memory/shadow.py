"""A pipeline without weights: same modules, weightless tensors. What runs on it takes no memory and next to no time."""

import copy
import gc
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..core.families import Family, families_in
from ..core.modules import modules_of
from ..core.patching import PatchStack
from ..core.pieces import rehearsal
from ..core.tilings import PHASES
from ..core.weights import offload_hooks
from .counting import KernelsInOne
from .devices import HOST, device_of, execution_device
from .run_once import ATOMS, RunOnce, makes_of
from .weightless import Look, WithoutData

# Weightless tensors on this stand for all accelerators.
ACCELERATOR = "meta"

# What libraries of an accelerator take for themselves once: cuBLAS, on an H200, two workspaces of 32 MiB.
LIBRARIES = 2**26

# Attributes through which others reach into a module's calls; some hold the weights themselves.
_HOOKS = ("_hf_hook", "_old_forward", "_diffusers_hook")
_HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def _place(device: torch.device) -> str:
    return HOST if device.type == HOST else ACCELERATOR


class _InPlaceOfData(TorchFunctionMode):
    """Makes `copy.deepcopy` put weightless tensors on `device` in the place of tensors."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.Tensor.clone, torch.Tensor.__deepcopy__):  # parameters are copied by the former
            return func(*args, **(kwargs or {}))
        tensor = args[0]
        return Look.of(tensor)._replace(device=self.device).made()


def _compute_dtype(module: nn.Module) -> torch.dtype | None:
    """What layerwise casting casts the weights of `module` to for a call."""
    return next((hook.compute_dtype for hook in offload_hooks(module) if hasattr(hook, "compute_dtype")), None)


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What `copy.deepcopy` makes of a model, in less than half the time: most of what modules hold are numbers and
    empty containers, for each of which it takes a detour."""
    plain = [module for module in modules_of(model) if not _copies_itself(type(module))]
    copies = [module.__new__(type(module)) for module in plain]
    memo.update((id(module), made) for module, made in zip(plain, copies, strict=True))
    for module, made in zip(plain, copies, strict=True):
        for name, value in vars(module).items():
            if type(value) in _CONTAINERS and not value:
                vars(made)[name] = value.copy()
            else:
                vars(made)[name] = value if type(value) in ATOMS else copy.deepcopy(value, memo)
    return copy.deepcopy(model, memo)


_CONTAINERS = (dict, OrderedDict, set)


def _copies_itself(kind: type) -> bool:
    ways = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__")
    return any(getattr(kind, way, None) is not getattr(nn.Module, way, None) for way in ways)


def _without_weights(model: nn.Module, stacks: list[PatchStack]) -> nn.Module:
    """A weightless copy of a model, as its class made it: without replacements, hooks and compiled calls."""
    # What `deepcopy` finds in its memo it takes for copied.
    memo: dict[int, Any] = {}
    for module in modules_of(model):
        for attribute in ("forward", "_compiled_call_impl", *_HOOKS):
            if vars(module).get(attribute) is not None:
                memo[id(vars(module)[attribute])] = None
    with _InPlaceOfData(_place(device_of(model))):
        shadow = _copied(model, memo)
    for stack in stacks:
        stack.undo_in(memo)
    for original, module in zip(modules_of(model), modules_of(shadow), strict=True):
        for attribute in ("forward", *_HOOKS):
            vars(module).pop(attribute, None)
        for attribute in _HOOK_DICTS:
            vars(module)[attribute].clear()
        module._compiled_call_impl = None
        dtype = _compute_dtype(original)
        if dtype is not None:
            _cast(module, dtype)
    return shadow


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Not by `Module.to`, which cannot exchange tensors that hold no data."""
    for each in module.modules():
        for name, weight in each._parameters.items():
            if weight is not None and weight.is_floating_point():
                each._parameters[name] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Inside, nothing is searched for cycles of garbage, which would take longer than the work: it leaves few."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Peaks(NamedTuple):
    """The most bytes alive at once: on the pipeline's device, and in the host's memory, if that is elsewhere."""

    device: int
    host: int


class Shadow:
    """`pipe` with weightless copies of its models of known families; it is only read.

    `stacks` hold the replacements that are on it now. The copies have none of them, nor any hook or own ``forward``.
    """

    def __init__(self, pipe: Any, stacks: list[PatchStack]) -> None:
        self.place = _place(execution_device(pipe))
        self.models: dict[str, tuple[nn.Module, Family]] = {
            name: (_without_weights(model, stacks), family) for name, (model, family) in families_in(pipe).items()
        }
        # Each block takes another of the tilings than the one before.
        self._phases = {
            block: i % PHASES
            for model, family in self.models.values()
            for i, block in enumerate(family.repeated(model))
        }
        self._makes = makes_of((model for model, _ in self.models.values()), self._phases)
        self.pipe = copy.copy(pipe)
        # A schedule is made of real tensors, and which step it is makes no difference to memory.
        copies = {name: model for name, (model, _) in self.models.items()}
        vars(self.pipe).update(copies, scheduler=None, _progress_bar_config={"disable": True})
        if "components" in vars(pipe):  # of what only looks like a pipeline
            vars(self.pipe)["components"] = pipe.components | copies

    def calling(self, stage: str) -> Any:
        """The pipeline with only those models that it calls for a stage: to patch the others would take time."""
        others = {
            name: None for name, (_, family) in self.models.items() if family.stages and stage not in family.stages
        }
        pipe = copy.copy(self.pipe)
        vars(pipe).update(others)
        if "components" in vars(pipe):
            vars(pipe)["components"] = pipe.components | others
        return pipe

    def peaks(self, work: Callable[[], object], most: float = math.inf) -> Peaks:
        """The most bytes alive at once while `work` calls the copies.

        Raises:
            TooManyBytesError: there are more than `most` on the pipeline's device, as is known before all is done.
        """
        libraries = 0 if self.place == HOST else LIBRARIES
        count = WithoutData(self.place, HOST, most=most - libraries)
        alike = RunOnce(count, self._makes)

        def forward(make: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return alike(None, make, original, args, **kwargs)

        with PatchStack() as stack, torch.no_grad(), _uncollected(), rehearsal(alike), count, KernelsInOne():
            for block in self._phases:
                stack.wrap(block, "forward", partial(forward, self._makes[block]), "forward")
            work()
        return Peaks(count.peak + libraries, 0 if self.place == HOST else count.peaks[HOST])
