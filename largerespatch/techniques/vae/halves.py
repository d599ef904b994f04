"""An encoder or decoder in pieces: what the ways to do so share, and the exact one, strip by strip."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from ...core.bands import ALONE, Bands, at
from ...core.families import Order, Site
from ...core.hosts import Host
from ...core.maps import StoredMap
from ...core.patching import PatchStack
from ...core.pieces import collect, rehearsing
from ...core.weights import weights_found, weights_held
from ..listening import is_of_user, listen_everywhere, listeners, silence
from ..strips.strips import Forward
from .walk import Walk, inner_modules, steps, walked
from .walked import WalkedUpsample

ProgressBar = Callable[..., AbstractContextManager[Any]]

# Rows of a strip whose halo is so small a share of the work that larger ones save no time.
ENOUGH_ROWS = 32
COMMON_FACTOR = 8  # sample pixels of a latent pixel


@dataclass(frozen=True)
class Cutting:
    """How an encoder or decoder is cut, sizes in latent pixels.

    `latent_scale` is the size of its input relative to the latent (1 for a decoder, 8 for SD's encoder), `wrap` says
    whether the plane's opposite edges are neighbours (circular padding), `progress_bar` is the pipeline's, called with
    ``total``, and `title` goes with it. `in_turns` says whether the samples of a batch run one after another, `factor`
    how many sample pixels a latent pixel measures. Of several processes each runs its band, which is one of `bands`.
    """

    tile_height: int
    tile_width: int
    latent_scale: int
    wrap: bool
    progress_bar: ProgressBar
    title: str
    in_turns: bool = False
    factor: int = COMMON_FACTOR
    bands: Bands = ALONE

    @property
    def strip_height(self) -> int:
        """The rows of a strip, whatever the map: as many as a tile has latent pixels, if these were of common size.

        Where they are larger a tile has few, and the halos of strips of few rows would be most of the work. But never
        more than enough for that reason.
        """
        return max(self.tile_height, min(self.tile_height * self.factor // COMMON_FACTOR, ENOUGH_ROWS))


class InPieces(ABC):
    """Takes the place of an encoder's or decoder's ``forward`` for inputs ``[B, C, H, W]``.

    An input of at most one tile goes through the original.

    Args:
        model: the encoder or decoder, and `path` its name in messages.
        cutting: the size of a tile, and the rest.
        host: where maps that are not in tiles live, if that is not where the model runs, while parts of them visit the
            device. None: they stay on the device. Attention to a map takes it in pieces where it is large.
    """

    def __init__(self, model: nn.Module, path: str, cutting: Cutting, host: Host | None = None) -> None:
        self.model = model
        self.path = path
        self.cutting = cutting
        self.host = host
        self._warned = False

    def __call__(self, original: Forward, sample: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if self.is_one(sample):
            return original(sample, *args, **kwargs)
        height, width = self._size(sample)
        if torch.is_grad_enabled() and sample.requires_grad:
            raise RuntimeError(
                f"{self.cutting.title} of {width}x{height} latent pixels runs in pieces, which have no gradients: "
                "detach its input, leave the block of LargeResPatch, or give it larger vae_chunk_size_x and _y"
            )

        def run(some: torch.Tensor) -> torch.Tensor:
            return self._run(lambda part: original(part, *args, **kwargs), some)

        with torch.no_grad():
            if not self.cutting.in_turns or len(sample) == 1:
                return run(sample)
            with weights_found(self.model.modules()):
                return _together(collect(range(len(sample)), lambda i: run(sample[i : i + 1])))

    def is_one(self, sample: torch.Tensor) -> bool:
        """Whether an input ``[..., H, W]`` is of at most one tile, and no band."""
        height, width = self._size(sample)
        return self.cutting.bands.alone and height <= self.cutting.tile_height and width <= self.cutting.tile_width

    @property
    def makes_pictures(self) -> bool:
        """Whether it is a decoder."""
        return self.cutting.latent_scale == 1

    def _size(self, sample: torch.Tensor) -> tuple[int, int]:
        """In latent pixels."""
        height, width = sample.shape[-2:]
        return height // self.cutting.latent_scale, width // self.cutting.latent_scale

    @abstractmethod
    def _run(self, original: Callable[[torch.Tensor], torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        """The result for an input of more than one tile."""

    def _silence(self, stack: PatchStack, inner: dict[str, nn.Module]) -> None:
        """Forward hooks of the user on modules that see pieces alone are not called; one warning says so.

        Pre-hooks still are, since some bring a module's weights into shape, and so are hooks on all modules there are:
        the warning says what they see.
        """
        silent = silence(stack, inner)
        ahead = [path for path, module in inner.items() if any(map(is_of_user, module._forward_pre_hooks.values()))]
        consequences = []
        if silent:
            consequences.append(f"the forward hooks on {len(silent)} of its modules are not called ({_some(silent)})")
        if ahead:
            consequences.append(f"the forward pre-hooks on {len(ahead)} of its modules see pieces ({_some(ahead)})")
        if listen_everywhere():
            consequences.append("hooks that are registered for every module there is see pieces")
        if consequences and not self._warned and not rehearsing():
            self._warned = True
            warnings.warn(
                f"{self.cutting.title} runs in pieces, so {' and '.join(consequences)}; "
                "larger vae_chunk_size_x and _y run it whole",
                RuntimeWarning,
                stacklevel=2,
            )

    @contextmanager
    def _progress(self, total: int) -> Iterator[Any]:
        with self.cutting.progress_bar(total=total) as bar:
            bar.set_description(self.cutting.title)
            yield bar


class Exact(InPieces):
    """Strip by strip with the group statistics of the whole map; exact, each module to rounding.

    No arithmetic is done twice but in the halos of the strips (a row or two on each side). Larger in memory than two
    passes: whole maps are alive, about half as many as in the original.

    Args:
        model, path, cutting, host: see above.
        recompute: at the finest level, where maps are largest, no map exists but the outputs of residual blocks: an
            upsampler's is computed three times and the one between two convolutions twice, strip by strip. Not so
            where a user's hook may keep what it is given. Weights that come to the device for that upsampler, or the
            block that it is in, then stay to the end.
        unused: a child that is not called.

    Raises:
        ValueError: `model` holds a module that cannot be run strip by strip.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        cutting: Cutting,
        recompute: bool = False,
        host: Host | None = None,
        unused: nn.Module | None = None,
    ) -> None:
        super().__init__(model, path, cutting, host)
        left_out = set() if unused is None else set(unused.modules())
        self.steps = {place: module for place, module in steps(model, path) if module not in left_out}
        # An error now rather than in the call.
        ways = {place: walked(module, place, Walk(1, False)) for place, module in self.steps.items()}
        upsamplers = [place for place, way in ways.items() if isinstance(way, WalkedUpsample)]
        scales = [getattr(way, "scale", 1) for way in ways.values()]
        self.doublings, self.halvings = scales.count(2), scales.count(Fraction(1, 2))
        self.by_rows = any(getattr(way, "by_rows", False) for way in ways.values())
        self.recompute = recompute and any(getattr(way, "saves_if_recomputed", False) for way in ways.values())
        # Called when their block is done.
        self.late = self._around(upsamplers[-1]) if recompute and upsamplers else []
        self.holds = [[*self.late, *self._around(place)] for place in self.steps]

    def _around(self, place: str) -> list[nn.Module]:
        """The modules that the one at `place` is in, itself, and those in it."""
        names = place.removeprefix(self.path).split(".")[1:]
        line = list(accumulate(names, getattr, initial=self.model))
        return [*line[:-1], *line[-1].modules()]

    @property
    def sizes(self) -> dict[str, Any]:
        """How its maps follow from its input; see `largerespatch.core.band_rows.banded`."""
        return {"halvings": self.halvings, "doublings": self.doublings, "rounds_up": False}

    def _run(self, original: Callable[[torch.Tensor], torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        passing = not listeners(self.model)
        # What a hook may keep has to have memory of its own.
        finest = sample.shape[-2] * 2**self.doublings if passing else None
        rows, wrap, bands = self.cutting.strip_height, self.cutting.wrap, self.cutting.bands
        ways = self.recompute, self.by_rows, None if bands.alone else bands
        walk = Walk(rows, wrap, self.host, passing, finest, *ways)
        late = self.late if passing else []
        last = list(self.steps)[-1] if self.makes_pictures else ""
        with weights_held(late), PatchStack() as stack, self._progress(len(self.steps)) as bar:

            def counted(technique: Forward, path: str) -> Forward:
                def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
                    walk.delivers = path == last
                    with at(path):
                        result = technique(*args, **kwargs)
                    bar.update()
                    return result

                return forward

            for path, module in self.steps.items():
                Site(module, path, Order.IN_STRIPS, counted(walk.technique(module, path), path)).install(stack)
            self._silence(stack, inner_modules(self.model, self.path))
            return delivered(original(sample), self.makes_pictures)


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")


def _together(results: Sequence[torch.Tensor]) -> torch.Tensor:
    """The results for the samples of a batch: on their device, or on the host if some did not find room there."""
    if len({result.device for result in results}) > 1:
        results = [result.cpu() for result in results]
    return torch.cat(list(results))


def delivered(result: torch.Tensor, picture: bool = False) -> torch.Tensor:
    """What an encoder or decoder gives: on its device, but a large picture that is on the host stays there.

    A pipeline turns it to numbers from 0 to 1, which takes three times its memory.
    """
    return result.delivered(stays=picture) if isinstance(result, StoredMap) else result
