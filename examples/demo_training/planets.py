"""Windows of planets to train on: at every scale, tilted, mirrored, turned.

There is but one Earth: with its axis tilted and its first meridian elsewhere it is a planet with other coasts in other
places. All of it is done on the training's device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from .data import Pixels, pyramid

FACTOR = 8  # of the VAE
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
LARGEST_TILT = 40  # degrees
POLAR = 0.15  # of the map at either end, where it is stretched: not turned there

Levels = dict[int, tuple[torch.Tensor, torch.Tensor]]  # width: pixels [3, H, W] and classes [1, H, W], both float


@dataclass
class Windows:
    """Classes of every eighth cell `[N, H / 8, W / 8]` of windows of planets `width` wide."""

    width: int
    cells: NDArray[np.uint8]

    @property
    def whole(self) -> bool:
        return self.width in WHOLE


def build_levels(blue_marble: Pixels, cells: NDArray[np.uint8], device: str) -> Levels:
    """The planet and its classes at each scale."""

    def at(width: int) -> NDArray[np.uint8]:
        return np.array(Image.fromarray(cells).resize((width, width // 2), Image.Resampling.NEAREST))

    return {
        width: (
            torch.tensor(pixels, device=device).permute(2, 0, 1).float().contiguous(),
            torch.tensor(at(width), device=device)[None].float(),
        )
        for width, pixels in pyramid(blue_marble).items()
    }


def tilted(planes: torch.Tensor, degrees: float, spin: float, size: tuple[int, int], mode: str) -> torch.Tensor:
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


def draw_planet(levels: Levels, width: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A planet `width` wide: pixels `[3, H, W]` and classes `[1, H, W]`, tilted but for some seen from near."""
    if width == max(levels) or (width not in WHOLE and rng.random() < UNTILTED):
        return levels[width]
    tilt, spin = float(LARGEST_TILT * rng.random()), float(2 * rng.random())
    size = (width // 2, width)
    # From a map twice as large where there is one, so that nothing is blurred twice.
    larger = 2 * width if 2 * width in levels else max(levels)
    double, cells = levels[larger]
    if larger == 2 * width:
        turned = tilted(double, tilt, spin, (width, 2 * width), "bicubic")[None]
        pixels = F.interpolate(turned, size=size, mode="bicubic", antialias=True, align_corners=False)[0]
    else:
        pixels = tilted(double, tilt, spin, size, "bicubic")
    return pixels, tilted(cells, tilt, spin, size, "nearest")


@torch.inference_mode()
def draw_windows(
    levels: Levels, width: int, count: int, rng: np.random.Generator
) -> Iterator[tuple[torch.Tensor, NDArray[np.uint8]]]:
    """Pixels `[H, W, 3]` and classes of every eighth cell of windows at a scale.

    They are mirrored, upside down, and turned where they are square and not near a pole.
    """
    rows, columns = WINDOWS[width][0]
    for number in range(count):
        if width in WHOLE or number % PER_PLANET == 0:
            planet, seen = draw_planet(levels, width, rng)
            planet = planet.round().clamp(0, 255).to(torch.uint8)
        height = planet.shape[1]
        top, left = int(rng.integers(height - rows + 1)), 0 if width in WHOLE else int(rng.integers(width))
        where = torch.arange(left, left + columns, device=planet.device) % width
        part, kinds = (plane[:, top : top + rows][:, :, where] for plane in (planet, seen))
        if rows == columns and POLAR * height < top < (1 - POLAR) * height - rows and rng.random() < 0.5:
            part, kinds = part.transpose(1, 2), kinds.transpose(1, 2)
        flips = [axis for axis in (1, 2) if rng.random() < 0.5]
        part, kinds = part.flip(flips), kinds.flip(flips)
        yield (
            part.permute(1, 2, 0),
            kinds[0, FACTOR // 2 :: FACTOR, FACTOR // 2 :: FACTOR].to(torch.uint8).cpu().numpy(),
        )
