"""The U-Net and the text encoder, trained together on latents of the frozen VAE."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from .data import DRAWING_WEIGHT, Photo, to_tensor
from .loop import save_atomically, train
from .text import build_text_encoder

SAMPLE_SIZE = 32
# Every photograph is encoded whole, its short side at each of these sizes in sample pixels (mirrored too where the
# second entry says so), and crops are then cut from the latents: thousands of different ones from a few encodings.
# At 256 a crop holds most of a scene, at 384 rather a part of it.
ENCODED_SIZES = ((256, True), (384, False))
SIZE_WEIGHTS = {256: 1.0, 384: 0.8}
CAPTION_DROPOUT = 0.1
MIN_SNR = 5.0
SHEET_PROMPTS, SHEET_STEPS, SHEET_COLUMNS = 10, 16, 5


@dataclass(frozen=True)
class Encoded:
    """A photograph's scaled latent `[4, H, W]`."""

    caption: str
    weight: float
    latent: torch.Tensor


class TextToImage(nn.Module):
    """Both networks as one, for one optimizer and one checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder()
        self.unet = UNet2DConditionModel(
            sample_size=SAMPLE_SIZE,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(64, 96, 128),
            layers_per_block=1,
            cross_attention_dim=64,
            # diffusers takes this for the number of heads: two, three and four heads of 32 channels.
            attention_head_dim=(2, 3, 4),
            norm_num_groups=16,
        )


def build_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )


def build_pipeline(
    vae: AutoencoderKL, both: TextToImage, tokenizer: CLIPTokenizer, scheduler: DPMSolverMultistepScheduler
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=both.text_encoder,
        tokenizer=tokenizer,
        unet=both.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def resized(photo: Photo, short_side: int) -> np.ndarray:
    """The photo with its short side at `short_side` and both sides multiples of 8, from the nearest larger level."""
    level = next((a for a in reversed(photo.levels) if min(a.shape[:2]) >= short_side), photo.levels[0])
    factor = short_side / min(level.shape[:2])
    height, width = (max(short_side, 8 * round(side * factor / 8)) for side in level.shape[:2])
    return np.asarray(Image.fromarray(level).resize((width, height), Image.Resampling.LANCZOS))


@torch.inference_mode()
def encode_photos(vae: AutoencoderKL, photos: list[Photo]) -> list[tuple[str, float, torch.Tensor]]:
    """Caption, weight and unscaled latent `[4, H, W]` of each photo at each encoded size."""
    device = next(vae.parameters()).device
    rows = []
    for photo in tqdm(photos, desc="latents", mininterval=5):
        for short_side, mirror in ENCODED_SIZES:
            if short_side > 1.1 * min(photo.levels[0].shape[:2]):
                continue
            image = to_tensor(resized(photo, short_side)[None]).to(device)
            kind_weight = DRAWING_WEIGHT if photo.kind == "drawings" else 1.0
            for view in (image, image.flip(-1)) if mirror else (image,):
                latent = vae.encode(view).latent_dist.mode()[0].cpu()
                rows.append((photo.caption, kind_weight * SIZE_WEIGHTS[short_side], latent))
    return rows


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, latents: list[torch.Tensor]) -> None:
    """Centre the latent channels and give them one common spread, then set `scaling_factor` to make it 1.

    Exact: what is folded into the convolution behind the encoder is undone by the one before the decoder. Pipelines
    know one factor for all channels and no shift, so a channel with a mean of its own would never be noise-like.
    """
    flat = torch.cat([latent.flatten(1) for latent in latents], dim=1).double()
    mean, spread = flat.mean(dim=1), flat.std(dim=1)
    common = spread.log().mean().exp()
    gain = (common / spread).to(vae.dtype)
    mean = mean.to(vae.dtype)
    channels = len(gain)
    after, before = vae.quant_conv, vae.post_quant_conv
    mean, gain = mean.to(after.weight.device), gain.to(after.weight.device)
    after.weight[:channels] *= gain[:, None, None, None]
    after.bias[:channels] = (after.bias[:channels] - mean) * gain
    after.bias[channels:] += 2 * gain.log()
    before.bias += before.weight[:, :, 0, 0] @ mean
    before.weight /= gain[None, :, None, None]
    vae.register_to_config(scaling_factor=round(1 / common.item(), 5))


def prepare_latents(vae: AutoencoderKL, photos: list[Photo], folder: Path) -> list[Encoded]:
    """Encode the photos once, normalise the VAE's latents in place, return the scaled latents."""
    cache = folder / "latents.pt"
    makers = [*vae.encoder.parameters(), *vae.quant_conv.parameters()]
    fingerprint = sum(parameter.double().abs().sum().item() for parameter in makers)
    state = torch.load(cache, weights_only=True) if cache.exists() else {}
    if state.get("fingerprint") != fingerprint:
        state = {"fingerprint": fingerprint, "rows": encode_photos(vae, photos)}
        save_atomically(state, cache)
    rows = state["rows"]
    flat = torch.cat([latent.flatten(1) for _, _, latent in rows], dim=1)
    centre, spread = flat.mean(dim=1)[:, None, None], flat.std(dim=1)[:, None, None]
    normalise_latents(vae, [latent for _, _, latent in rows])
    return [Encoded(caption, weight, (latent - centre) / spread) for caption, weight, latent in rows]


def shortened(caption: str, rng: np.random.Generator) -> str:
    """The caption without some of its later parts, or nothing at all, which guidance needs."""
    if rng.random() < CAPTION_DROPOUT:
        return ""
    subject, *details = caption.split(", ")
    return ", ".join([subject, *(detail for detail in details if rng.random() < 0.7)])


def random_latents(
    encoded: list[Encoded], batch: int, rng: np.random.Generator, size: int = SAMPLE_SIZE
) -> tuple[torch.Tensor, list[str]]:
    """Random crops `[batch, 4, size, size]` and their captions."""
    weights = np.array([row.weight for row in encoded])
    crops, captions = [], []
    for i in rng.choice(len(encoded), size=batch, p=weights / weights.sum()):
        latent = encoded[i].latent
        top, left = (rng.integers(side - size + 1) for side in latent.shape[1:])
        crops.append(latent[:, top : top + size, left : left + size])
        captions.append(shortened(encoded[i].caption, rng))
    return torch.stack(crops), captions


@torch.inference_mode()
def prompt_sheet(pipeline: StableDiffusionPipeline, prompts: list[str], path: Path) -> None:
    """One picture per prompt, in rows."""
    pipeline.set_progress_bar_config(disable=True)
    side, rows = SAMPLE_SIZE * pipeline.vae_scale_factor, -(-len(prompts) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * side, rows * side))
    for seed, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed)
        result = pipeline(prompt, num_inference_steps=SHEET_STEPS, guidance_scale=4.0, generator=generator)
        sheet.paste(result.images[0], (seed % SHEET_COLUMNS * side, seed // SHEET_COLUMNS * side))
    sheet.save(path)


def train_text_to_image(
    encoded: list[Encoded],
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    folder: Path,
    *,
    steps: int,
    batch: int,
    seed: int,
    device: str,
) -> tuple[TextToImage, float]:
    """Train, or finish training, U-Net and text encoder; return their averaged weights and the seconds spent."""
    torch.manual_seed(seed)
    both = TextToImage().to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(both).requires_grad_(False).eval()
    signal_shares = build_scheduler().alphas_cumprod.to(device)
    prompts = list(dict.fromkeys(row.caption for row in encoded))
    prompts = prompts[:: max(1, len(prompts) // SHEET_PROMPTS)][:SHEET_PROMPTS]

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        latents, captions = random_latents(encoded, batch, np.random.default_rng([seed, step]))
        torch.manual_seed(seed * 1_000_003 + step)
        latents = latents.to(device)
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        noise = torch.randn_like(latents)
        # Stratified over the batch: the same distribution as independent draws, with less noise in the loss.
        strata = (torch.arange(batch) + torch.rand(batch)) / batch
        timesteps = (strata * 1000).long().clamp(max=999).to(device)
        share = signal_shares[timesteps][:, None, None, None]
        noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
        target = share.sqrt() * noise - (1 - share).sqrt() * latents
        context = both.text_encoder(tokens).last_hidden_state
        error = (both.unet(noisy, timesteps, context).sample - target).square().mean(dim=(1, 2, 3))
        snr = (share / (1 - share)).flatten()
        # min-SNR weighting (Hang et al. 2023) for v-prediction; the noisiest and cleanest steps else dominate.
        loss = (snr.clamp(max=MIN_SNR) / (snr + 1) * error).mean()
        return loss, {"loss": loss.item(), "mse": error.mean().item()}

    def report(step: int) -> dict[str, float]:
        pipeline = build_pipeline(vae, average, tokenizer, build_scheduler())
        prompt_sheet(pipeline, prompts, folder / "text_to_image.png")
        return {}

    seconds = train(
        "text_to_image",
        both,
        average,
        loss_at,
        folder=folder,
        steps=steps,
        peak_rate=6e-4,
        decay=0.997,
        report=report,
        report_every=400,
        save_seconds=120,
    )
    return average, seconds
