"""The autoencoder: Stable Diffusion's topology at an eighth of its width."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from .data import SCALES, Photo, center_crop, psnr, random_batch, to_array, to_tensor
from .loop import train
from .start import start_as_linear_codec

# (share of the steps up to which it holds, crop size, crops per step). Group statistics and mid attention of a small
# crop are not those of a picture, so training ends on large ones.
PHASES = ((0.60, 128, 2), (1.00, 256, 1))
KL_WEIGHT = 1e-4
TEST_SIZE = 512
START_CROPS = 192
PEAK_RATE = 5e-5
BASE_INPUTS = 144


def build_vae() -> AutoencoderKL:
    """The untrained VAE. Four channels in a group at full size, as in Stable Diffusion's own."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=256,
    )


def crop_shape(step: int, steps: int) -> tuple[int, int]:
    """Crop size and number of crops at a step."""
    return next((size, batch) for share, size, batch in PHASES if step < share * steps)


def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encode to the mean of the latent distribution and decode."""
    return vae.decode(vae.encode(images).latent_dist.mode()).sample


@torch.inference_mode()
def held_out_psnr(vae: AutoencoderKL, photos: list[Photo], scales: tuple[int, ...] = SCALES) -> dict[str, float]:
    """PSNR in dB of the reconstruction of the central square of `TEST_SIZE`, for each photo and scale."""
    device = next(vae.parameters()).device
    table = {}
    for photo in photos:
        for scale in scales:
            crop = center_crop(photo.levels[SCALES.index(scale)], TEST_SIZE)[None]
            table[f"{photo.name} 1/{scale}"] = psnr(crop, to_array(reconstruct(vae, to_tensor(crop).to(device))))
    return table


@torch.inference_mode()
def reconstruction_sheet(vae: AutoencoderKL, photos: list[Photo], path: Path, scale: int = 2) -> None:
    """Original above, reconstruction below, for each photo."""
    device = next(vae.parameters()).device
    crops = np.stack([center_crop(photo.levels[SCALES.index(scale)], TEST_SIZE) for photo in photos])
    back = np.concatenate([to_array(reconstruct(vae, to_tensor(crop[None]).to(device))) for crop in crops])
    Image.fromarray(np.concatenate([np.hstack(list(crops)), np.hstack(list(back))])).save(path)


def rate_factor(name: str, parameter: nn.Parameter) -> float:
    """Small steps where many inputs add up, smaller ones still for the chain of convolutions that starts out good.

    Adam moves every weight by the learning rate, however small its gradient, so a layer's output moves by the rate
    times the number of its inputs. With one rate for all, the first hundred steps undo the head start.
    """
    inputs = parameter[0].numel() if parameter.ndim > 1 else BASE_INPUTS
    in_branch = ("resnets" in name and "shortcut" not in name) or "attentions" in name
    return min(1.0, BASE_INPUTS / inputs) * (1.0 if in_branch else 0.1)


def train_vae(
    photos: list[Photo], held_out: list[Photo], folder: Path, *, steps: int, seed: int, device: str
) -> tuple[AutoencoderKL, float]:
    """Train, or finish training, the VAE; return its averaged weights and the seconds spent."""
    torch.manual_seed(seed)
    vae = build_vae()
    start_as_linear_codec(vae, random_batch(photos, START_CROPS, 128, np.random.default_rng(seed)))
    vae.to(device)
    average = copy.deepcopy(vae).requires_grad_(False).eval()

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        size, batch = crop_shape(step, steps)
        images = random_batch(photos, batch, size, np.random.default_rng([seed, step])).to(device)
        torch.manual_seed(seed * 1_000_003 + step)
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        l1, l2 = F.l1_loss(decoded, images), F.mse_loss(decoded, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return l1 + l2 + KL_WEIGHT * kl, {"l1": l1.item(), "mse": l2.item(), "kl": kl.item()}

    def report(step: int) -> dict[str, float]:
        reconstruction_sheet(average, held_out, folder / "vae.png")
        return held_out_psnr(average, held_out, scales=(1, 2))

    seconds = train(
        "vae",
        vae,
        average,
        loss_at,
        folder=folder,
        steps=steps,
        peak_rate=PEAK_RATE,
        rate_factor=rate_factor,
        decay=0.995,
        report=report,
        report_every=300,
        save_seconds=120,
    )
    return average, seconds
