"""What the denoisers are trained on: windows of planets at every scale, as latents, with what is to be seen in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from .captions import caption
from .data import SCALES, Pixels, crop, resized, to_tensor
from .loop import save_atomically

FACTOR = 8
PLANET, WINDOW = (256, 512), (384, 384)  # height and width of windows: of the whole planet, and of parts of it
# Windows at each scale, and how often they are drawn.
COUNTS = {512: 160, 1024: 160, 2048: 240, 4096: 280, 5400: 160}
WEIGHTS = {512: 1.3, 1024: 1.0, 2048: 1.2, 4096: 1.2, 5400: 0.6}
TILTED = (512, 1024)
LARGEST_TILT = 40  # degrees
POLAR = 0.15  # of the map at either end, where it is stretched: not turned there


@dataclass(frozen=True)
class Window:
    """A latent `[C, H, W]` of unit spread and the classes of what it shows `[H, W]`, of a planet `width` wide."""

    width: int
    latent: torch.Tensor
    cells: NDArray[np.uint8]


def tilted(pixels: NDArray[np.uint8], degrees: float, spin: float, nearest: bool) -> NDArray[np.uint8]:
    """The map of the planet, `[H, W]` or `[H, W, C]`, with its axis tilted and its first meridian elsewhere.

    There is but one Earth: from a tilted axis it is a planet with other coasts in other places.
    """
    height, width = pixels.shape[:2]
    latitude = torch.linspace(1, -1, height + 1)[:-1].add(-1 / height).mul(torch.pi / 2)[:, None]
    longitude = torch.linspace(-1, 1, width + 1)[:-1].add(1 / width).mul(torch.pi)[None]
    x, y, z = latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin().expand(height, width)
    angle = torch.tensor(degrees).deg2rad()
    x, z = angle.cos() * x - angle.sin() * z, angle.sin() * x + angle.cos() * z
    column = torch.remainder(torch.atan2(y, x) / torch.pi + 1 + spin, 2) - 1
    place = torch.stack([column * width / (width + 2), -z.clamp(-1, 1).asin() * 2 / torch.pi], dim=-1)
    planes = torch.from_numpy(pixels.reshape(height, width, -1).astype(np.float32)).permute(2, 0, 1)[None]
    around = F.pad(planes, (1, 1, 0, 0), mode="circular")
    mode = "nearest" if nearest else "bilinear"
    moved = F.grid_sample(around, place[None], mode=mode, padding_mode="border", align_corners=False)
    return moved[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy().reshape(pixels.shape)


def draw_window(
    levels: dict[int, tuple[Pixels, NDArray[np.uint8]]], width: int, rng: np.random.Generator
) -> tuple[Pixels, NDArray[np.uint8]]:
    """Pixels and classes of a random window at a scale."""
    pixels, cells = levels[width]
    if width in TILTED:
        tilt, spin = LARGEST_TILT * rng.random(), 2 * rng.random()
        # From a map twice as large, so that nothing is blurred twice.
        double, double_cells = levels[2 * width]
        pixels = resized(tilted(double, tilt, spin, nearest=False), width)
        cells = tilted(double_cells, tilt, spin, nearest=True)[::2, ::2]
    height = pixels.shape[0]
    rows, columns = PLANET if height == PLANET[0] else WINDOW
    top, left = rng.integers(height - rows + 1), rng.integers(width)
    window, seen = (crop(plane, top, left, rows, columns) for plane in (pixels, cells))
    if rows == columns and top > POLAR * height and top + rows < (1 - POLAR) * height:
        quarters = rng.integers(4)
        window, seen = np.rot90(window, quarters), np.rot90(seen, quarters)
    if rng.random() < 0.5:
        window, seen = window[:, ::-1], seen[:, ::-1]
    if rng.random() < 0.5:
        window, seen = window[::-1], seen[::-1]
    return window, seen


def build_levels(blue_marble: Pixels, cells: NDArray[np.uint8]) -> dict[int, tuple[Pixels, NDArray[np.uint8]]]:
    """The planet and its classes at each scale."""

    def at(width: int) -> NDArray[np.uint8]:
        return np.asarray(Image.fromarray(cells).resize((width, width // 2), Image.Resampling.NEAREST))

    return {scale.width: (resized(blue_marble, scale.width), at(scale.width)) for scale in SCALES}


@torch.inference_mode()
def encode_windows(
    vae: AutoencoderKL, levels: dict[int, tuple[Pixels, NDArray[np.uint8]]], share: float, seed: int
) -> list[Window]:
    """Windows with unscaled latents, `share` of `COUNTS` at each scale."""
    device = next(vae.parameters()).device
    rng = np.random.default_rng([seed, 7])
    widths = [width for width, count in COUNTS.items() for _ in range(max(1, round(count * share)))]
    windows = []
    for width in tqdm(widths, desc="latents", mininterval=10):
        window, cells = draw_window(levels, width, rng)
        image = to_tensor(np.ascontiguousarray(window)[None]).to(device)
        latent = vae.encode(image).latent_dist.mode()[0].half().cpu()
        windows.append(Window(width, latent, np.ascontiguousarray(cells[FACTOR // 2 :: FACTOR, FACTOR // 2 :: FACTOR])))
    return windows


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, latents: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre the latent channels and give them one common spread, then set `scaling_factor` to make it 1.

    Exact: what is folded into the convolution behind the encoder is undone by the one before the decoder. Pipelines
    know one factor for all channels and no shift, so a channel with a mean of its own would never be noise-like.
    Returns mean and spread of what was there, `[C, 1, 1]`.
    """
    flat = torch.cat([latent.flatten(1) for latent in latents], dim=1).double()
    mean, spread = flat.mean(dim=1), flat.std(dim=1)
    common = spread.log().mean().exp()
    gain = (common / spread).to(vae.dtype)
    channels = len(gain)
    after, before = vae.quant_conv, vae.post_quant_conv
    centre, gain = mean.to(after.weight), gain.to(after.weight.device)
    after.weight[:channels] *= gain[:, None, None, None]
    after.bias[:channels] = (after.bias[:channels] - centre) * gain
    after.bias[channels:] += 2 * gain.log()
    before.bias += before.weight[:, :, 0, 0] @ centre
    before.weight /= gain[None, :, None, None]
    vae.register_to_config(scaling_factor=round(1 / common.item(), 5), shift_factor=0.0)
    return mean.float()[:, None, None], spread.float()[:, None, None]


def prepare_latents(
    vae: AutoencoderKL,
    levels: dict[int, tuple[Pixels, NDArray[np.uint8]]],
    folder: Path,
    *,
    share: float = 1.0,
    seed: int = 0,
) -> list[Window]:
    """Encode the windows once, normalise the VAE's latents in place, return the windows with scaled latents."""
    cache = folder / "latents.pt"
    makers = [*vae.encoder.parameters(), *vae.quant_conv.parameters()]
    fingerprint = [sum(parameter.double().abs().sum().item() for parameter in makers), share, seed]
    state = torch.load(cache, weights_only=True) if cache.exists() else {}
    if state.get("fingerprint") != fingerprint:
        windows = encode_windows(vae, levels, share, seed)
        rows = [(each.width, each.latent, torch.from_numpy(each.cells)) for each in windows]
        state = {"fingerprint": fingerprint, "rows": rows}
        save_atomically(state, cache)
    mean, spread = normalise_latents(vae, [latent.float() for _, latent, _ in state["rows"]])
    return [Window(width, (latent.float() - mean) / spread, cells.numpy()) for width, latent, cells in state["rows"]]


def random_latents(
    windows: list[Window], batch: int, height: int, width: int, rng: np.random.Generator
) -> tuple[torch.Tensor, list[str]]:
    """Random parts `[batch, C, height, width]` of windows that are large enough, and their captions."""
    usable = [each for each in windows if each.latent.shape[1] >= height and each.latent.shape[2] >= width]
    present = {each.width for each in usable}
    share = {kind: WEIGHTS[kind] / sum(each.width == kind for each in usable) for kind in present}
    weights = np.array([share[each.width] for each in usable])
    latents, captions = [], []
    for index in rng.choice(len(usable), size=batch, p=weights / weights.sum()):
        window = usable[index]
        top, left = (
            rng.integers(side - length + 1) for side, length in zip(window.cells.shape, (height, width), strict=True)
        )
        place = (slice(top, top + height), slice(left, left + width))
        latents.append(window.latent[:, *place])
        captions.append(caption(window.cells[place], window.width, rng))
    return torch.stack(latents), captions
