"""The U-Net of Stable Diffusion's shape: its pipeline, and what it learns."""

from __future__ import annotations

from functools import cache

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from .start import LATENTS

SAMPLE_SIZE = 32
MIN_SNR, LEAST_WEIGHT = 5.0, 0.15


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


@cache
def signal_shares(device: torch.device) -> torch.Tensor:
    return build_scheduler().alphas_cumprod.to(device)


def v_prediction_loss(
    unet: UNet2DConditionModel, latents: torch.Tensor, words: torch.Tensor, pooled: torch.Tensor, even: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """With min-SNR weights (Hang et al. 2023), at steps as `even` `[B]` in (0, 1) says. It knows no pooled words."""
    noise = torch.randn_like(latents)
    timesteps = (even * 1000).long().clamp(max=999)
    share = signal_shares(latents.device)[timesteps][:, None, None, None]
    target = share.sqrt() * noise - (1 - share).sqrt() * latents
    output = unet(share.sqrt() * latents + (1 - share).sqrt() * noise, timesteps, words).sample
    error = (output.float() - target).square().mean(dim=(1, 2, 3))
    snr = (share / (1 - share)).flatten()
    # The cleanest steps else dominate. The noisiest keep a weight, for without them nothing is learned of where to
    # begin.
    weight = (snr.clamp(max=MIN_SNR) / (snr + 1)).clamp(min=LEAST_WEIGHT)
    loss = (weight * error).mean()
    return loss, {"loss": loss, "mse": error.mean()}
