"""Settings that fit a budget, the cheapest first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, takewhile
from typing import Any, NamedTuple

import torch

from ..core.families import factor_of
from .counting import gibibytes, parse_bytes
from .devices import HOST, execution_device, host_bytes, weights_now, weights_on
from .estimate import Estimator

Settings = dict[str, Any]


class Saver(NamedTuple):
    """Options that save memory. `exact`: the result stays the same, to rounding.

    `leaves` is about what share of the bytes is needed with it, and with those before it: of large images, so that the
    first guess is a good one.
    """

    settings: Settings
    leaves: float = 1.0
    exact: bool = True


# What is tried, in this order, from the cheapest: each line added to those before it, exact ones before the others.
# A denoiser's are all exact: samples do not look at each other, nor tokens in chunks, skip connections only wait
# elsewhere, and strips get the statistics of the whole map. Counted for a step of SD 1.5 at 4096 x 4096, both samples:
# skip connections bring 4.8 GiB to the device and 2.6 back (0.21 s at 25 GB/s, on streams of their own), maps 30 and 13
# (1.3 s), where arithmetic takes 1.5 s at 100 TFLOP/s; strips of 64 and 16 rows do 3 and 13 % of convolutions twice.
DENOISER_SAVERS: tuple[Saver, ...] = (
    Saver({"unet_serial": True}, 0.5),
    Saver({"unet_offload": "skips"}, 0.35),
    Saver({"unet_strip_rows": 64, "ff_chunk_size": 4096}, 0.13),
    Saver({"unet_strip_rows": 16}, 0.11),
    Saver({"unet_offload": "maps"}, 0.02),  # in strips of as many rows
)
VAE_SAVERS: Mapping[str, tuple[Saver, ...]] = {
    "two-pass": (
        Saver({"vae_offload": True}, 0.04),  # the same tiles, cut from a map that waits elsewhere
        Saver({"vae_attn": "blocked"}, 0.035, exact=False),
        Saver({"vae_chunk_size_x": 32, "vae_chunk_size_y": 32}, 0.03, exact=False),  # other tiles, other statistics
    ),
    "exact": (  # whatever is recomputed, waits elsewhere or is cut into thinner strips
        Saver({"vae_recompute": True}, 0.6),
        Saver({"vae_offload": True}, 0.1),
        Saver({"vae_chunk_size_y": 32}, 0.05),
        Saver({"vae_chunk_size_y": 16}, 0.03),
        Saver({"vae_chunk_size_y": 8}, 0.02),
    ),
}
MARGIN, LEAST_MARGIN = 0.1, 2**29  # of a limit, for kernels' workspace and fragmentation
SEARCH_STEP = 64  # sample pixels, the shortest side of images that are tried where nothing fits
SEARCH_FROM = 0.9  # where those left are parted: what is too much is known sooner than what fits


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
        self.denoiser = self._ladder(("step",), DENOISER_SAVERS, kept)
        self.vae = self._ladder(stages, VAE_SAVERS[options.vae_mode], kept)
        # That of the VAE takes less time to count: a refusal comes sooner.
        self._ladders = ((stages, self.vae), (("step",), self.denoiser))

    def _ladder(self, stages: tuple[str, ...], savers: tuple[Saver, ...], kept: frozenset[str]) -> list[Saver]:
        """No saver, the first one, the first two, and so on, of those that may be used and can save anything."""

        def helps(name: str, value: Any) -> bool:
            leaves = not (name.endswith("_offload") and self.estimator.device.type == HOST)
            return name not in kept and leaves and self.estimator.saves(stages, name, value)

        ladder = [Saver({})]
        for saver in savers:
            added = {name: value for name, value in saver.settings.items() if helps(name, value)}
            if added:
                ladder.append(saver._replace(settings=ladder[-1].settings | added))
        return ladder

    def plan(self, height: int, width: int) -> Plan:
        """For an image of ``height x width`` sample pixels.

        Raises:
            DoesNotFitError: nothing fits. The message says what is needed at least, and the largest size that fits.
            ValueError: it is not known how pipelines call one of the models.
        """
        settings: Settings = {}
        peak = without = host = 0
        for stages, ladder in self._ladders:
            picked = self._pick(stages, ladder, height, width)
            settings = picked | settings
            peak = max(peak, self._needs(stages, height, width, picked))
            without = max(without, self._needs(stages, height, width, {}))
            host = max(host, self._needs_of_host(stages, height, width, picked))
        weights = self.estimator.weights
        return Plan(settings, self.limit, weights + peak, weights + without, host)

    def _pick(self, stages: tuple[str, ...], ladder: Sequence[Saver], height: int, width: int) -> Settings:
        """What of a ladder to take for some stages: the first that fits, or the first of those without the host, too,
        where that has no room."""
        needs = partial(self._needs, stages, height, width)
        first = partial(self._first_that_fits, needs=needs, fits=partial(self._fits, stages, height, width))
        picked, everything = first(ladder), self.denoiser[-1].settings | self.vae[-1].settings
        if picked is None:
            least = self.estimator.weights + needs(ladder[-1].settings)
            raise DoesNotFitError(self._refusal(height, width, least), everything)
        needed, there = self._needs_of_host(stages, height, width, picked), host_bytes()
        if there is None or needed <= there:
            return picked
        on_device = first([saver._replace(settings=_staying(saver.settings)) for saver in ladder])
        if on_device is None:
            raise DoesNotFitError(self._host_refusal(height, width, picked, needed, there), _staying(everything))
        return on_device

    def _first_that_fits(
        self, ladder: Sequence[Saver], needs: Callable[[Settings], int], fits: Callable[[Settings], bool]
    ) -> Settings | None:
        """The first on a ladder that fits, if any does: each needs no more than the one before.

        Each count takes time. So the first are where `Saver.leaves` has it, and just before, or else at the end.
        """
        without = needs(ladder[0].settings)
        if without <= self.room:
            return ladder[0].settings
        above, below, last = 0, len(ladder), len(ladder) - 1  # what does not fit, and what does
        guess = next((i for i, saver in enumerate(ladder) if saver.leaves * without <= self.room), last)
        while below - above > 1:
            likely = (i for i in (guess, guess - 1, last) if above < i < below)
            tried = next(likely, (above + below) // 2)
            settings = ladder[tried].settings
            # What the last one needs is told where it is too much.
            enough = needs(settings) <= self.room if tried == last else fits(settings)
            above, below = (above, tried) if enough else (tried, below)
        return ladder[below].settings if below < len(ladder) else None

    def _needs(self, stages: tuple[str, ...], height: int, width: int, settings: Settings) -> int:
        """Bytes that the largest of some stages needs, beside the weights."""
        options = replace(self.options, **settings)
        return max(self.estimator.peak(stage, height, width, options) for stage in stages)

    def _fits(self, stages: tuple[str, ...], height: int, width: int, settings: Settings) -> bool:
        """Whether they need no more than there is room for."""
        options = replace(self.options, **settings)
        return all(self.estimator.fits(stage, height, width, options, self.room) for stage in stages)

    def _needs_of_host(self, stages: tuple[str, ...], height: int, width: int, settings: Settings) -> int:
        options = replace(self.options, **settings)
        return max(self.estimator.host_peak(stage, height, width, options) for stage in stages)

    def _host_refusal(self, height: int, width: int, settings: Settings, needed: int, there: int) -> str:
        return (
            f"memory_limit of {gibibytes(self.limit)} needs {told(settings)} for {width}x{height} sample pixels, and "
            f"they need {gibibytes(needed)} of the host's memory; it has {gibibytes(there)}"
        )

    def _refusal(self, height: int, width: int, least: int) -> str:
        largest = self._largest(height, width)
        what_fits = "no size does" if largest is None else "the largest image of this shape that does is about {1}x{0}"
        return (
            f"memory_limit of {gibibytes(self.limit)}, of which {gibibytes(margin(self.limit))} stay free, does not "
            f"fit {width}x{height} sample pixels, which need at least {gibibytes(least)} with every saver that may be "
            "used; " + what_fits.format(*largest or ())
        )

    def _largest(self, height: int, width: int) -> tuple[int, int] | None:
        """The largest of some sizes of nearly the same shape that fits with every saver; None: none does."""
        # 64, 128, 192, 256, 384, 512, 768, ..: of whole tiles, which are soon counted.
        sides = chain([SEARCH_STEP], (SEARCH_STEP * part << i for i in count() for part in (2, 3)))
        sizes = [self._scaled(height, width, side) for side in takewhile(lambda side: side < min(height, width), sides)]
        asked = [(stages, ladder[-1].settings) for stages, ladder in self._ladders]
        fitting = dict.fromkeys((stages for stages, _ in asked), 0)  # how many of the sizes, as far as is known

        def too_large(place: int) -> bool:
            for i, (stages, settings) in enumerate(asked):
                if place >= fitting[stages]:
                    if not self._fits(stages, *sizes[place], settings):
                        asked.insert(0, asked.pop(i))  # what is too much for one size is likely to be so for the next
                        return True
                    fitting[stages] = place + 1
            return False

        low, high = 0, len(sizes)
        while low < high:
            place = low + int(SEARCH_FROM * (high - low))
            low, high = (low, place) if too_large(place) else (place + 1, high)
        # A smaller image may need more: less of it is large enough to wait on the host.
        while low and not all(self._fits(stages, *sizes[low - 1], settings) for stages, settings in asked):
            low -= 1
        return sizes[low - 1] if low else None

    def _scaled(self, height: int, width: int, short: int) -> tuple[int, int]:
        """The size whose shorter side is so long, both in whole latent pixels."""
        factor = max(factor_of(self.estimator.shadow.pipe), 8)
        scale = short / min(height, width)
        longer = max(int(scale * max(height, width)) // factor * factor, short)
        return (short, longer) if height <= width else (longer, short)
