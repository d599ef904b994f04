"""Settings that fit a budget, the cheapest first."""

from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import torch

from ..core.families import factor_of
from .counting import gibibytes, parse_bytes
from .devices import HOST, execution_device, host_bytes, weights_now, weights_on
from .estimate import Estimator

Settings = dict[str, Any]


class Saver(NamedTuple):
    """Options that save memory. `exact`: the result stays the same, to rounding."""

    settings: Settings
    exact: bool = True


# What is tried, in this order, from the cheapest: each line added to those before it, exact ones before the others.
# A denoiser's are all exact: samples do not look at each other, nor tokens in chunks, skip connections only wait
# elsewhere, and strips get the statistics of the whole map. Counted for a step of SD 1.5 at 4096 x 4096, both samples:
# skip connections bring 4.8 GiB to the device and 2.6 back (0.21 s at 25 GB/s, on streams of their own), maps 30 and 13
# (1.3 s), where arithmetic takes 1.5 s at 100 TFLOP/s; strips of 64 and 16 rows do 3 and 13 % of convolutions twice.
DENOISER_SAVERS: tuple[Saver, ...] = (
    Saver({"unet_serial": True}),
    Saver({"unet_offload": "skips"}),
    Saver({"unet_strip_rows": 64, "ff_chunk_size": 4096}),
    Saver({"unet_strip_rows": 16}),
    Saver({"unet_offload": "maps"}),  # in strips of as many rows
)
VAE_SAVERS: Mapping[str, tuple[Saver, ...]] = {
    "two-pass": (
        Saver({"vae_offload": True}),  # the same tiles, cut from a map that waits elsewhere
        Saver({"vae_attn": "blocked"}, exact=False),
        Saver({"vae_chunk_size_x": 32, "vae_chunk_size_y": 32}, exact=False),  # other tiles, other statistics
    ),
    "exact": (  # whatever is recomputed, waits elsewhere or is cut into thinner strips
        Saver({"vae_recompute": True}),
        Saver({"vae_offload": True}),
        Saver({"vae_chunk_size_y": 32}),
        Saver({"vae_chunk_size_y": 16}),
        Saver({"vae_chunk_size_y": 8}),
    ),
}
MARGIN, LEAST_MARGIN = 0.1, 2**29  # of a limit, for kernels' workspace and fragmentation
SEARCH_STEP = 64  # sample pixels
GUESSES = 2


class DoesNotFitError(ValueError):
    """Nothing fits a limit. `settings` are all that may be used."""

    def __init__(self, message: str, settings: Settings) -> None:
        super().__init__(message)
        self.settings = settings


def free_bytes(device: torch.device) -> int | None:
    """What `device` can still give, the cache that torch keeps included; None where it does not say."""
    backend: Any = getattr(torch, device.type, None)
    if device.type == "mps":
        return int(backend.recommended_max_memory() - backend.driver_allocated_memory())
    if not hasattr(backend, "mem_get_info"):
        return None
    free, _ = backend.mem_get_info(device)
    return int(free + backend.memory_reserved(device) - backend.memory_allocated(device))


def margin(limit: int) -> int:
    """What is kept free of a limit, in bytes."""
    return max(int(MARGIN * limit), LEAST_MARGIN)


def limit_bytes(limit: int | str, pipe: Any, options: Any = None) -> int | None:
    """Bytes that a pipeline may take on its device, weights and margin included, for a checked `memory_limit`.

    None for ``"auto"`` where the device does not say what it has free, as the host does not. `options` are those of the
    patch that is to be on.

    Raises:
        ValueError: it is less than the weights alone, with the margin.
    """
    device = execution_device(pipe)
    if limit == "auto":
        free = free_bytes(device)
        return None if free is None else free + weights_now(pipe, device)
    size = (parse_bytes(limit) or 0) if isinstance(limit, str) else limit
    weights = weights_on(pipe, device, options)
    if size - margin(size) <= weights:
        raise ValueError(
            f"memory_limit must be more than the weights on {device}, which take {gibibytes(weights)}, and a margin of "
            f"{gibibytes(margin(size))} that stays free; got {limit!r}"
        )
    return size


def changing(settings: Settings, vae_mode: str) -> Settings:
    """Those of the settings that change the result."""
    savers = [saver for saver in (*DENOISER_SAVERS, *VAE_SAVERS[vae_mode]) if not saver.exact]
    return {name: settings[name] for saver in savers for name in saver.settings if name in settings}


def _staying(settings: Settings) -> Settings:
    """Those that put nothing on the host."""
    return {name: value for name, value in settings.items() if not name.endswith("_offload")}


def told(settings: Settings) -> str:
    """As a call gives them."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


@dataclass(frozen=True)
class Plan:
    """Settings that fit a limit, what they need at most, and what would be needed without them, in bytes.

    `host` is what they need of the host's memory.
    """

    settings: Settings
    limit: int
    peak: int
    without: int
    host: int = 0

    def __str__(self) -> str:
        kept = f"memory_limit of {gibibytes(self.limit)}, of which {gibibytes(margin(self.limit))} stay free"
        if not self.settings:
            return f"{kept}: no saver needed; estimated peak {gibibytes(self.peak)}"
        peaks = f"estimated peak {gibibytes(self.peak)}, without them {gibibytes(self.without)}"
        peaks += f"; {gibibytes(self.host)} on the host" if self.host else ""
        return f"{kept}: {told(self.settings)}; {peaks}"


class Planner:
    """Finds the cheapest settings that fit `limit` bytes. Those of the `options` that are named in `kept` stay."""

    def __init__(self, estimator: Estimator, limit: int, options: Any, kept: frozenset[str]) -> None:
        self.estimator = estimator
        self.limit = limit
        self.options = options
        self.room = limit - margin(limit) - estimator.weights
        stages = ("encode", "decode") if estimator.encodes else ("decode",)
        self.denoiser = list(self._ladder(DENOISER_SAVERS, kept))
        self.vae = list(self._ladder(VAE_SAVERS[options.vae_mode], kept))
        self._ladders = ((("step",), self.denoiser), (stages, self.vae))

    def _ladder(self, savers: tuple[Saver, ...], kept: frozenset[str]) -> Iterator[Settings]:
        """No saver, the first one, the first two, and so on, of those that may be used and can save anything."""
        settings: Settings = {}
        yield settings
        for saver in savers:
            added = {name: value for name, value in saver.settings.items() if name not in kept and self._helps(name)}
            if added:
                settings = settings | added
                yield settings

    def _helps(self, name: str) -> bool:
        return not (name.endswith("_offload") and self.estimator.device.type == HOST)

    def plan(self, height: int, width: int) -> Plan:
        """For an image of ``height x width`` sample pixels.

        Raises:
            DoesNotFitError: nothing fits. The message says what is needed at least, and the largest size that fits.
            ValueError: it is not known how pipelines call one of the models.
        """
        settings: Settings = {}
        peak = without = host = 0
        for stages, ladder in self._ladders:
            needed = [partial(self._needs, stages, height, width, tried) for tried in ladder]
            enough = self._first_that_fits(needed)
            if enough == len(ladder):
                raise DoesNotFitError(self._refusal(height, width), self.denoiser[-1] | self.vae[-1])
            settings |= ladder[enough]
            peak, without = max(peak, needed[enough]()), max(without, needed[0]())
            host = max(host, self._needs_of_host(stages, height, width, ladder[enough]))
        if host > (there := host_bytes() or host):
            raise DoesNotFitError(self._host_refusal(height, width, settings, host, there), _staying(settings))
        weights = self.estimator.weights
        return Plan(settings, self.limit, weights + peak, weights + without, host)

    def _first_that_fits(self, needed: Sequence[Callable[[], int]]) -> int:
        """The place of the first of some counts that fits, or their number: each is less than the one before."""
        if needed[0]() <= self.room:
            return 0
        first, last = 1, len(needed)
        while first < last:
            middle = (first + last - 1) // 2  # the later ones take longer to count
            first, last = (first, middle) if needed[middle]() <= self.room else (middle + 1, last)
        return first

    def _needs(self, stages: tuple[str, ...], height: int, width: int, settings: Settings) -> int:
        """Bytes that the largest of some stages needs, beside the weights."""
        options = replace(self.options, **settings)
        return max(self.estimator.peak(stage, height, width, options) for stage in stages)

    def _needs_of_host(self, stages: tuple[str, ...], height: int, width: int, settings: Settings) -> int:
        options = replace(self.options, **settings)
        return max(self.estimator.host_peak(stage, height, width, options) for stage in stages)

    def _host_refusal(self, height: int, width: int, settings: Settings, needed: int, there: int) -> str:
        return (
            f"memory_limit of {gibibytes(self.limit)} needs {told(settings)} for {width}x{height} sample pixels, and "
            f"they need {gibibytes(needed)} of the host's memory; it has {gibibytes(there)}"
        )

    def _refusal(self, height: int, width: int) -> str:
        least = {stages: self._needs(stages, height, width, ladder[-1]) for stages, ladder in self._ladders}
        largest: tuple[int, int] | None = (height, width)
        for stages, ladder in sorted(self._ladders, key=lambda pair: least[pair[0]], reverse=True):
            largest = largest and self._largest(stages, *largest, ladder[-1])
        what_fits = "no size does" if largest is None else "the largest image of this shape that does is {1}x{0}"
        return (
            f"memory_limit of {gibibytes(self.limit)}, of which {gibibytes(margin(self.limit))} stay free, does not "
            f"fit {width}x{height} sample pixels, which need "
            f"{gibibytes(self.estimator.weights + max(least.values()))} with every saver that may be used; "
            + what_fits.format(*largest or ())
        )

    def _largest(self, stages: tuple[str, ...], height: int, width: int, settings: Settings) -> tuple[int, int] | None:
        """The largest size of nearly the same shape for which some stages fit: this one, or whole search steps."""
        sides = [self._scaled(height, width, i) for i in range(1, ceil(min(height, width) / SEARCH_STEP))]
        sides.append((height, width))

        def beyond(i: int) -> int:
            return self._needs(stages, *sides[i], settings) - self.room

        low, high = -1, len(sides)  # what fits, and what does not
        probe, stride = high - 1, 1
        for found in self._guesses([tall * wide for tall, wide in sides], beyond):
            low, high = (max(low, found), high) if beyond(found) <= 0 else (low, min(high, found))
            probe = found
        while high - low > 1:  # away from the last guess, faster and faster, and then in halves
            probe = low + stride if probe == low else high - stride
            stride *= 2
            if not low < probe < high:
                probe = (low + high) // 2
            low, high = (probe, high) if beyond(probe) <= 0 else (low, probe)
        return sides[low] if low >= 0 else None

    def _guesses(self, areas: list[int], beyond: Callable[[int], int]) -> Iterator[int]:
        """Places of sizes among the `areas`, the largest first, then nearer and nearer to where nothing is `beyond`
        what there is, if that grows as the area does, from nothing or along a line."""
        last = len(areas) - 1
        yield last
        if beyond(last) <= 0:
            return
        points = [(0, -self.room), (areas[last], beyond(last))]
        for _ in range(GUESSES):
            (a, low), (b, high) = points[-2:]
            if low == high:
                return
            guess = bisect(areas, b - high * (b - a) / (high - low)) - 1
            guess = min(max(guess, 0), last - 1)
            yield guess
            points.append((areas[guess], beyond(guess)))

    def _scaled(self, height: int, width: int, i: int) -> tuple[int, int]:
        """The size whose shorter side is `i` search steps, both in whole latent pixels."""
        short, factor = i * SEARCH_STEP, max(factor_of(self.estimator.shadow.pipe), 8)
        scale = short / min(height, width)
        longer = max(int(scale * max(height, width)) // factor * factor, short)
        return (short, longer) if height <= width else (longer, short)
