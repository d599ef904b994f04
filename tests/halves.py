"""Encoders and decoders for tests: what goes in, how they are called, how they are cut."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from largerespatch.techniques.halves import Cutting


class Bar(nullcontext):
    """A progress bar that counts."""

    def __init__(self, total):
        super().__init__(self)
        self.total, self.updates = total, 0
        Bar.last = self

    def update(self):
        self.updates += 1

    def set_description(self, title):
        self.title = title


def cutting(size, latent_scale=1, wrap=False, bar=Bar):
    return Cutting(*size, latent_scale, wrap, bar, "VAE half")


def picture(batch, height, width, seed=0):
    """Smooth light and dark regions, so that group statistics differ from tile to tile."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, 4, 5, generator=generator)
    fine = torch.randn(batch, 3, height, width, generator=generator)
    return (nn.functional.interpolate(coarse, (height, width), mode="bicubic") + fine / 4).clamp(-1, 1)


def latent(batch, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 4, 3, 4, generator=generator)
    fine = torch.randn(batch, 4, height, width, generator=generator)
    return nn.functional.interpolate(coarse, (height, width), mode="bicubic") * 2 + fine / 4


HALVES = {"encode": lambda vae, x: vae.encode(x).latent_dist.mode(), "decode": lambda vae, x: vae.decode(x).sample}
INPUTS = {"encode": lambda batch, height, width: picture(batch, 8 * height, 8 * width), "decode": latent}
BOTH = pytest.mark.parametrize("half", ["encode", "decode"])
