"""LargeResPatch: check, find families, install their sites, restore."""

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, Self

import diffusers
import torch
from PIL import Image
from torch import nn

from . import autoencoders, denoisers  # noqa: F401  the families register themselves
from .autoencoders.decoding import decoded
from .core.agreement import agreeing, check_group, facts_of, least, process_group
from .core.checks import whole_number
from .core.families import Family, Site, check_multiple, check_shared, factor_of, families_in, install, models_of, told
from .core.first_call import FirstCall
from .core.occupied import Occupied
from .core.patching import PatchStack
from .memory.auto import AUTO, outcome
from .memory.devices import execution_device
from .memory.estimate import Estimator, MemoryEstimate, bare
from .memory.host_room import check_host
from .memory.planner import Planner, Settings, limit_bytes
from .options import WITH_A_GROUP, Options, given, help_lines, signature

# Of a side: a map of both sides so long, with 2^14 channels, has as many values as a 64-bit index can count.
MOST_PIXELS = 2**24

_LOGGER = logging.getLogger("largerespatch")

_OCCUPIED: "Occupied[LargeResPatch]" = Occupied()


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
        group = process_group("process_group", kwargs.get("process_group"))
        with agreeing(group, self._facts):
            self._take(**given(self.__signature__, args, kwargs))

    def _take(self, pipe: Any, width: object, height: object, **chosen: Any) -> None:
        self.pipe = pipe
        self.options = Options(**chosen)
        group = self.options.process_group
        families = _known_families(pipe)
        factor = factor_of(pipe)
        self.width = _image_size("width", width, factor)
        self.height = _image_size("height", height, factor)
        for model, family in families_in(pipe).values():
            family.check(model, pipe, self.height, self.width)
        if self.options.padding_mode == "reflect":
            halvings = max((family.halvings(model) for model, family in families.values()), default=0)
            _check_reflection("width", self.width, factor, halvings)
            _check_reflection("height", self.height, factor, halvings)
        if group is not None:
            check_shared(pipe)
            rows = max(family.rows(model) for model, family in families.values())
            check_group(group, execution_device(pipe), self.height, factor, rows)
        self._sites()  # what these models cannot do is an error now
        self._stack, self._first_call = PatchStack(), FirstCall()
        self._planned = ""
        self._given, self._kept = self.options, frozenset(chosen) | (WITH_A_GROUP.keys() if group else frozenset())
        if self.options.memory_limit not in (None, "auto"):
            limit = limit_bytes(self.options.memory_limit, pipe, self.options)
            assert limit is not None  # an amount is one
            plan = self._planner(limit).plan(self.height, self.width)
            self._settle(plan.settings, str(plan))

    def _facts(self) -> dict[str, object]:
        """What has to be the same in all processes that make one image."""
        chosen = {option.name: getattr(self.options, option.name) for option in fields(self.options)}
        del chosen["process_group"]
        sizes: dict[str, object] = {"width": self.width, "height": self.height, "diffusers": diffusers.__version__}
        return sizes | chosen | facts_of(self.pipe)

    def enable(self) -> Self:
        """Install every replacement; what ``with`` does on entry.

        Raises:
            ValueError: this patch or another one is already on the pipeline, or the host has not the memory for the
                maps that are to be there. Nothing is changed.
        """
        if self._given.memory_limit == "auto":
            self.options = self._given  # not what was planned when other things were loaded
        if self._given.memory_limit in (None, "auto"):  # with an amount it has been planned
            check_host(self.pipe, self.options, self.height, self.width, partial(self._estimator, self._on))
        self._put_on()
        return self

    def _put_on(self) -> None:
        sites = self._sites()
        models = models_of(self.pipe)
        _OCCUPIED.claim({name: models[name] for name, own in sites.items() if own}, self)
        # Known to `disable` from the start, so that a half-done entry unwinds like a whole one.
        self._stack, self._first_call = PatchStack(), FirstCall()
        try:
            install(self._stack, [site for own in sites.values() for site in own])
            if self._given.memory_limit == "auto":
                self._wait_for_first_call([name for name, own in sites.items() if own])
        except BaseException:
            self.disable()
            raise

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
            try:
                self._first_call.stack.__exit__(kind, error, traceback)
            finally:
                self._stack.__exit__(kind, error, traceback)
        finally:
            if not self._stack.active:  # else the undo was interrupted and may be finished by another call
                _OCCUPIED.release(self)

    def estimate(self, patched: bool = True) -> MemoryEstimate:
        """The peak of memory on the pipeline's device, in bytes, for one image of the patch's size, guidance on.

        Found by running copies of the models on tensors without data, in seconds; nothing is allocated. The pipeline
        stays as it is, inside the block and outside. Hooks on its modules are left out, but for what they keep off the
        device; so is the private workspace of kernels. With a `process_group` it is that of the process whose band is
        the tallest, and no other one is asked.

        Args:
            patched: with this patch on; else as the pipeline is without any.

        Raises:
            ValueError: the pipeline has a denoiser that the estimate does not know how to call.
        """
        return self._estimator(self._on if patched else bare).estimate(self.height, self.width, self.options)

    def decode(self, latents: torch.Tensor) -> Image.Image:
        """The image of `latents`, as a pipeline gives them for ``output_type="latent"``.

        The pixels are the pipeline's own, but written as strips or tiles come: there is never an image in floating
        point, of which a pipeline makes several copies. Outside the block the patch is on for as long as it takes.

        Args:
            latents: of one image, ``[1, C, height, width]``, in latent pixels.

        Raises:
            TypeError, ValueError: they are none, or no autoencoder of the pipeline takes such latents.
        """
        if not self._stack.active:
            with self:
                return self.decode(latents)
        return decoded(self.pipe, latents)

    def _settle(self, settings: Settings, says: str) -> None:
        self.options = replace(self._given, **settings)
        self._planned = says
        _LOGGER.info(says)

    def _planner(self, limit: int) -> Planner:
        return Planner(self._estimator(self._on), limit, self._given, self._kept)

    def _wait_for_first_call(self, names: Iterable[str]) -> None:
        """Settings are planned when the first of these models is called, wherever it is by then, and put in."""
        families = families_in(self.pipe)
        for name in names:
            model, family = families[name]
            for entry in family.entries:
                self._first_call.wait_for(model, entry, f"{name}.{entry}", self._plan_now)
        has_limit = limit_bytes("auto", self.pipe) is not None
        self._planned = f"{AUTO}: settings are planned when the first call starts" if has_limit else ""

    def _plan_now(self) -> None:
        waiting = self._first_call.stack
        overlaid = waiting.overlaid()
        if not overlaid:
            waiting.undo()
            overlaid = self._stack.overlaid()
        limit = limit_bytes("auto", self.pipe)
        if limit is None:
            return
        limit = least(self._given.process_group, limit)  # all plan alike
        if overlaid:  # what is beneath that cannot be exchanged
            others = ", ".join(overlaid)
            self._settle({}, f"{AUTO}: nothing is planned, since other code has replaced {others}")
            return
        chosen = outcome(partial(self._planner, limit), self.height, self.width, self._given.vae_mode)
        self._settle(chosen.settings, chosen.says)
        if chosen.settings:
            self._stack.undo()
            install(self._stack, [site for own in self._sites().values() for site in own])
        if chosen.warning:
            warnings.warn(chosen.warning, RuntimeWarning, stacklevel=2)

    def _estimator(self, patched: Any) -> Estimator:
        patches = _OCCUPIED.on(models_of(self.pipe))
        stacks = [stack for patch in patches for stack in patch._stacks]
        return Estimator(self.pipe, stacks, patched, None if patched is bare else self.options)

    @property
    def _stacks(self) -> tuple[PatchStack, PatchStack]:
        """In the order in which they are undone."""
        return self._first_call.stack, self._stack

    @contextmanager
    def _on(self, pipe: Any, options: Options) -> Iterator[None]:
        """Inside, this patch is on another pipeline, with other options; an estimate, so nothing is refused."""
        other = copy.copy(self)
        other.pipe, other.options, other._given = pipe, options, replace(options, memory_limit=None)
        other._put_on()
        try:
            yield
        finally:
            other.disable()

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
        if self._planned:
            lines.append(f"  {self._planned}")
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
            f"transformer) or an autoencoder of a known kind; got {type(pipe).__name__} with {holds}"
        )
    return known


def _image_size(option: str, value: object, factor: int) -> int:
    size = whole_number(option, value, "sample pixels", 1)
    if size > MOST_PIXELS:
        raise ValueError(
            f"{option} must be at most {MOST_PIXELS} sample pixels, since indices of larger maps overflow; got {size}"
        )
    check_multiple(option, size, factor)
    return size


def _check_reflection(option: str, size: int, factor: int, halvings: int) -> None:
    """A map must have two cells to be reflected, the smallest one of a U-Net too."""
    least = factor * (2**halvings + 1)
    if size < least:
        raise ValueError(
            f"padding_mode 'reflect' needs a {option} of at least {least} sample pixels (two cells on the smallest "
            f"map); got {size}"
        )
