"""A Flux-shaped transformer over the same latents and captions: rectified flow, joint attention."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer

from .latents import Window, random_latents
from .loop import train
from .start import LATENTS
from .text import embed
from .text_to_image import pick_shape, prompt_sheet

PEAK_RATE = 1.5e-3
# Larger pictures need more noise before their large shapes are gone: from 256 tokens to 4096.
SHIFTS = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.5}


def build_transformer(text_width: int) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4 * LATENTS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=text_width,
        pooled_projection_dim=text_width,
        axes_dims_rope=(8, 12, 12),
    )


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **SHIFTS)


class Flux:
    """A `FluxPipeline` without text encoders of its own: the shared one's embeddings are passed in."""

    def __init__(
        self,
        vae: AutoencoderKL,
        transformer: FluxTransformer2DModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
    ) -> None:
        parts = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
        self.pipe = FluxPipeline(scheduler or build_flow_scheduler(), vae, transformer=transformer, **parts)
        self.pipe.set_progress_bar_config(disable=True)
        self.text_encoder, self.tokenizer = text_encoder, tokenizer

    def __call__(self, prompt: str, *, guidance_scale: float, **arguments: object) -> object:
        words, pooled = embed(self.text_encoder, self.tokenizer, [prompt, ""])
        return self.pipe(
            prompt_embeds=words[:1],
            pooled_prompt_embeds=pooled[:1],
            negative_prompt_embeds=words[1:],
            negative_pooled_prompt_embeds=pooled[1:],
            true_cfg_scale=guidance_scale,
            **arguments,
        )


def packed(latents: torch.Tensor) -> torch.Tensor:
    """`[B, C, H, W]` as tokens of 2x2 latent pixels `[B, H/2 * W/2, 4 * C]`, in Flux's order."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def train_transformer(
    windows: list[Window],
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    folder: Path,
    *,
    steps: int,
    seed: int,
    device: str,
) -> tuple[FluxTransformer2DModel, float]:
    """Train, or finish training; return the averaged weights and the seconds spent."""
    torch.manual_seed(seed)
    transformer = build_transformer(text_encoder.config.hidden_size).to(device)
    average = copy.deepcopy(transformer).requires_grad_(False).eval()

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, step])
        (height, width), batch = pick_shape(step, steps, rng)
        latents, captions = random_latents(windows, batch, height, width, rng)
        torch.manual_seed(seed * 1_000_003 + step)
        latents = latents.to(device)
        with torch.no_grad():
            words, pooled = embed(text_encoder, tokenizer, captions)
        # Logit-normal times (Esser et al. 2024), shifted for larger crops and stratified over the batch.
        strata = (torch.arange(batch) + torch.rand(batch)) / batch
        shift = 0.5 + (height * width / 4 - 256) / (4096 - 256)
        times = torch.sigmoid(torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4)) + shift).to(device)
        noise = torch.randn_like(latents)
        noisy = torch.lerp(latents, noise, times[:, None, None, None])
        places = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, device, latents.dtype)
        output = transformer(
            hidden_states=packed(noisy),
            timestep=times,
            pooled_projections=pooled,
            encoder_hidden_states=words,
            img_ids=places,
            txt_ids=torch.zeros(words.shape[1], 3, device=device),
            return_dict=False,
        )[0]
        loss = (output - packed(noise - latents)).square().mean()
        return loss, {"loss": loss.item()}

    def report(step: int) -> dict[str, float]:
        prompt_sheet(Flux(vae, average, text_encoder, tokenizer), folder / "transformer.png")
        return {}

    seconds = train(
        "transformer",
        transformer,
        average,
        loss_at,
        folder=folder,
        steps=steps,
        peak_rate=PEAK_RATE,
        inner=lambda name: "blocks." in name,
        decay=0.997,
        report=report,
        report_every=400,
        save_seconds=120,
    )
    return average, seconds
