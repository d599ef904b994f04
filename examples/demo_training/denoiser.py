"""Training of the denoisers, U-Net and transformer alike, and sheets of what they paint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from .loop import train
from .pool import TrainingSet
from .text import embed
from .text_to_image import build_pipeline, build_unet, v_prediction_loss
from .transformer import Flux, build_transformer, flow_loss

# (share of the training up to which it holds, then shapes in latent pixels, crops per step and how often).
PHASES = (
    (0.4, (((32, 32), 256, 0.6), ((32, 64), 128, 0.4))),
    (0.7, (((32, 32), 256, 0.3), ((32, 64), 128, 0.3), ((48, 48), 112, 0.2), ((64, 64), 64, 0.2))),
    (
        1.0,
        (
            ((32, 32), 256, 0.25),
            ((32, 64), 128, 0.25),
            ((48, 48), 112, 0.15),
            ((64, 64), 64, 0.1),
            ((64, 128), 32, 0.25),
        ),
    ),
)
PEAK_RATE, DECAY = 1.5e-3, 0.998
EMBEDDED_AT_ONCE = 2048
# Builds it, its loss, and which of its matrices and kernels Muon trains.
KINDS: dict[str, tuple[Callable[[int], nn.Module], Callable[..., Any], Callable[[str], bool]]] = {
    "unet": (build_unet, v_prediction_loss, lambda name: "_block" in name and "time_emb_proj" not in name),
    "transformer": (build_transformer, flow_loss, lambda name: "blocks." in name),
}

# Prompt, width and height of the pictures of a sheet, in rows that are filled from the left.
SHEET = (
    ("a whole planet, green and desert continents by a deep sea, some ice, bays and islands", 512, 256),
    ("a whole planet, icy continents by a dark blue sea", 512, 256),
    ("a continent, green and desert coast by a deep sea, mountains", 256, 256),
    ("a region from near, green islands in a shallow sea, mountains", 256, 256),
    ("a region, desert land, mountains", 256, 256),
    ("a region, icy and green land, mountains", 256, 256),
    ("half a planet, green and desert continents by a deep sea, some ice, bays and islands", 1024, 512),
)
SHEET_SIZE, SHEET_STEPS = (1024, 1024), 16


class Batches:
    """Random latents with the words for them, in the shapes that `PHASES` says."""

    @torch.no_grad()
    def __init__(
        self, training_set: TrainingSet, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, batch_share: float
    ) -> None:
        self.latents, self.samples, self.batch_share = training_set.latents, training_set.samples, batch_share
        captions = training_set.captions
        parts = [captions[start : start + EMBEDDED_AT_ONCE] for start in range(0, len(captions), EMBEDDED_AT_ONCE)]
        words, pooled = zip(*(embed(text_encoder, tokenizer, part) for part in parts), strict=True)
        self.words, self.pooled = torch.cat([each.half() for each in words]), torch.cat(pooled)

    def __call__(self, progress: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents `[B, C, h, w]`, words `[B, L, D]`, pooled words `[B, D]`."""
        kinds = next(kinds for share, kinds in PHASES if progress < share)
        shape, usual, _ = kinds[int(torch.multinomial(torch.tensor([often for _, _, often in kinds]), 1))]
        samples = self.samples[shape]
        device = samples.index.device
        chosen = torch.randint(len(samples.index), (max(1, round(usual * self.batch_share)),), device=device)
        latents = self.latents.crops(samples.index[chosen], samples.top[chosen], samples.left[chosen], shape)
        text = samples.text[chosen]
        return latents.float().contiguous(), self.words[text].float(), self.pooled[text]


def strata(batch: int, device: torch.device) -> torch.Tensor:
    """Even spread over (0, 1): the same distribution as independent draws, with less noise in the loss."""
    return (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch


def train_denoiser(kind: str, batches: Batches, folder: Path, *, seconds: float, seed: int, device: str) -> nn.Module:
    """Train, or finish training, one of `KINDS`; return its averaged weights."""
    build, loss, inner = KINDS[kind]
    torch.manual_seed(seed)
    cuda = device.startswith("cuda")
    model = build(batches.pooled.shape[1]).to(device)
    if cuda:
        model.to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False).eval()

    def loss_at(progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        latents, words, pooled = batches(progress)
        # bfloat16 where the device is fast at it; losses and weights stay single.
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=cuda):
            return loss(model, latents, words, pooled, strata(len(latents), latents.device))

    train(
        kind,
        model,
        average,
        loss_at,
        folder=folder,
        seconds=seconds,
        seed=seed,
        peak_rate=PEAK_RATE,
        inner=inner,
        decay=DECAY,
        report=dict,
    )
    return average


@torch.inference_mode()
def paint_sheet(
    kind: str,
    model: nn.Module,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    path: Path,
) -> None:
    """A picture for each prompt of `SHEET`."""
    pipeline: Any = {"unet": build_pipeline, "transformer": Flux}[kind](vae, model, text_encoder, tokenizer)
    sheet = Image.new("RGB", SHEET_SIZE)
    left = top = 0
    for seed, (prompt, width, height) in enumerate(SHEET):
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
            left, top = 0, top + picture.height
    sheet.save(path)
