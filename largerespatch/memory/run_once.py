"""Work that is alike is run once: what it needs and makes is known from then on, whatever runs it next."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import chain
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..core.hosts import Host, HostRows
from ..core.maps import ComputedMap, JoinedMap, StoredMap
from ..core.planes import Map
from ..core.tokens import JoinedTokens, TokenMap, parts_of
from ..core.weights import Holding
from .counting import Sizes
from .weightless import Look, Weightless, WithoutData

ATOMS = (NoneType, bool, int, float, str)

# Inside, whoever stands between torch's functions and their callers is not asked: each look at a tensor would take ten
# times as long.
_AS_THEY_ARE: Any = torch._C.DisableTorchFunction


class RunOnce:
    """Runs one of several pieces of work that are alike and counts the others as that one: all need the same memory.

    Work that leaves more behind than its result, or whose result is something else than tensors and maps that are new
    or were given to it, is run each time. `makes` says of what make a module is, see `makes_of`.
    """

    def __init__(self, count: WithoutData, makes: Mapping[nn.Module, int]) -> None:
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
        with _AS_THEY_ARE():
            look = self._kind(key), _look(given), _look(named)
            if look in known:
                needed, results, structure = known[look]
                self.count.rise(needed)
                return tree_unflatten([self._again(each, (given, named)) for each in results], structure)
            before = self.count.all_alive()
            places = {id(_held(leaf)): i for i, leaf in enumerate(_leaves((given, named)))}
        result, during = self.count.peaks_of(lambda: work(*given, **named))
        with _AS_THEY_ARE():
            leaves, structure = tree_flatten(result)
            results = [_made(leaf, places) for leaf in leaves]
            if self._can_be_again(results, key, before):
                needed = {device: peak - before[device] for device, peak in during.items()}
                known[look] = (needed, results, structure)
        return result

    def _can_be_again(self, results: Sequence[Any], key: Hashable, before: Sizes) -> bool:
        """Whether these, of work before which so much was alive, are all that it left behind."""
        parts = (each.parts if isinstance(each, _Joined) else [each] for each in results)
        results = list(chain.from_iterable(parts))
        if not all(isinstance(each, _New | _NewMap | _Given | int | NoneType) for each in results):
            return False
        made = Counter[str]()
        for each in chain.from_iterable(each.memory() for each in results if isinstance(each, _New | _NewMap)):
            made[each.look.device.type] += each.size
        left = {device: size - before[device] - made[device] for device, size in self.count.all_alive().items()}
        return not any(left.values()) if isinstance(key, Holding) else min(left.values()) >= 0

    def _again(self, made: Any, given: Any) -> Any:
        """The inverse of `_made`, where something else is given."""
        if isinstance(made, _Given):
            leaf = _leaves(given)[made.place]
            return leaf.claim() if isinstance(leaf, TokenMap) else leaf
        if isinstance(made, _Joined):
            return JoinedTokens.of([self._again(part, given) for part in made.parts])
        return made.again(self.count) if isinstance(made, _New | _NewMap) else made

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

    def again(self, count: WithoutData) -> torch.Tensor:
        if self.fills:
            return count.new(self.look)
        size, stride, dtype, _ = self.look
        memory = count.new(self.look._replace(size=torch.Size([self.size // dtype.itemsize]), stride=(1,)))
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

    def again(self, count: WithoutData) -> torch.Tensor:
        rows = HostRows(self.host, self.look.device, self.edges, [band.again(count) for band in self.bands])
        like: Any = self.look  # nothing but its dtype and device matter
        stored = StoredMap(self.look.size, like, self.host, rows, self.passing)
        return TokenMap.of(stored) if self.kind is TokenMap else stored

    def memory(self) -> Iterable[_New]:
        return self.bands


class _Joined(NamedTuple):
    """Tokens of several parts, each as something that it can be made of again."""

    parts: Sequence[Any]


def _leaves(given: Any) -> list[Any]:
    """All that is given, each part of tokens by itself."""
    leaves = (parts_of(leaf) if isinstance(leaf, JoinedTokens) else [leaf] for leaf in tree_leaves(given))
    return list(chain.from_iterable(leaves))


def _held(leaf: object) -> object:
    """By what something that was given is known again: tokens on the host by their memory, all else by itself."""
    return leaf.turned.memory if isinstance(leaf, TokenMap) and leaf.away else leaf


def _made(leaf: Any, places: dict[int, int]) -> Any:
    """A result as something that it can be made of again; `places` are those of what was given."""
    if isinstance(leaf, torch.Tensor) and id(_held(leaf)) in places:
        return _Given(places[id(_held(leaf))])
    if isinstance(leaf, JoinedTokens):
        return _Joined([_made(part, places) for part in leaf.parts])
    if type(leaf) in (StoredMap, TokenMap) and leaf.away:
        return _NewMap.of(leaf)
    return _New.of(leaf) if type(leaf) in (torch.Tensor, Weightless) else leaf


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
    return given if type(given) in ATOMS else repr(given)


def makes_of(models: Iterable[nn.Module], phases: Mapping[nn.Module, int]) -> dict[nn.Module, int]:
    """Of each module in some models a number, the same for those of the same kinds, settings, sizes and `phases`."""
    numbers: dict[Any, int] = {}
    made: dict[nn.Module, int] = {}

    def number(module: nn.Module) -> int:
        if module not in made:
            inside = tuple((name, number(child)) for name, child in module._modules.items() if child is not None)
            weights = tuple(
                (name, weight.size(), weight.dtype) for name, weight in module._parameters.items() if weight is not None
            )
            processor = type(getattr(module, "processor", None))
            make = type(module), processor, _settings(module), phases.get(module), inside, weights
            made[module] = numbers.setdefault(make, len(numbers))
        return made[module]

    for model in models:
        number(model)
    return made


def _settings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Numbers, and tuples of them, that a module has as attributes."""
    return tuple((name, repr(value)) for name, value in vars(module).items() if type(value) in (*ATOMS, tuple))
