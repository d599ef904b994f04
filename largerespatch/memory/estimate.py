"""Peak memory, told beforehand."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..core.calls import encodes, held
from ..core.families import Family
from ..core.patching import PatchStack
from .counting import TooManyBytesError, gibibytes
from .devices import execution_device, weights_on
from .shadow import Peaks, Shadow

# Puts a patch with some options on a pipeline's shadow.
Patched = Callable[[Any, Any], AbstractContextManager[Any]]

STAGES = ("step", "encode", "decode")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the pipeline's device for one image with guidance on.

    `weights` are those that are on the device at once; `step` (of denoising), `encode` and `decode` are what the
    stages hold beside them. `encodes` says whether the pipeline encodes images at all. `host` is what the largest stage
    holds in the host's memory, of maps that wait or live there, if the pipeline runs elsewhere.
    """

    weights: int
    step: int
    encode: int
    decode: int
    encodes: bool = False
    host: int = 0

    @property
    def peak(self) -> int:
        """Weights and the largest stage; encoding counts where the pipeline encodes."""
        return self.weights + max(self.step, self.decode, self.encode if self.encodes else 0)

    def __str__(self) -> str:
        names = ("weights", "denoising step", "encode", "decode", "peak")
        amounts = [gibibytes(each) for each in (self.weights, self.step, self.encode, self.decode, self.peak)]
        width = max(map(len, amounts))
        rows = [f"{name:<14}  {amount:>{width}}" for name, amount in zip(names, amounts, strict=True)]
        if not self.encodes:
            rows[2] += "  (this pipeline does not encode)"
        if self.host:
            rows.append(f"{'on the host':<14}  {gibibytes(self.host):>{width}}")
        return "\n".join(rows)


class Estimator:
    """Estimates one pipeline's memory for any size and options.

    `stacks` hold the replacements that are on the pipeline now; what is underneath them is estimated, inside `patched`.
    `options` say which weights a patch holds; None: there is none. (Which ones depends on them little.)
    """

    def __init__(self, pipe: Any, stacks: list[PatchStack], patched: Patched, options: Any = None) -> None:
        self.device = execution_device(pipe)
        self.shadow = Shadow(pipe, stacks)
        self.weights = weights_on(pipe, self.device, options)
        self.encodes = encodes(pipe)
        self.patched = patched
        self._known: dict[Any, Peaks] = {}

    def estimate(self, height: int, width: int, options: Any) -> MemoryEstimate:
        """Of the patched pipeline, for an image of ``height x width`` sample pixels."""
        step, encode, decode = (self.peak(stage, height, width, options) for stage in STAGES)
        stages = STAGES if self.encodes else ("step", "decode")
        host = max(self.host_peak(stage, height, width, options) for stage in stages)
        return MemoryEstimate(self.weights, step, encode, decode, self.encodes, host)

    def saves(self, stages: Sequence[str], option: str, value: Any) -> bool:
        """Whether a value of an option may make any of some stages need less."""
        families = [family for _, family in self.shadow.models.values() if not set(stages).isdisjoint(family.stages)]
        return any(family.saves(option, value) for family in families)

    def peak(self, stage: str, height: int, width: int, options: Any) -> int:
        """Bytes of one of `STAGES`, beside the weights.

        Raises:
            ValueError: it is not known how pipelines call one of the models.
        """
        return self._peaks(stage, height, width, options).device

    def fits(self, stage: str, height: int, width: int, options: Any, room: int) -> bool:
        """Whether `peak` is no more than `room`; where it is more that is known sooner than the peak."""
        try:
            return self._peaks(stage, height, width, options, room).device <= room
        except TooManyBytesError:
            return False

    def host_peak(self, stage: str, height: int, width: int, options: Any) -> int:
        """Bytes of one of `STAGES` in the host's memory, where the pipeline runs elsewhere; 0 where nothing leaves."""
        return self._peaks(stage, height, width, options).host if options.unet_offload or options.vae_offload else 0

    def _peaks(self, stage: str, height: int, width: int, options: Any, most: float = math.inf) -> Peaks:
        key = (stage, height, width, options)
        if key not in self._known:
            pipe, models = self.shadow.pipe, list(self.shadow.models.values())
            with self.patched(self.shadow.calling(stage), options), as_called(stage, models, pipe) as grown:
                work = partial(play, stage, models, pipe, height, width)
                device, host = self.shadow.peaks(work, most - grown)
            self._known[key] = Peaks(grown + device, host)
        return self._known[key]


def play(stage: str, models: Sequence[tuple[Any, Family]], pipe: Any, height: int, width: int) -> None:
    """The calls that `pipe` makes to its `models` for one of `STAGES`, and what it holds meanwhile."""
    _held = [held(pipe, height, width)]
    _held += [family.held(stage, model, pipe, height, width) for model, family in models]
    for model, family in models:
        if stage in family.stages:
            family.call(stage, model, pipe, height, width)


@contextmanager
def as_called(stage: str, models: Sequence[tuple[Any, Family]], pipe: Any) -> Iterator[int]:
    """What `pipe` does to its `models` for a stage. Yields the bytes by which their weights grow meanwhile."""
    with ExitStack() as around:
        yield sum(around.enter_context(family.as_called(stage, model, pipe)) for model, family in models)


def bare(pipe: Any, options: Any) -> AbstractContextManager[Any]:
    """No patch at all."""
    return nullcontext()
