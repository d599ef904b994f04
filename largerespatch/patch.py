"""LargeResPatch: check, find families, install their sites, restore."""

import copy
import threading
import weakref
from contextlib import AbstractContextManager
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar, Self

from torch import nn

from . import autoencoders, denoisers  # noqa: F401  the families register themselves
from .core.checks import whole_number
from .core.families import Family, Site, factor_of, families_in, install, models_of, parts_of, told
from .core.patching import PatchStack
from .memory.estimate import Estimator, MemoryEstimate, bare
from .memory.planner import Plan, Planner, limit_bytes
from .options import Options, given, help_lines, signature

# Of a side: a map of both sides so long, with 2^14 channels, has as many values as a 64-bit index can count.
MOST_PIXELS = 2**24


class _Occupied:
    """Which models are patched now, by which patch: the models themselves carry no mark. Any thread may ask."""

    def __init__(self) -> None:
        self._patches: weakref.WeakKeyDictionary[nn.Module, LargeResPatch] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def claim(self, models: dict[str, nn.Module], patch: "LargeResPatch") -> None:
        """All parts of the `models` for one patch.

        Raises:
            ValueError: some are another's. None is claimed then.
        """
        parts = {part: name for name, model in models.items() for part in parts_of(model)}
        with self._lock:
            for part, name in parts.items():
                if part in self._patches:
                    which = "this" if self._patches[part] is patch else "another"
                    raise ValueError(
                        f"pipe.{name} is patched already, by {which} LargeResPatch; accepted is one at a time: leave "
                        "its block (or call its `disable`) first"
                    )
            self._patches.update(dict.fromkeys(parts, patch))

    def release(self, patch: "LargeResPatch") -> None:
        with self._lock:
            for part in [part for part, its in self._patches.items() if its is patch]:
                del self._patches[part]

    def on(self, models: dict[str, nn.Module]) -> "list[LargeResPatch]":
        """The patches that are on some models."""
        with self._lock:
            return list({self._patches[model]: None for model in models.values() if model in self._patches})


_OCCUPIED = _Occupied()


class LargeResPatch:
    """Makes a diffusers pipeline of the Stable Diffusion family work far beyond its training size on small memory.

        with LargeResPatch(pipe, width=4096, height=4096):
            image = pipe(prompt, width=4096, height=4096).images[0]

    Inside the block self-attention is blocked, with a context that stands for the rest of the map (approximate),
    feed-forwards are chunked (exact) and the VAE runs in two passes over tiles (approximate). What is small enough to
    need none of it gives the unpatched result. On exit the pipeline is as it was before. A patch can be entered again
    later; `enable` and `disable` are the same two steps for notebooks.

    Args:
        pipe: a diffusers pipeline.
        width: of the image, in sample pixels. Other sizes work inside the block, too.
        height: likewise.
        {options}

    Raises:
        TypeError, ValueError: an option is not what is accepted, or `pipe` has nothing to patch. Nothing is changed.

    It descends from StableDiffusionLargeResPatch (2022, public domain).
    """

    __doc__ = (__doc__ or "").format(options=help_lines(indent=8))
    __signature__: ClassVar = signature(pipe=Any, width=int, height=int)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        chosen = given(self.__signature__, args, kwargs)
        self.pipe = chosen.pop("pipe")
        width, height = chosen.pop("width"), chosen.pop("height")
        self.options = Options(**chosen)
        families = _known_families(self.pipe)
        factor = factor_of(self.pipe)
        self.width = _image_size("width", width, factor)
        self.height = _image_size("height", height, factor)
        if self.options.padding_mode == "reflect":
            halvings = max((family.halvings(model) for model, family in families.values()), default=0)
            _check_reflection("width", self.width, factor, halvings)
            _check_reflection("height", self.height, factor, halvings)
        self._sites()  # what these models cannot do is an error now
        self._stack = PatchStack()
        self._plan: Plan | None = None
        self._limit: int | None = None
        if self.options.memory_limit is not None:
            self._limit = limit_bytes(self.options.memory_limit, self.pipe, self.options)
            planner = Planner(self._estimator(self._on), self._limit, self.options, frozenset(chosen))
            self._plan = planner.plan(self.height, self.width)
            self.options = replace(self.options, **self._plan.settings)

    def enable(self) -> Self:
        """Install every replacement; what ``with`` does on entry.

        Raises:
            ValueError: this patch or another one is already on the pipeline. Nothing is changed.
        """
        sites = self._sites()
        models = models_of(self.pipe)
        _OCCUPIED.claim({name: models[name] for name, own in sites.items() if own}, self)
        # Known to `disable` from the start, so that a half-done entry unwinds like a whole one.
        self._stack = PatchStack()
        try:
            install(self._stack, [site for own in sites.values() for site in own])
        except BaseException:
            self.disable()
            raise
        return self

    def disable(self) -> None:
        """Restore the pipeline; what ``with`` does on exit. Harmless if there is nothing to restore.

        Raises:
            RuntimeError: other code has replaced one of the replacements. Everything else is restored first.
        """
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self.enable()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._stack.__exit__(kind, error, traceback)
        finally:
            if not self._stack.active:  # else the undo was interrupted and may be finished by another call
                _OCCUPIED.release(self)

    def estimate(self, patched: bool = True) -> MemoryEstimate:
        """The peak of memory on the pipeline's device, in bytes, for one image of the patch's size, guidance on.

        Found by running copies of the models on tensors without data, in seconds; nothing is allocated. The pipeline
        stays as it is, inside the block and outside. Hooks on its modules are left out, but for what they keep off the
        device; so is the private workspace of kernels.

        Args:
            patched: with this patch on; else as the pipeline is without any.

        Raises:
            ValueError: the pipeline has a denoiser that the estimate does not know how to call.
        """
        return self._estimator(self._on if patched else bare).estimate(self.height, self.width, self.options)

    def _estimator(self, patched: Any) -> Estimator:
        stacks = [patch._stack for patch in _OCCUPIED.on(models_of(self.pipe))]
        return Estimator(self.pipe, stacks, patched, None if patched is bare else self.options)

    def _on(self, pipe: Any, options: Options) -> AbstractContextManager[Any]:
        """This patch for another pipeline, with other options."""
        other = copy.copy(self)
        other.pipe, other.options, other._stack = pipe, options, PatchStack()
        return other

    def _sites(self) -> dict[str, list[Site]]:
        """By component name.

        Raises:
            ValueError: an option asks for what a model cannot do.
        """
        families = families_in(self.pipe)
        return {
            name: list(family.sites(model, name, self.options, self.pipe)) for name, (model, family) in families.items()
        }

    def __repr__(self) -> str:
        state = "active" if self._stack.active else "not active"
        lines = [f"LargeResPatch on {type(self.pipe).__name__}, {self.width}x{self.height} sample pixels, {state}"]
        models = models_of(self.pipe)
        for name, sites in self._sites().items():
            lines.append(f"  {name} ({type(models[name]).__name__}): {told(sites) or 'left as it is'}")
        if self._plan is not None and self._limit is not None:
            lines.append(f"  {self._plan.describe(self._limit)}")
        return "\n".join(lines)


def _known_families(pipe: Any) -> dict[str, tuple[nn.Module, Family]]:
    """The models of a pipeline that there is something to do for, by component name.

    Raises:
        TypeError, ValueError: it is no pipeline, or there is none.
    """
    known = {name: found for name, found in families_in(pipe).items() if found[1].known}
    if not known:
        models = models_of(pipe).items()
        holds = ", ".join(f"{name} ({type(model).__name__})" for name, model in models) or "no model"
        raise ValueError(
            "pipe must hold something to patch: a denoiser with self-attention to a map (U-Net, ControlNet, PixArt's "
            f"transformer) or an AutoencoderKL; got {type(pipe).__name__} with {holds}"
        )
    return known


def _image_size(option: str, value: object, factor: int) -> int:
    size = whole_number(option, value, "sample pixels", 1)
    if size > MOST_PIXELS:
        raise ValueError(
            f"{option} must be at most {MOST_PIXELS} sample pixels, since indices of larger maps overflow; got {size}"
        )
    if size % factor:
        below = size - size % factor
        nearest = " and ".join(str(each) for each in (below, below + factor) if each > 0)
        raise ValueError(f"{option} must be a multiple of {factor} sample pixels; got {size}, nearest: {nearest}")
    return size


def _check_reflection(option: str, size: int, factor: int, halvings: int) -> None:
    """A map must have two cells to be reflected, the smallest one of a U-Net too."""
    least = factor * (2**halvings + 1)
    if size < least:
        raise ValueError(
            f"padding_mode 'reflect' needs a {option} of at least {least} sample pixels (two cells on the smallest "
            f"map); got {size}"
        )
