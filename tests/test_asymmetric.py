"""The autoencoder for inpainting, whose decoder may be shown the picture around a mask, against itself untiled."""

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, StableDiffusionInpaintPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

import family
import tiny
from conftest import quiet
from halves import MODES, Bar, cut_up, error, latent, live, padded, patched, picture, told
from largerespatch import LargeResPatch
from largerespatch.autoencoders.asymmetric import Asymmetric
from largerespatch.core.families import family_of
from largerespatch.core.hosts import Host
from live import fake


def vae(**changes):
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "down_block_out_channels": (8, 8, 16, 16),
        "up_block_out_channels": (8, 16, 32, 32),
        "layers_per_up_block": 2,
        "norm_num_groups": 4,
        "sample_size": 64,
    }
    return tiny.frozen(AsymmetricAutoencoderKL, 51, **config | changes)


def mask(batch, height, width):
    result = torch.zeros(batch, 1, height, width)
    result[:, :, height // 4 : height // 2, width // 3 :] = 1
    return result


def encode(model, x):
    return model.encode(x).latent_dist.mode()


def plain(model, x):
    return model.decode(x).sample


def shown(model, x):
    height, width = (8 * length for length in x.shape[-2:])
    image, where = picture(len(x), height, width, seed=4), mask(len(x), height, width)
    return model.decode(x, image=image.to(x.device), mask=where.to(x.device)).sample


RUNS = {"encode": encode, "plain": plain, "shown": shown}


def inputs(which, batch, height, width):
    return picture(batch, 8 * height, 8 * width) if which == "encode" else latent(batch, height, width)


def test_the_family_is_known():
    assert type(family_of(vae())) is Asymmetric


@settings(max_examples=16)
@given(
    st.sampled_from(sorted(RUNS)),
    st.integers(1, 2),
    st.integers(2, 12),
    st.integers(2, 7),
    st.integers(1, 14),
    st.sampled_from(["constant", "circular", "reflect", "replicate"]),
    st.booleans(),
    st.booleans(),
)
def test_exact_equals_untiled(which, batch, height, width, rows, padding, recompute, offload):
    model, x, run = vae(), inputs(which, batch, height, width), RUNS[which]
    with padded(model, padding):
        expected = run(model, x)
    sizes = {"vae_chunk_size_y": rows, "vae_chunk_size_x": 1, "vae_recompute": recompute, "vae_offload": offload}
    with patched(model, vae_mode="exact", padding_mode=padding, **sizes):
        assert error(run(model, x), expected) < 1e-4


@pytest.mark.parametrize("which", RUNS)
@MODES
@pytest.mark.parametrize("away", [False, True])
def test_all_is_cut_up_and_a_picture_is_seen_exactly_in_either_mode(monkeypatch, which, mode, away):
    monkeypatch.setattr(Host, "serves", lambda self, device: away)  # as if the model ran elsewhere
    model, x, run = vae(), inputs(which, 2, 13, 11), RUNS[which]
    expected = run(model, x)
    with patched(model, vae_mode=mode, vae_offload=True):
        found = error(cut_up(lambda: run(model, x)), expected)
    assert found < (1e-4 if mode == "exact" or which == "shown" else 0.8)
    assert Bar.last.title == ("VAE encoder" if which == "encode" else "VAE decoder")


def test_half_of_the_untiled_memory_is_enough_where_a_picture_is_shown():
    """The picture and the mask themselves are little beside maps of more channels."""
    model, z = vae(up_block_out_channels=(24, 48, 96, 96), layers_per_up_block=3), latent(1, 64, 64)
    model.to("meta")
    with fake():
        untiled = live(lambda: shown(model, z.to("meta")), "meta")
        with patched(model, vae_mode="exact", vae_chunk_size_x=16, vae_chunk_size_y=16):
            assert live(lambda: cut_up(lambda: shown(model, z.to("meta"))), "meta") <= 0.5 * untiled


def test_it_is_told():
    assert told(vae(), vae_mode="exact") == {"encoder and decoder exactly, in strips of 10 rows"}
    tiles = "encoder and decoder in two passes over tiles of at most 10x10 latent pixels"
    assert told(vae()) == {f"{tiles} (a decoder that is shown a picture exactly, in strips of 10 rows)"}


def pipeline():
    return quiet(StableDiffusionInpaintPipeline(**tiny.components(vae=vae())))


INPAINT = {"strength": 0.7, "width": 96, "height": 96, **family.INPAINT}


@MODES
def test_a_pipeline_makes_the_untiled_picture(mode):
    pipe = pipeline()
    expected = family.run(pipe, INPAINT)
    whole = {"attn_full_tokens": 10**6, "vae_chunk_size_x": 6, "vae_chunk_size_y": 6}
    patch = LargeResPatch(pipe, 96, 96, vae_mode=mode, **whole)
    with patch:
        assert error(family.run(pipe, INPAINT), expected) < (1e-4 if mode == "exact" else 0.2)
    assert torch.equal(family.run(pipe, INPAINT), expected)
