"""The U-Net of Stable Diffusion's shape, and sheets of what a denoiser paints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from .latents import Window, random_latents
from .loop import train
from .start import LATENTS
from .text import embed

SAMPLE_SIZE = 32
# (share of the steps up to which it holds, then shapes in latent pixels, crops per step and how often)
PHASES = (
    (0.6, (((32, 32), 8, 0.8), ((32, 64), 4, 0.2))),
    (1.0, (((32, 32), 8, 0.35), ((32, 64), 4, 0.3), ((48, 48), 4, 0.35))),
)
MIN_SNR = 5.0
PEAK_RATE = 1.2e-3
SHEET_SIZE, SHEET_STEPS, SHEET_COLUMNS = 256, 12, 3
SHEET_PROMPTS = (
    ("a whole planet, green and desert continents by a deep sea, some ice, bays and islands", 512, 256),
    ("a continent, green and desert coast by a deep sea, mountains", SHEET_SIZE, SHEET_SIZE),
    ("a region from near, green islands in a shallow sea, mountains", SHEET_SIZE, SHEET_SIZE),
    ("a region, desert land, mountains", SHEET_SIZE, SHEET_SIZE),
    ("a hemisphere, icy continents by a dark blue sea", SHEET_SIZE, SHEET_SIZE),
)


def build_unet(text_width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SAMPLE_SIZE,
        in_channels=LATENTS,
        out_channels=LATENTS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        cross_attention_dim=text_width,
        # diffusers takes this for the number of heads: two, three and four heads of 32 channels.
        attention_head_dim=(2, 3, 4),
        norm_num_groups=16,
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Down to a signal of nothing, so that a picture can be as dark as the deep sea."""
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def build_pipeline(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.inference_mode()
def prompt_sheet(pipeline: Callable[..., Any], path: Path) -> None:
    """One picture for each of `SHEET_PROMPTS`, in rows that are filled from the left."""
    sheet = Image.new("RGB", (SHEET_COLUMNS * SHEET_SIZE, 2 * SHEET_SIZE))
    left = top = 0
    for seed, (prompt, width, height) in enumerate(SHEET_PROMPTS):
        picture = pipeline(
            prompt,
            width=width,
            height=height,
            num_inference_steps=SHEET_STEPS,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        sheet.paste(picture, (left, top))
        left += picture.width
        if left >= sheet.width:
            left, top = 0, top + SHEET_SIZE
    sheet.save(path)


def pick_shape(step: int, steps: int, rng: np.random.Generator) -> tuple[tuple[int, int], int]:
    """Height and width in latent pixels, and crops per step."""
    kinds = next(kinds for share, kinds in PHASES if step < share * steps)
    shape, batch, _ = kinds[rng.choice(len(kinds), p=[often for _, _, often in kinds])]
    return shape, batch


def train_unet(
    windows: list[Window],
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    folder: Path,
    *,
    steps: int,
    seed: int,
    device: str,
) -> tuple[UNet2DConditionModel, float]:
    """Train, or finish training, the U-Net; return its averaged weights and the seconds spent."""
    torch.manual_seed(seed)
    unet = build_unet(text_encoder.config.hidden_size).to(device)
    average = copy.deepcopy(unet).requires_grad_(False).eval()
    signal_shares = build_scheduler().alphas_cumprod.to(device)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, step])
        (height, width), batch = pick_shape(step, steps, rng)
        latents, captions = random_latents(windows, batch, height, width, rng)
        torch.manual_seed(seed * 1_000_003 + step)
        latents = latents.to(device)
        with torch.no_grad():
            words, _ = embed(text_encoder, tokenizer, captions)
        noise = torch.randn_like(latents)
        # Stratified over the batch: the same distribution as independent draws, with less noise in the loss.
        strata = (torch.arange(batch) + torch.rand(batch)) / batch
        timesteps = (strata * 1000).long().clamp(max=999).to(device)
        share = signal_shares[timesteps][:, None, None, None]
        noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
        target = share.sqrt() * noise - (1 - share).sqrt() * latents
        error = (unet(noisy, timesteps, words).sample - target).square().mean(dim=(1, 2, 3))
        snr = (share / (1 - share)).flatten()
        # min-SNR weighting (Hang et al. 2023) for v-prediction: the cleanest steps else dominate. The noisiest keep
        # a weight, for without them nothing is learned of where to begin.
        weight = (snr.clamp(max=MIN_SNR) / (snr + 1)).clamp(min=0.15)
        loss = (weight * error).mean()
        return loss, {"loss": loss.item(), "mse": error.mean().item()}

    def report(step: int) -> dict[str, float]:
        pipeline = build_pipeline(vae, average, text_encoder, tokenizer)
        pipeline.set_progress_bar_config(disable=True)
        prompt_sheet(pipeline, folder / "unet.png")
        return {}

    seconds = train(
        "unet",
        unet,
        average,
        loss_at,
        folder=folder,
        steps=steps,
        peak_rate=PEAK_RATE,
        inner=lambda name: "_block" in name and "time_emb_proj" not in name,
        decay=0.997,
        report=report,
        report_every=400,
        save_seconds=120,
    )
    return average, seconds
