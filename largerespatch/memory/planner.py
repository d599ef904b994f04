"""Settings that fit a budget, the cheapest first."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..core.families import factor_of
from .counting import gibibytes, parse_bytes
from .estimate import Estimator, MemoryEstimate
from .shadow import HOST, execution_device, weights_now, weights_on

Settings = dict[str, Any]

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


def limit_bytes(limit: int | str, pipe: Any, options: Any = None) -> int:
    """Bytes that a pipeline may take on its device, weights included, for a `memory_limit` that has been checked.

    `options` are those of the patch that is to be on.

    Raises:
        ValueError: it is less than the weights alone, or ``"auto"`` where the device does not say what it has free.
    """
    device = execution_device(pipe)
    if limit == "auto":
        free = free_bytes(device)
        if free is None:
            raise ValueError(
                "memory_limit 'auto' needs a pipeline on a device that reports its free memory, this one is on "
                f"{device}; accepted there are None and amounts such as '8GiB'"
            )
        return int((1 - MARGIN) * free) + weights_now(pipe, device)
    size = (parse_bytes(limit) or 0) if isinstance(limit, str) else limit
    weights = weights_on(pipe, device, options)
    if size <= weights:
        raise ValueError(
            f"memory_limit must be more than the weights on {device}, which take {gibibytes(weights)}; got {limit!r}"
        )
    return size


@dataclass(frozen=True)
class Plan:
    """Settings that fit a limit, and what they need."""

    settings: Settings
    estimate: MemoryEstimate

    def describe(self, limit: int) -> str:
        picked = ", ".join(f"{name}={value!r}" for name, value in self.settings.items()) or "no saver needed"
        return f"memory_limit of {gibibytes(limit)}: {picked}; estimated peak {gibibytes(self.estimate.peak)}"


class Planner:
    """Finds the cheapest settings that fit `limit` bytes. Those of the `options` that are named in `kept` stay."""

    def __init__(self, estimator: Estimator, limit: int, options: Any, kept: frozenset[str]) -> None:
        self.estimator = estimator
        self.limit = limit
        self.options = options
        self.room = limit - estimator.weights
        self.denoiser = list(self._ladder(DENOISER_SAVERS, kept))
        self.vae = list(self._ladder(VAE_SAVERS[options.vae_mode], kept))

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
        settings = denoiser | vae
        return Plan(settings, self.estimator.estimate(height, width, replace(self.options, **settings)))

    def _step(self, height: int, width: int, settings: Settings) -> int:
        return self.estimator.peak("step", height, width, replace(self.options, **settings))

    def _vae(self, height: int, width: int, settings: Settings) -> int:
        stages = ("encode", "decode") if self.estimator.encodes else ("decode",)
        options = replace(self.options, **settings)
        return max(self.estimator.peak(stage, height, width, options) for stage in stages)

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
        short, factor = i * SEARCH_STEP, max(factor_of(self.estimator.shadow.pipe), 8)
        scale = short / min(height, width)
        longer = max(int(scale * max(height, width)) // factor * factor, short)
        return (short, longer) if height <= width else (longer, short)
