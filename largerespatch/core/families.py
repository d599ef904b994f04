"""What a family of models says of itself, the sites where techniques are put in, and the one registry of families.

A family is one file: a subclass of `Family` that is registered where it is defined. Discovery, installing, `repr`,
estimate, planner and restore ask the registry and name no family.
"""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import IntEnum, auto
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import nn

from .checks import warn
from .modules import modules_of
from .patching import PatchStack
from .weights import Holding


class Order(IntEnum):
    """Which replacement of an instance runs outside which, read from the outside in.

    Chunks lie within tiles, where all of a transformer block runs tile by tile. Blocks lie within chunks: a transformer
    block in chunks answers its self-attention from what that gave for all tokens, so what answers comes before what
    attends.

    Samples go one after another through all that knows their map, which is known as a whole before it is in bands.

    What is in strips, tiles, chunks or blocks calls its module, or what that is made of, once for each piece: all
    weights that come for it stay for the length of a call (see `largerespatch.core.weights`).
    """

    CHECKED = auto()
    STEP_NOTED = auto()
    BATCH_SHARED = auto()
    BATCH_IN_TURNS = auto()
    MAP_NOTED = auto()
    IN_BANDS = auto()
    OFF_DEVICE = auto()
    IN_STAGES = auto()
    IN_STRIPS = auto()
    IN_TILES = auto()
    IN_CHUNKS = auto()
    IN_BLOCKS = auto()
    PADDED = auto()

    @property
    def in_pieces(self) -> bool:
        return self in (Order.IN_STRIPS, Order.IN_TILES, Order.IN_CHUNKS, Order.IN_BLOCKS)


@dataclass(frozen=True)
class Site:
    """A place where a technique is put in: an instance, its path in the pipeline, and what goes there.

    `technique` is called as ``technique(original, *args, **kwargs)`` in place of `attribute`, where it has a method
    `applies` for those calls alone to which that says it does; where it cannot be called it is the attribute's value
    instead. `says` tells `repr` about it; of sites that say the same one is told, with ``{count}`` as their number.
    """

    module: nn.Module
    path: str
    order: Order
    technique: Any
    attribute: str = "forward"
    says: str = ""

    @property
    def holds(self) -> Sequence[Sequence[nn.Module]]:
        """Modules for which weights come to the device that may be there at once, and others; see `weights_held`."""
        return [modules_of(self.module)] if self.order.in_pieces else getattr(self.technique, "holds", ())

    def install(self, stack: PatchStack) -> None:
        label = f"{self.path}.{self.attribute}"
        if callable(self.technique):
            around = Holding(self.module, self.technique) if self.order.in_pieces else self.technique
            stack.wrap(self.module, self.attribute, around, label)
        else:
            stack.set(self.module, self.attribute, self.technique, label)


def install(stack: PatchStack, sites: Iterable[Site]) -> None:
    """Puts all in; what runs outside goes on last, whatever order they come in."""
    for site in sorted(sites, key=lambda site: site.order, reverse=True):
        site.install(stack)


def told(sites: Iterable[Site]) -> str:
    """What `sites` say, each saying once, in the order they come in."""
    sayings: dict[str, int] = {}
    for site in sites:
        if site.says:
            sayings[site.says] = sayings.get(site.says, 0) + 1
    return ", ".join(says.format(count=count) for says, count in sayings.items())


class Family(ABC):
    """Models that share their sites and the way that pipelines call them. Stateless; one instance is registered.

    `rank` decides where several families match a model: the highest takes it. Below zero are those for models that
    nobody else knows, 1 is for a special case of another family. `stages` are the parts of a pipeline's call that a
    model of this family stands for, of ``"step"``, ``"encode"`` and ``"decode"``. `known` says whether there is more
    to do for its models than padding, `entries` name the methods that pipelines call. `shared` says of which models
    several processes can share the maps.
    """

    rank: int = 0
    stages: tuple[str, ...] = ()
    known: bool = True
    shared: str = ""
    entries: tuple[str, ...] = ("forward",)

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Whether `model` is one of this family."""

    @abstractmethod
    def sites(self, model: Any, name: str, options: Any, pipe: Any) -> Iterator[Site]:
        """What to put where in `model`, the component `name` of `pipe`, under these `largerespatch.options.Options`.

        Raises:
            ValueError: an option asks for what this model cannot do. Nothing has been changed.
        """

    def call(self, stage: str, model: Any, pipe: Any, height: int, width: int) -> None:
        """One of `stages` for one image of ``height x width`` sample pixels with guidance, on empty inputs.

        Only shapes and dtypes count: it runs on tensors without data. What the pipeline holds meanwhile is held.

        Raises:
            ValueError: it is not known how pipelines call this model.
        """
        raise unknown_call(model)

    def held(self, stage: str, model: Any, pipe: Any, height: int, width: int) -> list[torch.Tensor]:
        """What a pipeline holds for `model` during a stage that is another model's."""
        return []

    def as_called(self, stage: str, model: Any, pipe: Any) -> AbstractContextManager[int]:
        """What a pipeline does to `model` for a stage. Yields the bytes by which its weights grow meanwhile."""
        return nullcontext(0)

    def saves(self, option: str, value: Any) -> bool:
        """Whether a value of an option that concerns `stages` may save memory of these models."""
        return True

    def factor(self, model: Any) -> int | None:
        """Sample pixels per cell that images have to be whole multiples of; None where the model does not say."""
        return None

    def halvings(self, model: Any) -> int:
        """How often the model halves the map that it is given."""
        return 0

    def check(self, model: Any, pipe: Any, height: int, width: int) -> None:  # noqa: B027  most take any size
        """Warns of images of ``height x width`` sample pixels that the model was not made for.

        Raises:
            ValueError: it cannot make them at all.
        """

    def rows(self, model: Any) -> int:
        """Rows of latent pixels that each of several processes must have at least."""
        return 1

    def can_be_shared(self, model: Any) -> bool:
        """Whether `model` is one whose maps several processes can share, each with a band of rows."""
        return False

    def repeated(self, model: nn.Module) -> Iterator[nn.Module]:
        """Modules of which many are alike, so that an estimate may count one for all."""
        yield from ()


def unknown_call(model: nn.Module) -> ValueError:
    return ValueError(
        "pipe must have models whose memory can be estimated; it is not known how pipelines call "
        f"{type(model).__name__}"
    )


def warn_of_unknown(model: nn.Module, kind: str) -> None:
    """To be called by `Family.check` of those for models that nobody else knows, where these take much."""
    warn(
        f"{type(model).__name__} is {kind} of no known kind: it is left as it is, and takes as much memory and time as "
        "without this patch"
    )


_FAMILIES: list[Family] = []

F = TypeVar("F", bound=type[Family])


def register(family: F) -> F:
    """Makes a family known; to be written over its class."""
    _FAMILIES.append(family())
    return family


def unregister(family: type[Family]) -> None:
    """The inverse."""
    _FAMILIES[:] = [each for each in _FAMILIES if type(each) is not family]


def load(package: str, path: Iterable[str]) -> None:
    """Imports all rooms of a wing, so that the families in them are registered."""
    for room in pkgutil.iter_modules(path):
        import_module(f"{package}.{room.name}")


def family_of(model: nn.Module) -> Family | None:
    """The family that a model is of, if any."""
    ranked = sorted(_FAMILIES, key=lambda family: family.rank, reverse=True)
    return next((family for family in ranked if family.matches(model)), None)


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """All models of a pipeline by component name; for one that has been compiled, the model inside.

    Raises:
        TypeError: it is no pipeline.
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"pipe must be a diffusers pipeline, with `components`; got {type(pipe).__name__}")
    models = {name: getattr(model, "_orig_mod", model) for name, model in components.items()}
    return {name: model for name, model in models.items() if isinstance(model, nn.Module)}


def families_in(pipe: Any) -> dict[str, tuple[nn.Module, Family]]:
    """The models of a pipeline that are of a family, by component name."""
    found = {name: (model, family_of(model)) for name, model in models_of(pipe).items()}
    return {name: (model, family) for name, (model, family) in found.items() if family is not None}


def factor_of(pipe: Any) -> int:
    """Sample pixels per latent pixel along each axis: as its autoencoder says, else as the pipeline does, else 1."""
    factors = [family.factor(model) for model, family in families_in(pipe).values()]
    return max(filter(None, factors), default=getattr(pipe, "vae_scale_factor", 1))


def check_multiple(option: str, size: int, cell: int) -> None:
    """Sees that a side of an image, in sample pixels, is one of whole cells.

    Raises:
        ValueError: it is not.
    """
    if size % cell:
        below = size - size % cell
        nearest = " and ".join(str(each) for each in (below, below + cell) if each > 0)
        raise ValueError(f"{option} must be a multiple of {cell} sample pixels; got {size}, nearest: {nearest}")


def check_shared(pipe: Any) -> None:
    """Sees that several processes can share the maps of all models of a pipeline that have any.

    Raises:
        ValueError: of one they cannot.
    """
    for name, (model, family) in families_in(pipe).items():
        if not family.can_be_shared(model):
            accepted = ", ".join(dict.fromkeys(each.shared for each in _FAMILIES if each.shared))
            raise ValueError(
                f"process_group: it is not known how several processes share the maps of pipe.{name} "
                f"({type(model).__name__}); accepted are {accepted}"
            )


def parts_of(model: nn.Module) -> Iterator[nn.Module]:
    """A model and the models that it is made of: several ControlNets are one, and pipelines may share any of them."""
    for module in modules_of(model):
        if module is model or (hasattr(module, "config") and family_of(module) is not None):
            yield module
