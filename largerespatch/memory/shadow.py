"""A pipeline without weights: same modules, weightless tensors. What runs on it takes no memory and next to no time."""

import copy
import gc
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..core.families import Family, families_in
from ..core.patching import PatchStack
from ..core.pieces import rehearsal
from ..core.planes import Map
from ..core.tilings import PHASES
from ..core.tokens import TokenMap
from ..core.weights import offload_hooks
from .counting import KernelsInOne, LiveBytes
from .devices import HOST, device_of, execution_device
from .weightless import Look, Weightless, WithoutData

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
    plain = [module for module in model.modules() if not _copies_itself(type(module))]
    copies = [module.__new__(type(module)) for module in plain]
    memo.update((id(module), made) for module, made in zip(plain, copies, strict=True))
    for module, made in zip(plain, copies, strict=True):
        for name, value in vars(module).items():
            if type(value) in _CONTAINERS and not value:
                vars(made)[name] = value.copy()
            else:
                vars(made)[name] = value if type(value) in _ATOMS else copy.deepcopy(value, memo)
    return copy.deepcopy(model, memo)


_CONTAINERS = (dict, OrderedDict, set)
_ATOMS = (NoneType, bool, int, float, str)


def _copies_itself(kind: type) -> bool:
    ways = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__")
    return any(getattr(kind, way, None) is not getattr(nn.Module, way, None) for way in ways)


def _without_weights(model: nn.Module, stacks: list[PatchStack]) -> nn.Module:
    """A weightless copy of a model, as its class made it: without replacements, hooks and compiled calls."""
    # What `deepcopy` finds in its memo it takes for copied.
    memo: dict[int, Any] = {}
    for module in model.modules():
        for attribute in ("forward", "_compiled_call_impl", *_HOOKS):
            if vars(module).get(attribute) is not None:
                memo[id(vars(module)[attribute])] = None
    with _InPlaceOfData(_place(device_of(model))):
        shadow = _copied(model, memo)
    for stack in stacks:
        stack.undo_in(memo)
    for original, module in zip(list(model.modules()), list(shadow.modules()), strict=True):
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


class _Alike:
    """Runs one of several pieces of work that are alike and counts the others as that one: all need the same memory.

    Work that gives back a part of what it was given, or something else than tensors that are new or were given to it,
    is run each time.
    """

    def __init__(self, count: LiveBytes) -> None:
        self.count = count
        self.known: dict[Any, Any] = {}

    def __call__(
        self,
        known: dict[Any, Any] | None,
        key: Hashable,
        work: Callable[..., Any],
        given: tuple[Any, ...],
        **named: Any,
    ) -> Any:
        known = self.known if known is None else known
        look = key, _look(given), _look(named)
        if look in known:
            needed, results, structure = known[look]
            self.count.rise(needed)
            return tree_unflatten([_again(each, (given, named)) for each in results], structure)
        before = self.count.alive
        places = {id(_held(leaf)): i for i, leaf in enumerate(tree_leaves((given, named)))}
        result, during = self.count.peak_of(lambda: work(*given, **named))
        leaves, structure = tree_flatten(result)
        results = [_made(leaf, places) for leaf in leaves]
        new = sum(
            each.size for each in results if isinstance(each, _New) and each.look.device.type == self.count.device
        )
        if self.count.alive - before >= new and all(
            isinstance(each, _New | _Given | int | NoneType) for each in results
        ):
            known[look] = (during - before, results, structure)
        return result


class _Given(NamedTuple):
    """One of the tensors that the work was given, and wrote to."""

    place: int


class _New(NamedTuple):
    """A tensor that can be made again: how it lies in how many bytes of its own. `fills`: all of them are its."""

    look: Look
    offset: int
    size: int
    fills: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "_New":
        size = tensor.untyped_storage().nbytes()
        spanned = 1 + sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(Look.of(tensor), int(tensor.storage_offset()), size, size == spanned * tensor.element_size())

    def again(self) -> torch.Tensor:
        size, stride, dtype, device = self.look
        if self.fills:
            return torch.empty_strided(size, stride, dtype=dtype, device=device)
        memory = torch.empty(self.size // dtype.itemsize, dtype=dtype, device=device)
        return memory.as_strided(size, stride, self.offset)


def _held(leaf: object) -> object:
    """By what something that was given is known again: tokens on the host by their memory, all else by itself."""
    return leaf.turned.memory if isinstance(leaf, TokenMap) and leaf.away else leaf


def _made(leaf: Any, places: dict[int, int]) -> Any:
    """A result as something that it can be made of again; `places` are those of what was given."""
    if isinstance(leaf, torch.Tensor) and id(_held(leaf)) in places:
        return _Given(places[id(_held(leaf))])
    return _New.of(leaf) if type(leaf) in (torch.Tensor, Weightless) else leaf


def _again(made: Any, given: Any) -> Any:
    """The inverse, where something else is given."""
    if isinstance(made, _Given):
        leaf = tree_leaves(given)[made.place]
        return leaf.claim() if isinstance(leaf, TokenMap) else leaf
    return made.again() if isinstance(made, _New) else made


def _look(given: Any) -> Any:
    """All that memory may depend on, of what is given to some work."""
    if isinstance(given, Map):
        return type(given), given.shape, given.dtype, given.device, given.away, given.passing
    if isinstance(given, torch.Tensor):
        return Look.of(given)
    if isinstance(given, tuple | list):
        return type(given), *map(_look, given)
    if isinstance(given, dict):
        return *given, *map(_look, given.values())
    return given if type(given) in _ATOMS else repr(given)


def _make(block: nn.Module) -> Hashable:
    """The kinds and sizes of all modules in a block."""
    kinds = tuple((path, type(each), type(getattr(each, "processor", None))) for path, each in block.named_modules())
    return kinds, tuple((path, weight.size(), weight.dtype) for path, weight in block.named_parameters())


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
        self._makes = [
            (block, (i % PHASES, _make(block)))
            for model, family in self.models.values()
            for i, block in enumerate(family.repeated(model))
        ]
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

    def peak(self, work: Callable[[], object], place: str | None = None) -> int:
        """The most bytes alive at once while `work` calls the copies: on the pipeline's device, or in another place."""
        place = self.place if place is None else place
        count = WithoutData(place)
        alike = _Alike(count)

        def forward(make: Hashable, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return alike(None, make, original, args, **kwargs)

        with PatchStack() as stack, torch.no_grad(), _uncollected(), rehearsal(alike), count, KernelsInOne():
            for block, make in self._makes:
                stack.wrap(block, "forward", partial(forward, make), "forward")
            work()
        return count.peak + (0 if place == HOST else LIBRARIES)
