"""The decoder, trained on alone while the rest of the VAE is frozen, so that latents stay what they are.

After its first stage the VAE still is little more than the linear codec that it started from, and what the decoder can
add to it takes many small steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D

from .data import SCALES, Photo, center_crop, psnr, random_batch, to_array, to_tensor
from .loop import train
from .vae import TEST_SIZE, held_out_psnr, rate_factor, reconstruction_sheet

# (crop size, crops per step, share of the steps) before and while the learning rate falls: group statistics and mid
# attention of small crops are not those of a picture, so training ends without them.
HELD = ((128, 1, 0.6), (256, 1, 0.4))
FALLING = ((256, 1, 1.0),)
WARM_UP = 100
FALLS = 0.3
PEAK_RATE = 3e-4
LAST_FACTOR = 0.03
# Beyond it a decoded sample pixel depends on a latent pixel through group statistics and attention only.
RECEPTIVE_RADIUS = 18 * 8


def rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, a long plateau, a cosine down to a hundredth.

    Up to the fall nothing depends on the number of steps, so a run can still be shortened or prolonged there.
    """
    if step < WARM_UP:
        return peak * (step + 1) / WARM_UP
    fallen = max(0.0, (step / steps - (1 - FALLS)) / FALLS)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fallen)))


def crop_shape(step: int, steps: int, rng: np.random.Generator) -> tuple[int, int]:
    """Crop size and number of crops at a step."""
    kinds = HELD if step < (1 - FALLS) * steps else FALLING
    size, crops, _ = kinds[rng.choice(len(kinds), p=[share for _, _, share in kinds])]
    return size, crops


@contextmanager
def branches_silent(vae: AutoencoderKL) -> Iterator[None]:
    """The decoder as the plain chain of convolutions that its shortcuts make."""

    def silence(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        # The last branch also brings the constants that the last group norm needs (see `start`).
        return module.bias.view(1, -1, 1, 1).expand_as(output) if isinstance(module, torch.nn.Conv2d) else output * 0

    ends = [m.conv2 for m in vae.decoder.modules() if isinstance(m, ResnetBlock2D)]
    ends += [m.to_out[0] for m in vae.decoder.modules() if isinstance(m, Attention)]
    hooks = [end.register_forward_hook(silence) for end in ends]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def what_branches_carry(vae: AutoencoderKL, photos: list[Photo], scale: int = 2) -> dict[str, float]:
    """Two mean PSNRs in dB against the decoded crop; the lower, the more the decoder's branches and norms do.

    "silent" leaves the residual branches out. "quarters" decodes each quarter alone and looks only where nothing but
    the group statistics and the attention can tell that the others are missing.
    """
    device = next(vae.parameters()).device
    half, sure = TEST_SIZE // 2, TEST_SIZE // 2 - RECEPTIVE_RADIUS
    silent, quarters = [], []
    for photo in photos:
        crop = to_tensor(center_crop(photo.levels[SCALES.index(scale)], TEST_SIZE)[None]).to(device)
        latent = vae.encode(crop).latent_dist.mode()
        whole = to_array(vae.decode(latent).sample)
        with branches_silent(vae):
            silent.append(psnr(to_array(vae.decode(latent).sample), whole))
        for rows in (slice(0, half), slice(half, None)):
            for columns in (slice(0, half), slice(half, None)):
                part = latent[:, :, rows.start // 8 :][:, :, : half // 8, columns.start // 8 :][..., : half // 8]
                alone = to_array(vae.decode(part).sample)
                corner = tuple(slice(0, sure) if s.start == 0 else slice(half - sure, None) for s in (rows, columns))
                quarters.append(psnr(alone[:, *corner], whole[:, rows, columns][:, *corner]))
    return {"silent": float(np.mean(silent)), "quarters": float(np.mean(quarters))}


def decoder_rate_factor(name: str, parameter: torch.nn.Parameter) -> float:
    """Still smaller steps for the last layer of each branch, as these add straight to the picture.

    They hold nearly all of the gradient. At one rate with the rest, they make the picture's brightness dance and the
    layers before them hardly move.
    """
    last = ".conv2." in name or ".to_out." in name
    return rate_factor(name, parameter) * (LAST_FACTOR if last else 1.0)


def train_decoder(
    vae: AutoencoderKL,
    photos: list[Photo],
    held_out: list[Photo],
    folder: Path,
    *,
    steps: int,
    seed: int,
    device: str,
) -> tuple[AutoencoderKL, float]:
    """Train, or finish training, the decoder; return the VAE with its averaged weights and the seconds spent."""
    vae = copy.deepcopy(vae).requires_grad_(False)
    average = vae.decoder
    decoder = copy.deepcopy(average).requires_grad_(True)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, 1, step])
        size, crops = crop_shape(step, steps, rng)
        images = random_batch(photos, crops, size, rng).to(device)
        torch.manual_seed(seed * 1_000_003 + step)
        with torch.no_grad():
            latent = vae.post_quant_conv(vae.encode(images).latent_dist.sample())
        decoded = decoder(latent)
        l1, l2 = F.l1_loss(decoded, images), F.mse_loss(decoded, images)
        return l1 + l2, {"l1": l1.item(), "mse": l2.item()}

    def report(step: int) -> dict[str, float]:
        reconstruction_sheet(vae, held_out, folder / "decoder.png")
        return held_out_psnr(vae, held_out, scales=(1, 2)) | what_branches_carry(vae, held_out)

    seconds = train(
        "decoder",
        decoder,
        average,
        loss_at,
        folder=folder,
        steps=steps,
        peak_rate=PEAK_RATE,
        schedule=rate,
        rate_factor=decoder_rate_factor,
        decay=0.997,
        report=report,
        report_every=600,
        save_seconds=90,
    )
    return vae, seconds
