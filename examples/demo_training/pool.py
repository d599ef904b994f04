"""What the denoisers are trained on: windows of planets as latents, and crops of them with captions.

All latents lie in one flat tensor on the device, so that a batch of crops from many windows is one gather.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

from .captions import caption
from .data import crop
from .loop import save_atomically
from .planets import FACTOR, WHOLE, WINDOWS, Levels, Windows, draw_windows

# How often each scale is drawn.
WEIGHTS = {512: 1.3, 1024: 1.0, 2048: 1.2, 4096: 1.2, 5400: 0.6}
# How many crops with a caption of each shape in latent pixels. Drawn again and again, with other noise.
CROPS = {(32, 32): 60000, (32, 64): 30000, (48, 48): 20000, (64, 64): 14000, (64, 128): 9000}
FEWEST = 64
# Planets that go around are what pictures of these shapes most often are.
BOOST = {((32, 64), 512): 4.0, ((64, 128), 1024): 3.0}
MARGIN = 64  # sample pixels from beyond the edge, so that a whole planet's latents go on around it
ENCODED_AT_ONCE = {"cuda": 4_000_000, "cpu": 130_000}  # sample pixels


@dataclass
class FlatPool:
    """Windows `[N]` of different sizes as rows of `values` `[pixels, C]`, each row by row from its offset."""

    values: torch.Tensor
    offsets: torch.Tensor
    heights: torch.Tensor
    widths: torch.Tensor

    @staticmethod
    def of(values: torch.Tensor, shapes: list[tuple[int, int]]) -> FlatPool:
        """From rows that lie there already, of windows of these heights and widths."""
        sizes = torch.tensor(shapes, device=values.device)
        pixels = sizes.prod(1)
        return FlatPool(values, pixels.cumsum(0) - pixels, sizes[:, 0], sizes[:, 1])

    def crops(
        self,
        index: torch.Tensor,
        top: torch.Tensor,
        left: torch.Tensor,
        shape: tuple[int, int],
        turned: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[B, C, h, w]`; what runs over the right edge goes on at the left one. `turned` `[B, 3]` says which (square)
        crops are transposed, upside down, mirrored."""
        rows = torch.arange(shape[0], device=index.device)[None, :, None]
        columns = torch.arange(shape[1], device=index.device)[None, None, :]
        if turned is not None:
            transposed, down, across = (each[:, None, None] for each in turned.unbind(1))
            rows, columns = torch.where(transposed, columns, rows), torch.where(transposed, rows, columns)
            rows = torch.where(down, shape[0] - 1 - rows, rows)
            columns = torch.where(across, shape[1] - 1 - columns, columns)
        width = self.widths[index][:, None, None]
        columns = (left[:, None, None] + columns) % width
        place = self.offsets[index][:, None, None] + (top[:, None, None] + rows) * width + columns
        return self.values[place].permute(0, 3, 1, 2)


@dataclass
class Samples:
    """Crops of one shape: window, place in it, and the number of its caption."""

    index: torch.Tensor
    top: torch.Tensor
    left: torch.Tensor
    text: torch.Tensor


@dataclass
class TrainingSet:
    """Latents of unit spread of all windows, what is to be seen in these, and crops with captions."""

    latents: FlatPool
    groups: list[Windows]
    samples: dict[tuple[int, int], Samples]
    captions: list[str]


@torch.inference_mode()
def encode_windows(
    vae: AutoencoderKL, levels: Levels, width: int, count: int, rng: np.random.Generator
) -> tuple[Windows, torch.Tensor]:
    """Random windows at a scale, and their unscaled latents `[N * h * w, C]` in half precision."""
    rows, columns = WINDOWS[width][0]
    margin = MARGIN if width in WHOLE else 0
    beyond = margin // FACTOR
    at_once = max(1, ENCODED_AT_ONCE[vae.device.type] // (rows * (columns + 2 * margin)))
    latents, cells, pixels = [], [], []
    for window, seen in tqdm(draw_windows(levels, width, count, rng), f"latents, {width}", count, mininterval=10):
        cells.append(seen)
        pixels.append(window)
        if len(pixels) == at_once or len(cells) == count:
            images = torch.stack(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
            images = F.pad(images, (margin, margin, 0, 0), mode="circular") if margin else images
            latent = vae.encode(images).latent_dist.mode()[..., beyond : beyond + columns // FACTOR]
            latents.append(latent.permute(0, 2, 3, 1).flatten(0, 2).half())
            pixels = []
    return Windows(width, np.stack(cells)), torch.cat(latents)


def statistics(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and spread of each latent channel, from rows `[N, C]`."""
    flat = values[::8].double() if len(values) > 1_000_000 else values.double()
    return flat.mean(dim=0).float(), flat.std(dim=0).float()


@torch.no_grad()
def normalise(vae: AutoencoderKL, mean: torch.Tensor, spread: torch.Tensor) -> None:
    """Centre the latent channels and give them one common spread, then set `scaling_factor` to make it 1.

    Exact: what is folded into the convolution behind the encoder is undone by the one before the decoder. Pipelines
    know one factor for all channels and no shift, so a channel with a mean of its own would never be noise-like.
    """
    common = spread.log().mean().exp()
    centre, gain = mean.to(vae.device, vae.dtype), (common / spread).to(vae.device, vae.dtype)
    channels = len(gain)
    after, before = vae.quant_conv, vae.post_quant_conv
    after.weight[:channels] *= gain[:, None, None, None]
    after.bias[:channels] = (after.bias[:channels] - centre) * gain
    after.bias[channels:] += 2 * gain.log()
    before.bias += before.weight[:, :, 0, 0] @ centre
    before.weight /= gain[None, :, None, None]
    vae.register_to_config(scaling_factor=round(1 / common.item(), 5), shift_factor=0.0)


def draw_samples(
    groups: list[Windows], shape: tuple[int, int], count: int, numbers: dict[str, int], rng: np.random.Generator
) -> Samples:
    """`count` random crops of a shape; captions not met before are numbered in `numbers`."""
    fits = [all(have >= want for have, want in zip(each.cells.shape[1:], shape, strict=True)) for each in groups]
    often = [WEIGHTS[each.width] * BOOST.get((shape, each.width), 1.0) for each in groups]
    weights = np.array(often) * fits
    firsts = np.cumsum([0, *(len(each.cells) for each in groups)])
    rows = []
    for number in rng.choice(len(groups), size=count, p=weights / weights.sum()):
        group = groups[number]
        windows, height, width = group.cells.shape
        window, top = rng.integers(windows), rng.integers(height - shape[0] + 1)
        left = rng.integers(width if group.whole else width - shape[1] + 1)
        cells = crop(group.cells[window], top, left, *shape)
        text = numbers.setdefault(caption(cells, group.width, rng), len(numbers))
        rows.append((firsts[number] + window, top, left, text))
    return Samples(*torch.from_numpy(np.array(rows)).T.contiguous())


def make_training_set(vae: AutoencoderKL, levels: Levels, share: float, seed: int) -> dict[str, object]:
    """`share` of the usual windows and crops, in tensors and plain values; latents are scaled, the VAE is as it was."""
    rng = np.random.default_rng([seed, 7])
    groups, latents = [], []
    for width, (_, usual) in WINDOWS.items():
        windows, encoded = encode_windows(vae, levels, width, max(2, round(usual * share)), rng)
        groups.append(windows)
        latents.append(encoded)
    values = torch.cat(latents)
    mean, spread = statistics(values)
    numbers: dict[str, int] = {}
    samples = {
        shape: draw_samples(groups, shape, max(FEWEST, round(usual * share)), numbers, rng)
        for shape, usual in CROPS.items()
    }
    return {
        "values": ((values.float() - mean) / spread).half().cpu(),
        "statistics": (mean.cpu(), spread.cpu()),
        "cells": [(each.width, torch.from_numpy(each.cells)) for each in groups],
        "samples": {shape: (each.index, each.top, each.left, each.text) for shape, each in samples.items()},
        "captions": list(numbers),
    }


def prepare_training_set(
    vae: AutoencoderKL, levels: Levels, cache: Path, *, share: float, seed: int, device: str
) -> TrainingSet:
    """Made once for a VAE and kept in `cache`; the VAE's latents are normalised in place."""
    makers = [*vae.encoder.parameters(), *vae.quant_conv.parameters()]
    fingerprint = [sum(parameter.double().abs().sum().item() for parameter in makers), share, seed]
    state = torch.load(cache, weights_only=True) if cache.exists() else {}
    if state.get("fingerprint") != fingerprint:
        state = {"fingerprint": fingerprint, **make_training_set(vae, levels, share, seed)}
        save_atomically(state, cache)
    normalise(vae, *state["statistics"])
    groups = [Windows(width, cells.numpy()) for width, cells in state["cells"]]
    shapes = [group.cells.shape[1:] for group in groups for _ in group.cells]
    return TrainingSet(
        FlatPool.of(state["values"].to(device), shapes),
        groups,
        {shape: Samples(*(part.to(device) for part in parts)) for shape, parts in state["samples"].items()},
        state["captions"],
    )
