"""The autoencoder: Stable Diffusion's topology at an eighth of its width, with eight latent channels."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from .data import SCALES, Pixels, held_out_region, psnr, pyramid, resized, to_array, to_tensor
from .loop import train
from .pool import FlatPool
from .start import GROUPS, LATENTS, start_as_linear_codec

# (share of the training up to which it holds, crop size, crops per step). Ends at the size that figures are taken at:
# group statistics and mid attention of a small crop are not those of a picture.
PHASES = ((0.45, 192, 32), (0.75, 256, 16), (1.0, 512, 5))
KL_WEIGHT = 1e-5
MSE_WEIGHT = 20
RELIEF_SHARE = 0.1  # of crops from shaded relief, so that the colours of one map are not all that it can restore
# So that it does not learn one planet's colours only: in so many crops each channel is made weaker or stronger.
TINTED_SHARE, TINT = 0.4, (0.6, 1.3)
TEST_SIZE = 512
START_CROPS = 192
PEAK_RATE = 8e-4
KEPT_WEIGHT = 0.1  # on the mean square by which latents leave their place, where denoisers know them already
CHAIN_FACTOR = 0.2  # on the rate of the chain of convolutions, which starts out good
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


class MapCrops:
    """Random crops of the maps at all scales, mirrored, turned and tinted, made on the device."""

    def __init__(self, blue_marble: Pixels, relief: Pixels, device: str) -> None:
        maps = [*pyramid(blue_marble).values(), *pyramid(relief).values()]
        values = torch.cat([torch.tensor(each, device=device).flatten(0, 1) for each in maps])
        self.pool = FlatPool.of(values, [each.shape[:2] for each in maps])
        weights = torch.tensor([scale.weight for scale in SCALES], device=device)
        self.weights = torch.cat([weights * (1 - RELIEF_SHARE), weights * RELIEF_SHARE])

    def __call__(self, batch: int, size: int) -> torch.Tensor:
        """`[batch, 3, size, size]` in [-1, 1]."""
        device = self.weights.device
        weights = torch.where(self.pool.heights >= size, self.weights, 0)
        index = torch.multinomial(weights, batch, replacement=True)
        heights, widths = self.pool.heights[index], self.pool.widths[index]
        # Rows near the poles are stretched and plain: half of the crops that would lie there lie elsewhere.
        margin = torch.where(heights * 0.8 >= size, heights // 10, 0) * (torch.rand(batch, device=device) < 0.5)
        top = margin + (torch.rand(batch, device=device) * (heights - 2 * margin - size + 1)).long()
        left = (torch.rand(batch, device=device) * widths).long()
        turned = torch.rand(batch, 3, device=device) < 0.5
        crops = self.pool.crops(index, top, left, (size, size), turned).float()
        low, high = torch.tensor(TINT).log().tolist()
        tint = torch.empty(batch, 3, 1, 1, device=device).uniform_(low, high).exp()
        tinted = torch.rand(batch, 1, 1, 1, device=device) < TINTED_SHARE
        crops = torch.where(tinted, (crops * tint).clamp(max=255).round(), crops)
        return crops.div(127.5).sub(1).contiguous()


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


def figures(vae: AutoencoderKL, crops: dict[str, Pixels]) -> dict[str, float]:
    """`held_out_psnr`, the mean at native size, and what that is without residual branches."""

    def mean(table: dict[str, float]) -> float:
        return statistics.fmean(value for name, value in table.items() if name.startswith("native"))

    whole = held_out_psnr(vae, crops)
    with branches_silent(vae):
        return whole | {"mean": mean(whole), "silent": mean(held_out_psnr(vae, crops))}


def rate_factor(name: str, parameter: nn.Parameter) -> float:
    """Small steps where many inputs add up, smaller ones still for the chain of convolutions that starts out good.

    Adam moves every weight by the learning rate, however small its gradient, so a layer's output moves by the rate
    times the number of its inputs. With one rate for all, the first hundred steps undo the head start. The last layers
    add straight to the picture, where brightness would dance.
    """
    inputs = parameter[0].numel() if parameter.ndim > 1 else BASE_INPUTS
    in_branch = ("resnets" in name and "shortcut" not in name) or "attentions" in name
    last = name.startswith("decoder.up_blocks.3") and ".conv2." in name
    return min(1.0, BASE_INPUTS / inputs) * (1.0 if in_branch else CHAIN_FACTOR) * (0.2 if last else 1.0)


def train_vae(
    crops: MapCrops,
    held_out: dict[str, Pixels],
    folder: Path,
    *,
    seconds: float,
    batch_share: float,
    begin_with: Path | None,
    keep_latents: bool,
    seed: int,
    device: str,
) -> AutoencoderKL:
    """Train, or finish training, the VAE, from `begin_with` or as a linear codec; return its averaged weights.

    With `keep_latents` its latents stay near those that it begins with, so that denoisers of these need no training.
    """
    torch.manual_seed(seed)
    vae = build_vae()
    if begin_with:
        vae.load_state_dict(AutoencoderKL.from_pretrained(begin_with).state_dict())
    elif not (folder / "vae.pt").exists():
        start_as_linear_codec(vae, crops(START_CROPS, 128).cpu())
    vae.to(device)
    average, first = (copy.deepcopy(vae).requires_grad_(False).eval() for _ in range(2))

    def loss_at(progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        size, batch = next((size, batch) for share, size, batch in PHASES if progress < share)
        images = crops(max(1, round(batch * batch_share)), size)
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        l1, l2 = F.l1_loss(decoded, images), F.mse_loss(decoded, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss, parts = l1 + MSE_WEIGHT * l2 + KL_WEIGHT * kl, {"l1": l1, "mse": l2, "kl": kl}
        if keep_latents:
            moved = F.mse_loss(posterior.mean, first.encode(images).latent_dist.mean)
            loss, parts = loss + KEPT_WEIGHT * moved, parts | {"moved": moved}
        return loss, parts

    train(
        "vae",
        vae,
        average,
        loss_at,
        folder=folder,
        seconds=seconds,
        seed=seed,
        peak_rate=PEAK_RATE,
        rate_factor=rate_factor,
        # No Muon: it makes large steps in directions that Adam has left small, and undoes what the start has given.
        decay=0.995,
        report=lambda: figures(average, held_out),
    )
    return average
