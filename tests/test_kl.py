"""Whatever is built of the encoder and decoder of `AutoencoderKL` is of its family, and nothing else."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderKLTemporalDecoder, VQModel
from torch import nn

import tiny
from halves import BOTH, HALVES, INPUTS, Bar
from largerespatch.autoencoders.any import AnyAutoencoder
from largerespatch.autoencoders.kl import KL
from largerespatch.autoencoders.vq import VQ
from largerespatch.core.families import families_in, family_of, install
from largerespatch.core.patching import PatchStack
from largerespatch.options import Options

LEVELS = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "sample_size": 64}
DOWN = {"down_block_types": ("DownEncoderBlock2D",) * 4}
UP = {"up_block_types": ("UpDecoderBlock2D",) * 4}


def flux_2():
    torch.manual_seed(5)
    return AutoencoderKLFlux2(**LEVELS, **DOWN, **UP, latent_channels=4).eval().requires_grad_(False)


KIN = {"AutoencoderKL": tiny.vae, "AutoencoderKLFlux2": flux_2}
OTHERS = {
    "attention in an up block": lambda: tiny.vae(up_block_types=("UpDecoderBlock2D",) * 3 + ("AttnUpDecoderBlock2D",)),
    "attention in a down block": lambda: tiny.vae(
        down_block_types=("AttnDownEncoderBlock2D",) + ("DownEncoderBlock2D",) * 3
    ),
    "a decoder of films": lambda: AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32), layers_per_block=1, sample_size=64
    ),
}


@pytest.mark.parametrize("kind", KIN)
def test_the_family_is_known_by_how_a_model_is_built(kind):
    model = KIN[kind]()
    assert type(model).__name__ == kind
    assert type(family_of(model)) is KL
    assert family_of(model).factor(model) == 8
    found = families_in(SimpleNamespace(components={"vae": model, "scheduler": None}))
    assert list(found) == ["vae"] and found["vae"][0] is model


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_built_otherwise_is_left_to_others(kind):
    model = OTHERS[kind]()
    assert not KL().matches(model)
    assert type(family_of(model)) is AnyAutoencoder


def test_no_autoencoder_matches_by_its_name():
    class AutoencoderKL(nn.Module):
        pass

    assert not KL().matches(AutoencoderKL())


def sites(model, **options):
    options = {"vae_chunk_size_x": 10, "vae_chunk_size_y": 10} | options
    family = family_of(model)
    pipe = SimpleNamespace(progress_bar=Bar, components={"vae": model})
    return list(family.sites(model, "vae", Options(**options), pipe))


@BOTH
@pytest.mark.parametrize("kind", KIN)
def test_exact_equals_untiled(kind, half):
    vae, x, run = KIN[kind](), INPUTS[half](2, 24, 20), HALVES[half]
    expected = run(vae, x)
    Bar.last = None
    with PatchStack() as stack:
        install(stack, sites(vae, vae_mode="exact"))
        torch.testing.assert_close(run(vae, x), expected, rtol=0, atol=1e-4)
    assert Bar.last.title == f"VAE {half}r"
    assert Bar.last.updates == Bar.last.total > 10


@BOTH
@pytest.mark.parametrize("kind", KIN)
def test_two_passes_come_close_and_more_closer(kind, half):
    vae, x, run = KIN[kind](), INPUTS[half](1, 24, 20), HALVES[half]
    expected, errors = run(vae, x), []
    for passes in (2, 6):
        with PatchStack() as stack:
            install(stack, sites(vae, vae_mode="two-pass", vae_passes=passes))
            errors.append(float((run(vae, x) - expected).square().mean() / expected.var()))
        assert Bar.last.updates == Bar.last.total
    assert 0 < errors[0] < 0.15
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("model", [tiny.movq, lambda: VQModel(**DOWN, **UP, block_out_channels=(32,) * 4)])
def test_those_with_a_codebook_are_not_of_this_family(model):
    assert type(family_of(model())) is VQ


@pytest.mark.parametrize("kind", KIN)
def test_upstreams_tiling_is_off_meanwhile(kind):
    vae = KIN[kind]()
    vae.enable_tiling()
    with PatchStack() as stack:
        install(stack, sites(vae))
        assert not vae.use_tiling
    assert vae.use_tiling


def test_modes_are_told():
    told = {site.says for site in sites(tiny.vae(), vae_mode="exact", vae_offload=True)}
    assert "encoder and decoder exactly, in strips of 10 rows, whole maps on the host" in told
    told = {site.says for site in sites(tiny.vae(), vae_mode="two-pass", vae_passes=3)}
    assert "encoder and decoder in 3 passes over tiles of at most 10x10 latent pixels" in told
