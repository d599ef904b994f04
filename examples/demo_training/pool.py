"""Windows of planets in one flat tensor on the accelerator, so that a batch of crops from many of them is one gather.

There is but one Earth, so planets are seen with their axis tilted and their first meridian elsewhere; all of that, the
scaling and the encoding is done on the device, anew in each run.
"""

from __future__ import annotations

import math
import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from .captions import captions_of
from .latents import FACTOR, LARGEST_TILT, POLAR, WEIGHTS, normalise_latents

# Height and width of windows in sample pixels and how many there are at each scale; whole planets at the first two.
WINDOWS = {
    512: ((256, 512), 2400),
    1024: ((512, 1024), 500),
    2048: ((512, 1024), 420),
    4096: ((512, 1024), 480),
    5400: ((512, 512), 640),
}
WHOLE = (512, 1024)
PER_PLANET = 24  # windows of one tilted planet
UNTILTED = 0.4  # of the planets at the scales that are painted from near
# How many crops with a caption of each shape in latent pixels. Drawn again and again, with other noise.
CROPS = {(32, 32): 60000, (32, 64): 30000, (48, 48): 20000, (64, 64): 14000, (64, 128): 9000}
# Planets that go around are what pictures of these shapes most often are.
BOOST = {((32, 64), 512): 4.0, ((64, 128), 1024): 3.0}
MARGIN = 64  # sample pixels from beyond the edge, so that a whole planet's latents go on around it
ENCODED_AT_ONCE = 4_000_000  # sample pixels
CHUNK = 1000


@dataclass
class FlatPool:
    """Windows `[N]` of different sizes as rows of `values` `[pixels, C]`, each row by row from its offset."""

    values: torch.Tensor
    offsets: torch.Tensor
    heights: torch.Tensor
    widths: torch.Tensor

    @staticmethod
    def of(planes: list[torch.Tensor]) -> FlatPool:
        """From windows `[H, W, C]`."""
        sizes = torch.tensor([each.shape[0] * each.shape[1] for each in planes])
        shapes = torch.tensor([each.shape[:2] for each in planes], device=planes[0].device)
        values = torch.cat([each.flatten(0, 1) for each in planes])
        return FlatPool(values, (sizes.cumsum(0) - sizes).to(values.device), shapes[:, 0], shapes[:, 1])

    def crops(
        self,
        index: torch.Tensor,
        top: torch.Tensor,
        left: torch.Tensor,
        shape: tuple[int, int],
        turned: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[B, C, h, w]`; what runs over the right edge goes on at the left one. `turned` `[B, 3]` says which (square)
        crops are transposed, upside down, mirrored."""
        rows = torch.arange(shape[0], device=index.device)[None, :, None]
        columns = torch.arange(shape[1], device=index.device)[None, None, :]
        if turned is not None:
            transposed, down, across = (each[:, None, None] for each in turned.unbind(1))
            rows, columns = torch.where(transposed, columns, rows), torch.where(transposed, rows, columns)
            rows = torch.where(down, shape[0] - 1 - rows, rows)
            columns = torch.where(across, shape[1] - 1 - columns, columns)
        width = self.widths[index][:, None, None]
        columns = (left[:, None, None] + columns) % width
        place = self.offsets[index][:, None, None] + (top[:, None, None] + rows) * width + columns
        return self.values[place].permute(0, 3, 1, 2)


@dataclass
class Windows:
    """Pixels `[N, H, W, 3]` on the device and classes of every eighth cell, of planets `width` wide."""

    width: int
    pixels: torch.Tensor
    cells: NDArray[np.uint8]

    @property
    def whole(self) -> bool:
        return self.width in WHOLE


def tilted_on_device(
    planes: torch.Tensor, degrees: float, spin: float, size: tuple[int, int], mode: str
) -> torch.Tensor:
    """The map `[C, H, W]` of the planet at another size, its axis tilted and its first meridian elsewhere."""
    height, width = size
    grid = {"device": planes.device, "dtype": torch.float32}
    latitude = torch.linspace(1, -1, height + 1, **grid)[:-1].add(-1 / height).mul(torch.pi / 2)[:, None]
    longitude = torch.linspace(-1, 1, width + 1, **grid)[:-1].add(1 / width).mul(torch.pi)[None]
    x, y, z = latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin().expand(height, width)
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    x, z = cosine * x - sine * z, sine * x + cosine * z
    column = torch.remainder(torch.atan2(y, x) / torch.pi + 1 + spin, 2) - 1
    columns = planes.shape[-1]
    place = torch.stack([column * columns / (columns + 4), -z.clamp(-1, 1).asin() * 2 / torch.pi], dim=-1)
    around = F.pad(planes[None], (2, 2, 0, 0), mode="circular")
    return F.grid_sample(around, place[None], mode=mode, padding_mode="border", align_corners=False)[0]


def shrunk(planes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(planes[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0]


Levels = dict[int, tuple[torch.Tensor, torch.Tensor]]  # width: pixels [3, H, W] and classes [1, H, W], both float


def levels_on_device(levels: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]], device: str) -> Levels:
    return {
        width: (
            torch.tensor(pixels, device=device).permute(2, 0, 1).float().contiguous(),
            torch.tensor(cells, device=device)[None].float(),
        )
        for width, (pixels, cells) in levels.items()
    }


def draw_planet(levels: Levels, width: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A planet `width` wide: pixels `[3, H, W]` and classes `[1, H, W]`, tilted but for some seen from near."""
    size = (width // 2, width)
    near = width not in WHOLE
    if width == max(levels) or (near and rng.random() < UNTILTED):
        return levels[width]
    tilt, spin = float(LARGEST_TILT * rng.random()), float(2 * rng.random())
    # From a map twice as large where there is one, so that nothing is blurred twice.
    larger = 2 * width if 2 * width in levels else max(levels)
    double, cells = levels[larger]
    if larger == 2 * width:
        pixels = shrunk(tilted_on_device(double, tilt, spin, (width, 2 * width), "bicubic"), size)
    else:
        pixels = tilted_on_device(double, tilt, spin, size, "bicubic")
    return pixels, tilted_on_device(cells, tilt, spin, size, "nearest")


@torch.inference_mode()
def draw_windows(levels: Levels, width: int, share: float, rng: np.random.Generator) -> Windows:
    """Windows at a scale, mirrored, upside down, and turned where they are square and not near a pole."""
    (rows, columns), count = WINDOWS[width]
    count = max(2, round(count * share))
    pixels, cells = [], []
    for number in range(count):
        if width in WHOLE or number % PER_PLANET == 0:
            planet, seen = draw_planet(levels, width, rng)
            planet = planet.round().clamp(0, 255).to(torch.uint8)
        height = planet.shape[1]
        top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width))
        if width in WHOLE:
            left = 0
        where = torch.arange(left, left + columns, device=planet.device) % width
        part, kinds = planet[:, top : top + rows][:, :, where], seen[:, top : top + rows][:, :, where]
        if rows == columns and POLAR * height < top < (1 - POLAR) * height - rows and rng.random() < 0.5:
            part, kinds = part.transpose(1, 2), kinds.transpose(1, 2)
        flips = [axis for axis in (1, 2) if rng.random() < 0.5]
        if flips:
            part, kinds = part.flip(flips), kinds.flip(flips)
        pixels.append(part.permute(1, 2, 0))
        cells.append(kinds[0, FACTOR // 2 :: FACTOR, FACTOR // 2 :: FACTOR].to(torch.uint8))
    return Windows(width, torch.stack(pixels), torch.stack(cells).cpu().numpy())


@torch.inference_mode()
def encode(vae: AutoencoderKL, windows: Windows) -> torch.Tensor:
    """Unscaled latents `[N, h, w, C]` in half precision."""
    count, height, width = windows.pixels.shape[:3]
    margin = MARGIN if windows.whole else 0
    at_once = max(1, ENCODED_AT_ONCE // (height * (width + 2 * margin)))
    latents = []
    for start in range(0, count, at_once):
        images = windows.pixels[start : start + at_once].permute(0, 3, 1, 2).float().div(127.5).sub(1)
        images = F.pad(images, (margin, margin, 0, 0), mode="circular") if margin else images
        latent = vae.encode(images).latent_dist.mode()
        beyond = margin // FACTOR
        latents.append(latent[..., beyond : latent.shape[-1] - beyond].permute(0, 2, 3, 1).half())
    return torch.cat(latents)


def encode_all(vae: AutoencoderKL, groups: list[Windows], normalise: bool) -> FlatPool:
    """Latents of unit spread of all windows; `normalise` folds their statistics into the VAE, else it has them."""
    encoded = [encode(vae, windows) for windows in groups]
    pool = FlatPool.of([latent for group in encoded for latent in group])
    values = pool.values.float()
    if normalise:
        mean, spread = normalise_latents(vae, [values[::8].T[:, :, None]])
        pool.values = ((values - mean[:, 0, 0].to(values)) / spread[:, 0, 0].to(values)).half()
    else:
        pool.values = (values * vae.config.scaling_factor).half()
    return pool


@dataclass
class Samples:
    """Crops of one shape: window, place in it, and the number of its caption."""

    index: torch.Tensor
    top: torch.Tensor
    left: torch.Tensor
    text: torch.Tensor


def draw_samples(
    groups: list[Windows], shape: tuple[int, int], count: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Group, window in it, top and left of `count` random crops."""
    fits = [all(have >= want for have, want in zip(each.cells.shape[1:], shape, strict=True)) for each in groups]
    weights = np.array(
        [
            WEIGHTS[each.width] * BOOST.get((shape, each.width), 1.0) * fit
            for each, fit in zip(groups, fits, strict=True)
        ]
    )
    group = rng.choice(len(groups), size=count, p=weights / weights.sum())
    number, height, width = (np.array([each.cells.shape[axis] for each in groups])[group] for axis in range(3))
    whole = np.array([each.whole for each in groups])[group]
    columns = np.where(whole, width, width - shape[1] + 1)
    window, top, left = (
        (rng.random(count) * limit).astype(np.int64) for limit in (number, height - shape[0] + 1, columns)
    )
    return group, window, top, left


def _cut(
    groups: list[Windows], drawn: tuple[NDArray[np.int64], ...], shape: tuple[int, int], part: slice
) -> NDArray[np.uint8]:
    cells = []
    for group, window, top, left in zip(*(each[part] for each in drawn), strict=True):
        rows = groups[group].cells[window, top : top + shape[0]]
        cells.append(rows.take(range(left, left + shape[1]), axis=1, mode="wrap"))
    return np.stack(cells)


def _done(job: Future[list[str]], arguments: tuple[Any, ...]) -> list[str]:
    """What another process wrote, or, should it have died, the same written here."""
    try:
        return job.result()
    except Exception as error:
        print(f"captions: {error!r}", flush=True)
        return captions_of(*arguments)


class Captioning:
    """Crops of every shape and their captions, written by other processes while the device does something else."""

    def __init__(self, groups: list[Windows], share: float, seed: int, workers: int) -> None:
        rng = np.random.default_rng([seed, 5])
        # Not forked: this process already uses the device.
        self.executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        self.drawn: dict[tuple[int, int], Any] = {}
        self.jobs: dict[tuple[int, int], list[tuple[Future[list[str]], tuple[Any, ...]]]] = {}
        firsts = np.cumsum([0, *(len(each.cells) for each in groups)])
        widths = np.array([each.width for each in groups])
        for number, (shape, usual) in enumerate(CROPS.items()):
            count = max(64, round(usual * share))
            drawn = draw_samples(groups, shape, count, rng)
            self.jobs[shape] = []
            for start in range(0, count, CHUNK):
                part = slice(start, start + CHUNK)
                arguments = (_cut(groups, drawn, shape, part), widths[drawn[0][part]], [seed, number, start])
                self.jobs[shape].append((self.executor.submit(captions_of, *arguments), arguments))
            self.drawn[shape] = (firsts[drawn[0]] + drawn[1], *drawn[2:])

    def result(self) -> tuple[dict[tuple[int, int], Samples], list[str]]:
        """The crops of each shape, and the captions that they number."""
        numbers: dict[str, int] = {}
        samples = {}
        for shape, jobs in self.jobs.items():
            text = [numbers.setdefault(each, len(numbers)) for job in jobs for each in _done(*job)]
            place = (torch.from_numpy(np.ascontiguousarray(each)) for each in self.drawn[shape])
            samples[shape] = Samples(*place, torch.tensor(text))
        self.executor.shutdown()
        return samples, list(numbers)
