"""A pipeline without weights: same modules, weightless tensors. What runs on it takes no memory and next to no time."""

import copy
import gc
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..core.families import Family, families_in
from ..core.hosts import Host, HostRows
from ..core.maps import ComputedMap, JoinedMap, StoredMap
from ..core.patching import PatchStack
from ..core.pieces import rehearsal
from ..core.planes import Map
from ..core.tilings import PHASES
from ..core.tokens import TokenMap
from ..core.weights import Holding, offload_hooks
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

    Work that leaves more behind than its result, or whose result is something else than tensors and maps that are new
    or were given to it, is run each time. `makes` says of what make a module is, see `_makes`.
    """

    def __init__(self, count: LiveBytes, makes: Mapping[nn.Module, int]) -> None:
        self.count = count
        self.makes = makes
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
        look = self._kind(key), _look(given), _look(named)
        if look in known:
            needed, results, structure = known[look]
            self.count.rise(needed)
            return tree_unflatten([_again(each, (given, named)) for each in results], structure)
        before = self.count.all_alive()
        places = {id(_held(leaf)): i for i, leaf in enumerate(tree_leaves((given, named)))}
        result, during = self.count.peaks_of(lambda: work(*given, **named))
        leaves, structure = tree_flatten(result)
        results = [_made(leaf, places) for leaf in leaves]
        if all(isinstance(each, _New | _NewMap | _Given | int | NoneType) for each in results):
            made = Counter[str]()
            for each in chain.from_iterable(each.memory() for each in results if isinstance(each, _New | _NewMap)):
                made[each.look.device.type] += each.size
            left = {device: size - before[device] - made[device] for device, size in self.count.all_alive().items()}
            if (not any(left.values())) if isinstance(key, Holding) else (min(left.values()) >= 0):
                needed = {device: peak - before[device] for device, peak in during.items()}
                known[look] = (needed, results, structure)
        return result

    def _kind(self, key: Hashable) -> Hashable:
        """What a technique in a module has in common with those that have the same settings in modules of its make."""
        if not isinstance(key, Holding):
            return key
        settings = ((name, self.makes.get(value, value)) for name, value in vars(key.technique).items())
        return type(key.technique), self.makes[key.module], *settings


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

    def memory(self) -> Iterable["_New"]:
        return (self,)


class _NewMap(NamedTuple):
    """A map on the host, or its tokens, that can be made again."""

    kind: type
    look: Look
    host: Host
    passing: bool
    edges: Sequence[int]
    bands: tuple[_New, ...]

    @classmethod
    def of(cls, leaf: StoredMap | TokenMap) -> "_NewMap":
        stored = leaf.turned if isinstance(leaf, TokenMap) else leaf
        look = Look(stored.shape, (), stored.dtype, stored.device)
        rows: Any = stored.memory
        return cls(type(leaf), look, rows.host, stored.passing, rows.edges, tuple(map(_New.of, rows.bands)))

    def again(self) -> torch.Tensor:
        rows = HostRows(self.host, self.look.device, self.edges, [band.again() for band in self.bands])
        like: Any = self.look  # nothing but its dtype and device matter
        stored = StoredMap(self.look.size, like, self.host, rows, self.passing)
        return TokenMap.of(stored) if self.kind is TokenMap else stored

    def memory(self) -> Iterable[_New]:
        return self.bands


def _held(leaf: object) -> object:
    """By what something that was given is known again: tokens on the host by their memory, all else by itself."""
    return leaf.turned.memory if isinstance(leaf, TokenMap) and leaf.away else leaf


def _made(leaf: Any, places: dict[int, int]) -> Any:
    """A result as something that it can be made of again; `places` are those of what was given."""
    if isinstance(leaf, torch.Tensor) and id(_held(leaf)) in places:
        return _Given(places[id(_held(leaf))])
    if type(leaf) in (StoredMap, TokenMap) and leaf.away:
        return _NewMap.of(leaf)
    return _New.of(leaf) if type(leaf) in (torch.Tensor, Weightless) else leaf


def _again(made: Any, given: Any) -> Any:
    """The inverse, where something else is given."""
    if isinstance(made, _Given):
        leaf = tree_leaves(given)[made.place]
        return leaf.claim() if isinstance(leaf, TokenMap) else leaf
    return made.again() if isinstance(made, _New | _NewMap) else made


def _look(given: Any) -> Any:
    """All that memory may depend on, of what is given to some work."""
    if isinstance(given, Map):
        look = type(given), given.shape, given.dtype, given.device, given.host, given.away, given.passing
        if isinstance(given, JoinedMap):
            return *look, given.along, *map(_look, given.parts)
        return (*look, object()) if isinstance(given, ComputedMap) else look  # of what it is computed is not told
    if isinstance(given, torch.Tensor):
        return Look.of(given)
    if isinstance(given, tuple | list):
        return type(given), *map(_look, given)
    if isinstance(given, dict):
        return *given, *map(_look, given.values())
    return given if type(given) in _ATOMS else repr(given)


def _makes(models: Iterable[nn.Module], phases: Mapping[nn.Module, int]) -> dict[nn.Module, int]:
    """Of each module in some models a number, the same for those of the same kinds, sizes and `phases` all through."""
    numbers: dict[Any, int] = {}
    made: dict[nn.Module, int] = {}

    def number(module: nn.Module) -> int:
        if module not in made:
            inside = tuple((name, number(child)) for name, child in module.named_children())
            weights = tuple(
                (name, weight.size(), weight.dtype) for name, weight in module.named_parameters(recurse=False)
            )
            kind = type(module), type(getattr(module, "processor", None)), phases.get(module), inside, weights
            made[module] = numbers.setdefault(kind, len(numbers))
        return made[module]

    for model in models:
        number(model)
    return made


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
        self._makes = _makes((model for model, _ in self.models.values()), self._phases)
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

    def peaks(self, work: Callable[[], object]) -> Peaks:
        """The most bytes alive at once while `work` calls the copies."""
        count = WithoutData(self.place, HOST)
        alike = _Alike(count, self._makes)

        def forward(make: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return alike(None, make, original, args, **kwargs)

        with PatchStack() as stack, torch.no_grad(), _uncollected(), rehearsal(alike), count, KernelsInOne():
            for block in self._phases:
                stack.wrap(block, "forward", partial(forward, self._makes[block]), "forward")
            work()
        if self.place == HOST:
            return Peaks(count.peak, 0)
        return Peaks(count.peak + LIBRARIES, count.peaks[HOST])
