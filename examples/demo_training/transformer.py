"""A Flux-shaped transformer over the same latents and captions: rectified flow, joint attention."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer

from .start import LATENTS
from .text import embed

UNIFORM_SHARE = 0.25  # of the times: refining an enlarged picture needs the nearly clean ones, too
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


def flow_loss(
    transformer: FluxTransformer2DModel,
    latents: torch.Tensor,
    words: torch.Tensor,
    pooled: torch.Tensor,
    even: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rectified flow with logit-normal times (Esser et al. 2024), shifted for larger crops, from `even` `[B]`."""
    batch, _, height, width = latents.shape
    device = latents.device
    shift = 0.5 + (height * width / 4 - 256) / (4096 - 256)
    times = torch.sigmoid(torch.special.ndtri(even.clamp(1e-4, 1 - 1e-4)) + shift)
    times = torch.where(torch.rand_like(even) < UNIFORM_SHARE, even, times)
    noise = torch.randn_like(latents)
    output = transformer(
        hidden_states=packed(torch.lerp(latents, noise, times[:, None, None, None])),
        timestep=times,
        pooled_projections=pooled,
        encoder_hidden_states=words,
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, device, latents.dtype),
        txt_ids=torch.zeros(words.shape[1], 3, device=device),
        return_dict=False,
    )[0]
    loss = (output.float() - packed(noise - latents)).square().mean()
    return loss, {"loss": loss}
