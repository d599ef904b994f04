"""The autoencoder: Stable Diffusion's topology at an eighth of its width, with eight latent channels."""

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
from PIL import Image
from torch import nn

from .data import SCALES, Pixels, crop, held_out_region, psnr, resized, to_array, to_tensor
from .loop import train
from .start import GROUPS, LATENTS, start_as_linear_codec

# (share of the steps up to which it holds, crop size, crops per step). Group statistics and mid attention of a small
# crop are not those of a picture, so training ends on large ones.
PHASES = ((0.67, 96, 4), (0.8, 192, 1), (1.00, 256, 1))
ENCODER_SHARE = 2 / 3  # of the steps: then the encoder rests, and denoisers can be trained beside the decoder
KL_WEIGHT = 1e-5
MSE_WEIGHT = 10
RELIEF_SHARE = 0.1  # of crops from shaded relief, so that the colours of one map are not all that it can restore
# So that it does not learn one planet's colours only: in so many crops each channel is made weaker or stronger.
TINTED_SHARE, TINT = 0.4, (0.6, 1.3)
TEST_SIZE = 512
START_CROPS = 192
PEAK_RATE = 6e-4
BASE_INPUTS = 144


def build_vae() -> AutoencoderKL:
    """The untrained VAE. Four channels in a group at full size, as in Stable Diffusion's own."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=2,
        latent_channels=LATENTS,
        norm_num_groups=GROUPS,
        sample_size=256,
    )


def crop_shape(step: int, steps: int) -> tuple[int, int]:
    """Crop size and number of crops at a step."""
    return next((size, batch) for share, size, batch in PHASES if step < share * steps)


def random_batch(
    blue_marble: list[Pixels], relief: list[Pixels], batch: int, size: int, rng: np.random.Generator
) -> torch.Tensor:
    """Random crops `[batch, 3, size, size]` in [-1, 1] of maps at all scales, mirrored, turned, tinted."""
    weights = np.array([scale.weight for scale in SCALES])
    crops = []
    for index in rng.choice(len(SCALES), size=batch, p=weights / weights.sum()):
        pixels = (relief if rng.random() < RELIEF_SHARE else blue_marble)[index]
        height, width = pixels.shape[:2]
        # Rows near the poles are stretched and plain: half of the crops that would lie there lie elsewhere.
        margin = height // 10 if rng.random() < 0.5 and height * 0.8 >= size else 0
        top = rng.integers(margin, max(margin, height - margin - size) + 1)
        part = crop(pixels, top, rng.integers(width), size, size)
        if rng.random() < TINTED_SHARE:
            part = np.clip(part * np.exp(rng.uniform(*np.log(TINT), 3)), 0, 255).round().astype(np.uint8)
        crops.append(np.rot90(part, rng.integers(4))[:, :: rng.choice((-1, 1))])
    return to_tensor(np.stack(crops))


def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encode to the mean of the latent distribution and decode."""
    return vae.decode(vae.encode(images).latent_dist.mode()).sample


def held_out_crops(pixels: Pixels) -> dict[str, Pixels]:
    """What of the held-out region is measured: all of it in crops of `TEST_SIZE`, at the native size and at a half.

    At a half the region is less high than a crop, which then is cut to a multiple of 8.
    """
    crops = {}
    for name, region in (
        ("native", held_out_region(pixels)),
        ("1/2", held_out_region(resized(pixels, pixels.shape[1] // 2))),
    ):
        height, width = (min(TEST_SIZE, side // 8 * 8) for side in region.shape[:2])
        for top in sorted({0, region.shape[0] - height}):
            for left in sorted({0, region.shape[1] - width}):
                crops[f"{name}, {len(crops)}"] = region[top : top + height, left : left + width]
    return crops


@torch.inference_mode()
def held_out_psnr(vae: AutoencoderKL, crops: dict[str, Pixels]) -> dict[str, float]:
    """PSNR in dB of the reconstruction of each crop."""
    device = next(vae.parameters()).device
    return {
        name: psnr(part, to_array(reconstruct(vae, to_tensor(part[None]).to(device)))[0])
        for name, part in crops.items()
    }


@contextmanager
def branches_silent(vae: AutoencoderKL) -> Iterator[None]:
    """The VAE as the plain chain of convolutions that its shortcuts make."""
    silenced = []
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            silenced.append(module.conv2)
        elif isinstance(module, Attention):
            silenced.append(module.to_out[0])
    kept = [(module.weight.data, module.bias.data) for module in silenced]
    for module in silenced:
        # The bias carries the constants that the start writes for the last norms; they belong to the chain.
        module.weight.data = torch.zeros_like(module.weight)
    try:
        yield
    finally:
        for module, (weight, bias) in zip(silenced, kept, strict=True):
            module.weight.data, module.bias.data = weight, bias


@torch.inference_mode()
def reconstruction_sheet(vae: AutoencoderKL, crops: dict[str, Pixels], path: Path) -> None:
    """Original above, reconstruction below, for each crop at native size."""
    device = next(vae.parameters()).device
    native = [part for name, part in crops.items() if name.startswith("native")]
    back = [to_array(reconstruct(vae, to_tensor(part[None]).to(device)))[0] for part in native]
    Image.fromarray(np.concatenate([np.hstack(native), np.hstack(back)])).save(path)


def rate_factor(name: str, parameter: nn.Parameter) -> float:
    """Small steps where many inputs add up, smaller ones still for the chain of convolutions that starts out good.

    Adam moves every weight by the learning rate, however small its gradient, so a layer's output moves by the rate
    times the number of its inputs. With one rate for all, the first hundred steps undo the head start. The last layers
    add straight to the picture, where brightness would dance.
    """
    inputs = parameter[0].numel() if parameter.ndim > 1 else BASE_INPUTS
    in_branch = ("resnets" in name and "shortcut" not in name) or "attentions" in name
    last = name.startswith("decoder.up_blocks.3") and ".conv2." in name
    return min(1.0, BASE_INPUTS / inputs) * (1.0 if in_branch else 0.1) * (0.2 if last else 1.0)


def train_vae(
    blue_marble: list[Pixels],
    relief: list[Pixels],
    held_out: dict[str, Pixels],
    folder: Path,
    *,
    steps: int,
    seed: int,
    device: str,
) -> tuple[AutoencoderKL, float]:
    """Train, or finish training, the VAE; return its averaged weights and the seconds spent."""
    torch.manual_seed(seed)
    vae = build_vae()
    if not (folder / "vae.pt").exists():
        start_as_linear_codec(vae, random_batch(blue_marble, relief, START_CROPS, 128, np.random.default_rng(seed)))
    vae.to(device)
    average = copy.deepcopy(vae).requires_grad_(False).eval()
    encoder_steps = math.ceil(ENCODER_SHARE * steps)

    def keep_encoder() -> None:
        """Go on with the averaged encoder, and without training it."""
        for part, kept in ((vae.encoder, average.encoder), (vae.quant_conv, average.quant_conv)):
            if next(part.parameters()).requires_grad:
                part.load_state_dict(kept.state_dict())
                part.requires_grad_(False)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        size, batch = crop_shape(step, steps)
        images = random_batch(blue_marble, relief, batch, size, np.random.default_rng([seed, step])).to(device)
        torch.manual_seed(seed * 1_000_003 + step)
        if step >= encoder_steps:
            keep_encoder()
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        l1, l2 = F.l1_loss(decoded, images), F.mse_loss(decoded, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return l1 + MSE_WEIGHT * l2 + KL_WEIGHT * kl, {"l1": l1.item(), "mse": l2.item(), "kl": kl.item()}

    def report(step: int) -> dict[str, float]:
        reconstruction_sheet(average, held_out, folder / "vae.png")
        figures = held_out_psnr(average, held_out)
        with branches_silent(average):
            silent = held_out_psnr(average, held_out)
        native = [name for name in figures if name.startswith("native")]
        return {**figures, "silent": sum(silent[name] for name in native) / len(native)}

    seconds = train(
        "vae",
        vae,
        average,
        loss_at,
        folder=folder,
        steps=steps,
        peak_rate=PEAK_RATE,
        rate_factor=rate_factor,
        decay=0.99,
        report=report,
        report_every=400,
        save_seconds=120,
    )
    return average, seconds
