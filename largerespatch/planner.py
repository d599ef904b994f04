"""Peak memory, told beforehand, and settings that fit a budget."""

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from . import stages
from .memory import gibibytes, parse_bytes
from .patching import PatchStack
from .shadow import HOST, Shadow, execution_device, models_of, weights_now, weights_on

# Puts a patch on a pipeline's shadow, with other settings than its own.
Patched = Callable[..., AbstractContextManager[Any]]
Settings = dict[str, Any]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the pipeline's device for one image with guidance on.

    `weights` are those that are on the device at once; `unet` (a denoising step), `encode` and `decode` are what the
    stages hold beside them. `encodes` says whether the pipeline encodes images at all.
    """

    weights: int
    unet: int
    encode: int
    decode: int
    encodes: bool = False

    @property
    def peak(self) -> int:
        """Weights and the largest stage; encoding counts where the pipeline encodes."""
        return self.weights + max(self.unet, self.decode, self.encode if self.encodes else 0)

    def __str__(self) -> str:
        names = ("weights", "denoising step", "encode", "decode", "peak")
        amounts = [gibibytes(each) for each in (self.weights, self.unet, self.encode, self.decode, self.peak)]
        width = max(map(len, amounts))
        rows = [f"{name:<14}  {amount:>{width}}" for name, amount in zip(names, amounts, strict=True)]
        if not self.encodes:
            rows[2] += "  (this pipeline does not encode)"
        return "\n".join(rows)


class Estimator:
    """Estimates one pipeline's memory for any size and settings.

    `factor` counts sample pixels to a latent pixel along each axis. `stacks` hold the replacements that are on the
    pipeline now; what is underneath them is estimated, inside `patched`.
    """

    def __init__(self, pipe: Any, factor: int, stacks: list[PatchStack], patched: Patched) -> None:
        names = [name for name in models_of(pipe) if name in stages.COMPONENTS]
        self.device = execution_device(pipe)
        self.shadow = Shadow(pipe, names, stacks)
        self.weights = weights_on(pipe, self.device)
        self.encodes = stages.encodes(pipe)
        self.factor = getattr(pipe, "movq_scale_factor", factor)  # Kandinsky's
        self.patched = patched
        self._known: dict[Any, int] = {}

    def estimate(self, height: int, width: int, settings: Settings) -> MemoryEstimate:
        """Of the patched pipeline, for an image of ``height x width`` sample pixels."""
        unet, encode, decode = (stage(height, width, settings) for stage in (self.step, self.encode, self.decode))
        return MemoryEstimate(self.weights, unet, encode, decode, self.encodes)

    def step(self, height: int, width: int, settings: Settings) -> int:
        """Bytes of a denoising step."""
        return self._peak(stages.step, (height, width, self.factor), settings)

    def encode(self, height: int, width: int, settings: Settings) -> int:
        # Pipelines encode in float32 whatever the dtype, and decode so where half precision would overflow.
        return self._peak(stages.encode, (height, width), settings, torch.float16, torch.bfloat16)

    def decode(self, height: int, width: int, settings: Settings) -> int:
        return self._peak(stages.decode, (height, width, self.factor), settings, torch.float16)

    def _peak(
        self, stage: Callable[..., object], size: tuple[int, ...], settings: Settings, *upcast: torch.dtype
    ) -> int:
        key = (self.patched, stage, size, frozenset(settings.items()))
        if key not in self._known:
            pipe = self.shadow.pipe
            with self.patched(pipe, **settings), self.shadow.fake, stages.upcast(pipe, *upcast) as grown:
                self._known[key] = grown + self.shadow.peak(lambda: _run(stage, pipe, size))
        return self._known[key]


def _run(stage: Callable[..., object], pipe: Any, size: tuple[int, ...]) -> None:
    _held = stages.held(pipe, *size[:2])
    stage(pipe, *size)


def bare(pipe: Any, **settings: object) -> AbstractContextManager[Any]:
    """No patch at all."""
    return nullcontext()


# What is tried, in this order, from the cheapest: each line added to those before it. All of the denoiser's are exact.
DENOISER_SAVERS: tuple[Settings, ...] = (
    {"unet_serial": True},
    {"unet_offload": True},
    {"unet_strip_rows": 64},
    {"unet_strip_rows": 16},
)
VAE_SAVERS: Mapping[str, tuple[Settings, ...]] = {
    "two-pass": (
        {"vae_offload": True},
        {"vae_attn": "blocked"},
        {"vae_chunk_size_x": 32, "vae_chunk_size_y": 32},
    ),
    "exact": (
        {"vae_recompute": True},
        {"vae_offload": True},
        {"vae_chunk_size_y": 32},
        {"vae_chunk_size_y": 16},
    ),
}
MARGIN = 0.05  # of what is free, for kernels' workspace and fragmentation
SEARCH_STEP = 64  # sample pixels


def free_bytes(device: torch.device) -> int | None:
    """What `device` can still give, the cache that torch keeps included; None where it does not say."""
    backend: Any = getattr(torch, device.type, None)
    if device.type == "mps":
        return int(backend.recommended_max_memory() - backend.driver_allocated_memory())
    if not hasattr(backend, "mem_get_info"):
        return None
    free, _ = backend.mem_get_info(device)
    return int(free + backend.memory_reserved(device) - backend.memory_allocated(device))


def memory_bytes(value: object, pipe: Any) -> int:
    """Bytes that a pipeline may take on its device, weights included, from ``"8GiB"``, a number of bytes or ``"auto"``.

    Raises:
        TypeError, ValueError: it is none of these, or less than the weights alone, or ``"auto"`` where the device does
            not say what it has free.
    """
    message = (
        "memory_limit must be None, a positive amount such as '8GiB', '7.5 GB' or a whole number of bytes, or 'auto'; "
        f"got {value!r}"
    )
    device = execution_device(pipe)
    weights = weights_on(pipe, device)
    if value == "auto":
        free = free_bytes(device)
        if free is None:
            raise ValueError(
                "memory_limit 'auto' needs a pipeline on a device that reports its free memory, this one is on "
                f"{device}; accepted there are None and amounts such as '8GiB'"
            )
        return int((1 - MARGIN) * free) + weights_now(pipe, device)
    if isinstance(value, str):
        limit = parse_bytes(value)
    else:
        limit = _whole(value)
        if limit is None:
            raise TypeError(message)
    if limit is None or limit <= 0:
        raise ValueError(message)
    if limit <= weights:
        raise ValueError(
            f"memory_limit must be more than the weights on {device}, which take {gibibytes(weights)}; got {value!r}"
        )
    return limit


def _whole(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


@dataclass(frozen=True)
class Plan:
    """Settings that fit a limit, and what they need."""

    settings: Settings
    estimate: MemoryEstimate

    def describe(self, limit: int) -> str:
        picked = ", ".join(f"{name}={value!r}" for name, value in self.settings.items()) or "no saver needed"
        return f"memory_limit of {gibibytes(limit)}: {picked}; estimated peak {gibibytes(self.estimate.peak)}"


class Planner:
    """Finds the cheapest settings that fit `limit` bytes. Options named in `kept` are not touched."""

    def __init__(self, estimator: Estimator, limit: int, vae_mode: str, kept: frozenset[str]) -> None:
        self.estimator = estimator
        self.limit = limit
        self.room = limit - estimator.weights
        self.denoiser = list(self._ladder(DENOISER_SAVERS, kept))
        self.vae = list(self._ladder(VAE_SAVERS[vae_mode], kept))

    def _ladder(self, savers: tuple[Settings, ...], kept: frozenset[str]) -> Iterator[Settings]:
        """No saver, the first one, the first two, and so on, of those that may be used and can save anything."""
        settings: Settings = {}
        yield settings
        for saver in savers:
            added = {name: value for name, value in saver.items() if name not in kept and self._helps(name)}
            if added:
                settings = settings | added
                yield settings

    def _helps(self, name: str) -> bool:
        return not (name.endswith("_offload") and self.estimator.device.type == HOST)

    def plan(self, height: int, width: int) -> Plan:
        """For an image of ``height x width`` sample pixels.

        Raises:
            ValueError: nothing fits. The message says what is needed at least, and the largest size that fits.
        """
        if not self._fits(height, width):
            raise ValueError(self._refusal(height, width))
        denoiser = next(each for each in self.denoiser if self._step(height, width, each) <= self.room)
        vae = next(each for each in self.vae if self._vae(height, width, each) <= self.room)
        return Plan(denoiser | vae, self.estimator.estimate(height, width, denoiser | vae))

    def _step(self, height: int, width: int, settings: Settings) -> int:
        return self.estimator.step(height, width, settings)

    def _vae(self, height: int, width: int, settings: Settings) -> int:
        encode = self.estimator.encode(height, width, settings) if self.estimator.encodes else 0
        return max(encode, self.estimator.decode(height, width, settings))

    def _least(self, height: int, width: int) -> int:
        """Bytes that the largest stage needs with every saver."""
        return max(self._step(height, width, self.denoiser[-1]), self._vae(height, width, self.vae[-1]))

    def _fits(self, height: int, width: int) -> bool:
        return self._least(height, width) <= self.room

    def _refusal(self, height: int, width: int) -> str:
        needed = self._least(height, width)
        largest = self._largest(height, width, math.sqrt(self.room / needed))
        what_fits = "no size does" if largest is None else f"the largest image of this shape that does is {largest}"
        return (
            f"memory_limit of {gibibytes(self.limit)} does not fit {width}x{height} sample pixels, which need "
            f"{gibibytes(self.estimator.weights + needed)} with every saver that may be used; {what_fits}"
        )

    def _largest(self, height: int, width: int, guess: float) -> str | None:
        """``"WxH"`` of nearly the same shape; `guess` is the expected scale."""
        sides = [self._scaled(height, width, i) for i in range(1, math.ceil(min(height, width) / SEARCH_STEP))]
        if not sides:
            return None
        low, high, probe, reach = -1, len(sides), int(guess * len(sides)), 1
        while high - low > 1:
            if not low < probe < high:
                probe = (low + high) // 2
            if self._fits(*sides[probe]):
                low, probe = probe, probe + reach
            else:
                high, probe = probe, probe - reach
            reach *= 2
        return None if low < 0 else "{1}x{0}".format(*sides[low])

    def _scaled(self, height: int, width: int, i: int) -> tuple[int, int]:
        """The size whose shorter side is `i` search steps, both in whole latent pixels."""
        short, factor = i * SEARCH_STEP, max(self.estimator.factor, 8)
        scale = short / min(height, width)
        longer = max(int(scale * max(height, width)) // factor * factor, short)
        return (short, longer) if height <= width else (longer, short)
