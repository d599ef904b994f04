"""Encoders and decoders for tests: what goes in, how they are called, how they are cut."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from largerespatch.autoencoders import kl
from largerespatch.core.families import Order, family_of, install
from largerespatch.core.hosts import Host
from largerespatch.core.patching import PatchStack
from largerespatch.memory.counting import LiveBytes
from largerespatch.options import Options
from largerespatch.techniques.vae.halves import Cutting

CPU = torch.device("cpu")

# Not where the model runs, though the same memory: whole maps live here and their strips are copied.
ELSEWHERE = Host("cpu:0", band_bytes=1500)


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


def _encoded(encoded):
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else next(iter(encoded.values()))


HALVES = {"encode": lambda vae, x: _encoded(vae.encode(x)), "decode": lambda vae, x: vae.decode(x).sample}
INPUTS = {"encode": lambda batch, height, width: picture(batch, 8 * height, 8 * width), "decode": latent}
PADDING_MODES = ("constant", "circular", "reflect", "replicate")
MODES = pytest.mark.parametrize("mode", ["exact", "two-pass"])
BOTH = pytest.mark.parametrize("half", ["encode", "decode"])


def sites(model, **options):
    """Those of its family, for tiles of 10 x 10 latent pixels."""
    options = {"vae_chunk_size_x": 10, "vae_chunk_size_y": 10} | options
    pipe = SimpleNamespace(progress_bar=Bar, components={"vae": model})
    return list(family_of(model).sites(model, "vae", Options(**options), pipe))


def told(model, **options):
    return {site.says for site in sites(model, **options) if site.says}


@contextmanager
def patched(model, **options):
    with PatchStack() as stack:
        install(stack, sites(model, **options))
        yield


@contextmanager
def in_pieces(model, height, width=1000, host=ELSEWHERE, **options):
    """In pieces of ``height x width`` latent pixels; with `vae_offload` whole maps live elsewhere."""
    sizes = {"vae_chunk_size_y": height, "vae_chunk_size_x": width}
    with mock.patch.object(kl, "Host", lambda: host), patched(model, **sizes | options):
        yield


@contextmanager
def padded(model, mode):
    """The convolutions alone pad by that mode; nothing is in pieces."""
    with PatchStack() as stack:
        install(stack, [site for site in sites(model, padding_mode=mode) if site.order is Order.PADDED])
        yield


def error(result, expected):
    """Relative."""
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def live(run, device="cpu"):
    """The most bytes alive at once, beside what is there before."""
    with LiveBytes(device) as count:
        run()
    return count.peak


def cut_up(run):
    """What a run gives that has to be in pieces: its progress bar is complete, and longer than one."""
    Bar.last = None
    result = run()
    assert Bar.last.updates == Bar.last.total > 1
    return result


def model_offload(model):
    accelerate.cpu_offload_with_hook(model, CPU)


def sequential_offload(model):
    accelerate.cpu_offload(model, execution_device=CPU)


def leaf_group_offload(model):
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


OFFLOADS = pytest.mark.parametrize("offload", [model_offload, sequential_offload, leaf_group_offload])
