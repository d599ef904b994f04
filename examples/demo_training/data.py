"""The photographs: fetch, find, load, crop.

Everything is drawn from a `numpy` generator seeded by the training step, so a run that was
interrupted and resumed sees the same crops as one that was not.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

PACKAGES = ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds", "plasma-workspace-wallpapers")
CAPTIONS = Path(__file__).resolve().parent.parent / "captions.json"
# The wallpapers reach 24 megapixels, which Pillow takes for a decompression bomb only above 89.
SCALES = (1, 2, 4)
DRAWING_WEIGHT = 0.25


@dataclass(frozen=True)
class Photo:
    """One picture, `levels[i]` being a `[H, W, 3]` uint8 array at `1 / SCALES[i]` of its native size."""

    name: str
    caption: str
    kind: str
    levels: tuple[np.ndarray, ...]

    @property
    def weight(self) -> float:
        return DRAWING_WEIGHT if self.kind == "drawings" else 1.0


def fetch_packages(folder: Path) -> Path:
    """Download and unpack the Debian packages with the photographs; done only once per folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        target = folder / package
        if target.exists():
            continue
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
        (deb,) = folder.glob(f"{package}_*.deb")
        unpacking = folder / f"{package}.part"
        subprocess.run(["dpkg-deb", "-x", str(deb), str(unpacking)], check=True)
        os.replace(unpacking, target)
        deb.unlink()
    return folder


def sample_image_folders() -> list[Path]:
    """The folders of sample pictures that scikit-image and scikit-learn install, where they are installed."""
    found = []
    for module, inside in (("skimage", "data"), ("sklearn", "datasets/images")):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            found.append(Path(spec.origin).parent / inside)
    return found


def load_photos(folders: list[Path], kinds: tuple[str, ...], captions: Path = CAPTIONS) -> list[Photo]:
    """Load every captioned picture below `folders`; pictures without a caption are not used.

    Keys of the captions file are the ends of paths, so the same file serves however packages are unpacked.
    """
    table = json.loads(captions.read_text(encoding="utf-8"))
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    photos, missing = [], []
    wanted = [(kind, end, caption) for kind in kinds for end, caption in table.get(kind, {}).items()]
    for kind, end, caption in tqdm(wanted, desc="photographs", mininterval=5):
        match = next((path for path in files if path.as_posix().endswith("/" + end)), None)
        if match is None:
            missing.append(end)
            continue
        photos.append(Photo(_short_name(end), caption, kind, _pyramid(match)))
    if missing:
        print(f"not found, left out: {', '.join(missing)}")
    if not photos:
        raise ValueError(f"folders {[str(f) for f in folders]} hold no picture named in {captions}")
    return photos


def _short_name(end: str) -> str:
    parts = end.split("/")
    return parts[1] if parts[0] == "wallpapers" else Path(parts[-1]).stem.split("_by_")[0]


def _pyramid(path: Path) -> tuple[np.ndarray, ...]:
    image = Image.open(path).convert("RGB")
    return tuple(np.asarray(image if scale == 1 else image.reduce(scale)) for scale in SCALES)


def random_crop(photo: Photo, size: int, rng: np.random.Generator) -> np.ndarray:
    """A `[size, size, 3]` crop from a random scale that is large enough, mirrored half of the time."""
    large_enough = [level for level in photo.levels if min(level.shape[:2]) >= size]
    level = large_enough[rng.integers(len(large_enough))]
    top = rng.integers(level.shape[0] - size + 1)
    left = rng.integers(level.shape[1] - size + 1)
    crop = level[top : top + size, left : left + size]
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def random_batch(photos: list[Photo], batch: int, size: int, rng: np.random.Generator) -> torch.Tensor:
    """Random crops as a float tensor `[batch, 3, size, size]` in [-1, 1]."""
    usable = [photo for photo in photos if min(photo.levels[0].shape[:2]) >= size]
    weights = np.array([photo.weight for photo in usable])
    chosen = rng.choice(len(usable), size=batch, p=weights / weights.sum())
    return to_tensor(np.stack([random_crop(usable[i], size, rng) for i in chosen]))


def center_crop(level: np.ndarray, size: int) -> np.ndarray:
    top, left = (level.shape[0] - size) // 2, (level.shape[1] - size) // 2
    return level[top : top + size, left : left + size]


def to_tensor(crops: np.ndarray) -> torch.Tensor:
    """uint8 `[B, H, W, 3]` to float `[B, 3, H, W]` in [-1, 1]."""
    images = torch.from_numpy(crops.astype(np.float32)).permute(0, 3, 1, 2)
    return images.div(127.5).sub(1).contiguous()


def to_array(images: torch.Tensor) -> np.ndarray:
    """The inverse of `to_tensor`, rounded and clipped."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays."""
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))
