"""What each part of the demo models is trained on and by, when time on an accelerator is the limit."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from .clock import Clock, Log, train_by_clock
from .data import SCALES, Pixels
from .pool import FlatPool, Samples
from .start import LATENTS
from .text_to_image import MIN_SNR, build_pipeline, build_scheduler
from .transformer import Flux, packed
from .vae import RELIEF_SHARE, TINT, TINTED_SHARE, branches_silent, held_out_psnr, rate_factor

# (share of the training up to which it holds, crop size, crops per step). Ends at the size that figures are taken at:
# group statistics and mid attention of a small crop are not those of a picture.
VAE_PHASES = ((0.45, 192, 32), (0.75, 256, 16), (1.0, 512, 5))
VAE_RATE = 8e-4
CHAIN_FACTOR = 2  # the chain of convolutions learns twice as fast as in a training on CPUs, but still slower
KL_WEIGHT, MSE_WEIGHT = 1e-5, 20

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
RATES = {"unet": 1.5e-3, "transformer": 1.5e-3}
DECAY = 0.998
UNIFORM_EVERY = 4  # one time in so many is uniform: refining an enlarged picture needs the nearly clean ones, too

SHEET = (
    ("a whole planet, green and desert continents by a deep sea, some ice, bays and islands", 512, 256),
    ("a whole planet, icy continents by a dark blue sea", 512, 256),
    ("a continent, green and desert coast by a deep sea, mountains", 256, 256),
    ("a region from near, green islands in a shallow sea, mountains", 256, 256),
    ("a region, desert land, mountains", 256, 256),
    ("a region, icy and green land, mountains", 256, 256),
    ("half a planet, green and desert continents by a deep sea, some ice, bays and islands", 1024, 512),
)
SHEET_WIDTH = 1024


def fast_settings() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = False  # trying out takes ten seconds for every new shape
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass has failed


class HalfPrecision:
    """Whether denoisers are trained in it."""

    on = True


def half_precision(device: str) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 where the device is fast at it; loss and weights stay single."""
    if device.startswith("cuda") and HalfPrecision.on:
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def save_weights(model: nn.Module, path: Path, **metadata: object) -> None:
    state = {key: value.detach().half().cpu().contiguous() for key, value in model.state_dict().items()}
    part = path.with_suffix(".part")
    save_file(state, part, metadata={key: str(value) for key, value in metadata.items()})
    part.replace(path)


def load_weights(model: nn.Module, path: Path) -> dict[str, str]:
    """The metadata that `save_weights` wrote."""
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def is_normalised(path: Path) -> bool:
    """Whether the latents of the VAE there have unit spread when scaled; not so if its training was cut short."""
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("normalised") != "False"


class MapCrops:
    """Random crops of the maps at all scales, mirrored, turned and tinted, made on the device."""

    def __init__(self, blue_marble: list[Pixels], relief: list[Pixels], device: str) -> None:
        self.pool = FlatPool.of([torch.tensor(each, device=device) for each in (*blue_marble, *relief)])
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


def train_vae_by_clock(
    vae: AutoencoderKL,
    crops: MapCrops,
    held_out: dict[str, Pixels],
    paths: list[Path],
    clock: Clock,
    log: Log,
    small: bool,
    peak_rate: float = VAE_RATE,
) -> AutoencoderKL:
    """Train encoder and decoder until the clock is over; return the averaged weights."""
    average = copy.deepcopy(vae).requires_grad_(False).eval()

    def loss_at(step: int, progress: float, batch_share: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        size, batch = next((size, batch) for share, size, batch in VAE_PHASES if progress < share or share == 1)
        if small:
            size, batch = 64, 1
        images = crops(max(1, round(batch * batch_share)), size)
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        l1, l2 = F.l1_loss(decoded, images), F.mse_loss(decoded, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return l1 + MSE_WEIGHT * l2 + KL_WEIGHT * kl, {"l1": l1, "mse": l2, "kl": kl}

    def factor(name: str, parameter: nn.Parameter) -> float:
        in_branch = ("resnets" in name and "shortcut" not in name) or "attentions" in name
        return rate_factor(name, parameter) * (1 if in_branch else CHAIN_FACTOR)

    def save(progress: float) -> None:
        measure_vae(average, held_out, log, progress)
        for path in paths:
            save_weights(average, path, scaling_factor=average.config.scaling_factor, normalised=False)

    train_by_clock(
        "vae",
        vae,
        average,
        loss_at,
        clock,
        log,
        peak_rate=peak_rate,
        rate_factor=factor,
        # No Muon: it makes large steps in directions that Adam has left small, and undoes what is already learned.
        inner=lambda name: False,
        decay=0.995,
        save=save,
        save_seconds=30,
    )
    return average


def measure_vae(vae: AutoencoderKL, held_out: dict[str, Pixels], log: Log, progress: float) -> float:
    """What the held-out region's parts come back as, in dB, with and without residual branches; return the mean."""
    figures = held_out_psnr(vae, held_out)
    with branches_silent(vae):
        silent = held_out_psnr(vae, held_out)
    native = [name for name in figures if name.startswith("native")] or list(figures)
    means = {
        key: sum(table[name] for name in native) / len(native) for key, table in (("mean", figures), ("silent", silent))
    }
    log(stage="vae", progress=progress, psnr={k: round(v, 2) for k, v in figures.items()}, **means)
    return means["mean"]


class Texts:
    """The text encoder's outputs for all captions, kept on the device."""

    @torch.no_grad()
    def __init__(self, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str], device: str) -> None:
        words, pooled = [], []
        for start in range(0, len(captions), 2048):
            part = captions[start : start + 2048]
            tokens = tokenizer(part, padding="max_length", truncation=True, return_tensors="pt").input_ids
            output = encoder(tokens.to(device))
            words.append(output.last_hidden_state.half())
            pooled.append(output.pooler_output)
        self.words, self.pooled = torch.cat(words), torch.cat(pooled)


class Batches:
    """Random latents with the words for them."""

    def __init__(self, pool: FlatPool, samples: dict[tuple[int, int], Samples], texts: Texts, small: bool) -> None:
        self.pool, self.samples, self.texts, self.small = pool, samples, texts, small
        self.generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)

    def __call__(self, progress: float, batch_share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents `[B, C, h, w]`, words `[B, L, D]`, pooled words `[B, D]`."""
        kinds = next(kinds for share, kinds in PHASES if progress < share or share == 1)
        often = torch.tensor([often for _, _, often in kinds])
        shape, batch, _ = kinds[int(torch.multinomial(often, 1, generator=self.generator))]
        batch = 2 if self.small else max(1, round(batch * batch_share))
        samples = self.samples[shape]
        chosen = torch.randint(len(samples.index), (batch,), device=samples.index.device)
        latents = self.pool.crops(samples.index[chosen], samples.top[chosen], samples.left[chosen], shape)
        text = samples.text[chosen]
        return latents.float().contiguous(), self.texts.words[text].float(), self.texts.pooled[text].float()


def strata(batch: int, device: torch.device) -> torch.Tensor:
    """Even spread over (0, 1): the same distribution as independent draws, with less noise in the loss."""
    return (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch


def unet_loss(unet: nn.Module, batches: Batches, device: str) -> Callable[..., Any]:
    """v-prediction with min-SNR weights (Hang et al. 2023)."""
    signal_shares = build_scheduler().alphas_cumprod.to(device)

    def loss_at(step: int, progress: float, batch_share: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        latents, words, _ = batches(progress, batch_share)
        noise = torch.randn_like(latents)
        timesteps = (strata(len(latents), latents.device) * 1000).long().clamp(max=999)
        share = signal_shares[timesteps][:, None, None, None]
        noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
        target = share.sqrt() * noise - (1 - share).sqrt() * latents
        with half_precision(device):
            output = unet(noisy, timesteps, words).sample
        error = (output.float() - target).square().mean(dim=(1, 2, 3))
        snr = (share / (1 - share)).flatten()
        # The cleanest steps else dominate. The noisiest keep a weight, for without them nothing is learned of where
        # to begin.
        weight = (snr.clamp(max=MIN_SNR) / (snr + 1)).clamp(min=0.15)
        loss = (weight * error).mean()
        return loss, {"loss": loss, "mse": error.mean()}

    return loss_at


def transformer_loss(transformer: nn.Module, batches: Batches, device: str) -> Callable[..., Any]:
    """Rectified flow with logit-normal times (Esser et al. 2024), shifted for larger crops."""

    def loss_at(step: int, progress: float, batch_share: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        latents, words, pooled = batches(progress, batch_share)
        batch, _, height, width = latents.shape
        even = strata(batch, latents.device)
        shift = 0.5 + (height * width / 4 - 256) / (4096 - 256)
        times = torch.sigmoid(torch.special.ndtri(even.clamp(1e-4, 1 - 1e-4)) + shift)
        uniform = torch.rand(batch, device=latents.device) < 1 / UNIFORM_EVERY
        times = torch.where(uniform, even, times)
        noise = torch.randn_like(latents)
        noisy = torch.lerp(latents, noise, times[:, None, None, None])
        places = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, device, latents.dtype)
        with half_precision(device):
            output = transformer(
                hidden_states=packed(noisy),
                timestep=times,
                pooled_projections=pooled,
                encoder_hidden_states=words,
                img_ids=places,
                txt_ids=torch.zeros(words.shape[1], 3, device=device),
                return_dict=False,
            )[0]
        loss = (output.float() - packed(noise - latents)).square().mean()
        return loss, {"loss": loss}

    return loss_at


def inner_of(kind: str) -> Callable[[str], bool]:
    if kind == "unet":
        return lambda name: "_block" in name and "time_emb_proj" not in name
    return lambda name: "blocks." in name


def train_denoiser(
    kind: str, model: nn.Module, batches: Batches, path: Path, clock: Clock, log: Log, device: str
) -> nn.Module:
    """Train the U-Net or the transformer until the clock is over; return the averaged weights."""
    average = copy.deepcopy(model).requires_grad_(False).eval()
    loss_at = {"unet": unet_loss, "transformer": transformer_loss}[kind](model, batches, device)
    try:
        loss_at(0, clock.progress(), 0.1)[0].backward()
    except RuntimeError as error:
        HalfPrecision.on = False
        log(stage=kind, single_precision=repr(error))
    train_by_clock(
        kind,
        model,
        average,
        loss_at,
        clock,
        log,
        peak_rate=RATES[kind],
        inner=inner_of(kind),
        decay=DECAY,
        save=lambda progress: save_weights(average, path, progress=progress),
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
    small: bool,
) -> None:
    """A picture for each prompt of `SHEET`, in rows filled from the left."""
    torch.backends.cudnn.benchmark = False  # every size is met but once
    pipeline: Any = Flux(vae, model, text_encoder, tokenizer)
    if kind == "unet":
        pipeline = build_pipeline(vae, model, text_encoder, tokenizer)
        pipeline.set_progress_bar_config(disable=True)
    sheet = Image.new("RGB", (SHEET_WIDTH, 256 + 256 + 512))
    left = top = 0
    for seed, (prompt, width, height) in enumerate(SHEET[:3] if small else SHEET):
        picture = pipeline(
            prompt,
            width=width,
            height=height,
            num_inference_steps=2 if small else 16,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        sheet.paste(picture, (left, top))
        left += picture.width
        if left >= sheet.width:
            left, top = 0, top + picture.height
    sheet.save(path, quality=88)


def check_latents(pool: FlatPool, log: Log) -> None:
    values = pool.values[:: max(1, len(pool.values) // 1_000_000)].float()
    spread = [round(float(each), 3) for each in values.std(dim=0)]
    log(stage="latents", pixels=len(pool.values), channels=LATENTS, mean=float(values.mean()), spread=spread)
