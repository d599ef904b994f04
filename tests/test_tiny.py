"""The tiny autoencoder, of convolutions alone: exact in pieces, whatever the way."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from products import in_pairs
from test_causal import (
    cast_by_layers,
    offloaded_as_a_model,
    offloaded_by_blocks,
    offloaded_by_layers,
    offloaded_by_leaves,
)
from test_weights import cpu_as_accelerator, offload_on_a_stream  # noqa: F401  fixtures

import tiny
from conftest import quiet
from halves import BOTH, INPUTS, MODES, PADDING_MODES, Bar, in_pieces
from largerespatch import LargeResPatch
from largerespatch.autoencoders import kl
from largerespatch.autoencoders.any import AnyAutoencoder
from largerespatch.autoencoders.tiny import Tiny
from largerespatch.core.families import Order, factor_of, family_of
from largerespatch.memory.counting import LiveBytes
from largerespatch.options import Options
from largerespatch.techniques.vae import halves as halves_room
from test_patch import fingerprint, image

HALVES = {"encode": lambda vae, x: vae.encode(x).latents, "decode": lambda vae, x: vae.decode(x).sample}
NARROW = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
PUBLISHED = {"encoder_block_out_channels": (64,) * 4, "decoder_block_out_channels": (64,) * 4}

CLOSE = 1e-5  # relative, of convolutions in float32


def autoencoder(**changes):
    """As published, but narrow, and with weights that let all of a picture through."""
    vae = tiny.frozen(AutoencoderTiny, 19, **NARROW | changes)
    for parameter in vae.parameters():
        if parameter.ndim == 4:
            parameter.data *= 1.5
    return vae


def error(result, expected):
    assert result.shape == expected.shape
    return float((result - expected).norm() / (expected - expected.mean()).norm())


def test_the_family_is_known_by_how_a_model_is_built():
    vae = autoencoder()
    assert type(family_of(vae)) is Tiny
    assert factor_of(SimpleNamespace(components={"vae": vae})) == 8


@pytest.mark.parametrize("changes", [{"upsampling_scaling_factor": 3}, {"upsample_fn": "bilinear"}])
def test_other_upsamplers_are_left_to_others(changes):
    assert type(family_of(autoencoder(**changes))) is AnyAutoencoder


@settings(max_examples=16)
@given(
    st.sampled_from(sorted(HALVES)),
    st.sampled_from(["exact", "two-pass"]),
    st.integers(1, 2),
    st.integers(2, 20),
    st.integers(2, 12),
    st.integers(1, 16),
    st.integers(1, 16),
    st.sampled_from(PADDING_MODES),
    st.booleans(),
)
def test_pieces_equal_the_untiled_result(half, mode, batch, height, width, rows, columns, padding_mode, away):
    vae, x, run = autoencoder(), INPUTS[half](batch, height, width), HALVES[half]
    before = x.clone()
    with in_pieces(vae, 1000, padding_mode=padding_mode):
        expected = run(vae, x)
    with in_pieces(vae, rows, columns, vae_mode=mode, padding_mode=padding_mode, vae_offload=away):
        assert error(run(vae, x), expected) < CLOSE
    assert torch.equal(x, before)


@BOTH
@MODES
@pytest.mark.parametrize(
    "changes",
    [
        PUBLISHED,
        {"latent_channels": 16, "act_fn": "gelu"},
        {"num_encoder_blocks": (1, 2, 1, 3), "num_decoder_blocks": (2, 1, 0, 1)},
    ],
    ids=["published", "for 16 channels", "other depths"],
)
def test_other_configurations_are_exact_too(half, mode, changes):
    vae = autoencoder(**changes)
    x = INPUTS["encode"](1, 16, 12) if half == "encode" else torch.randn(1, vae.config.latent_channels, 16, 12)
    expected = HALVES[half](vae, x)
    with in_pieces(vae, 5, 4, vae_mode=mode):
        assert error(HALVES[half](vae, x), expected) < CLOSE
    assert Bar.last.updates == Bar.last.total > 8


@in_pairs({"half": ["encode", "decode"], "mode": ["exact", "two-pass"], "dtype": [torch.float16, torch.bfloat16]})
def test_in_half_precision_it_is_no_further_from_float32_than_untiled(half, mode, dtype):
    vae, x, run = autoencoder(), INPUTS[half](1, 24, 10), HALVES[half]
    reference = run(vae, x)
    for parameter in vae.parameters():
        parameter.data = parameter.to(dtype)
    untiled = run(vae, x.to(dtype))
    with in_pieces(vae, 8, 8, vae_mode=mode):
        result = run(vae, x.to(dtype))
    assert result.dtype == dtype
    assert (result.float() - reference).norm() < 1.1 * (untiled.float() - reference).norm()


@BOTH
@MODES
def test_an_image_of_one_tile_runs_unin_pieces(half, mode):
    vae, x, run = autoencoder(), INPUTS[half](1, 9, 7), HALVES[half]
    expected = run(vae, x)
    Bar.last = None
    with in_pieces(vae, 9, 7, vae_mode=mode):
        assert torch.equal(run(vae, x), expected)
    assert Bar.last is None


@MODES
@pytest.mark.parametrize("size", [(92, 64), (96, 61), (95, 63)])
def test_of_images_of_no_whole_latent_pixels_all_is_encoded(mode, size):
    vae, x = autoencoder(), torch.rand(1, 3, *size) * 2 - 1
    expected = vae.encode(x).latents
    with in_pieces(vae, 5, 4, vae_mode=mode):
        assert torch.equal(vae.encode(x).latents, expected)


@BOTH
@MODES
def test_where_maps_live_elsewhere_none_is_whole_here(half, mode, monkeypatch):
    """But the picture: what is computed on is never as large as a map."""
    vae, x, run, largest = autoencoder(), INPUTS[half](1, 32, 8), HALVES[half], []
    forward = torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: largest.append(x.numel()) or forward(self, x))
    run(vae, x)
    whole = max(largest)
    largest.clear()
    with in_pieces(vae, 4, 8, vae_mode=mode, vae_offload=True):
        run(vae, x)
    assert max(largest) < whole / 2


@BOTH
@MODES
def test_circular_padding_makes_an_autoencoder_commute_with_rolling(half, mode):
    vae, x, run = autoencoder(), INPUTS[half](1, 12, 10), HALVES[half]
    there, back = ((16, 8), (-2, -1)) if half == "encode" else ((2, 1), (-16, -8))
    with in_pieces(vae, 3, 4, padding_mode="circular", vae_mode=mode):
        plain, rolled = run(vae, x), run(vae, x.roll(there, (2, 3)))
        assert error(rolled.roll(back, (2, 3)), plain) < CLOSE
    assert error(run(vae, x.roll(there, (2, 3))).roll(back, (2, 3)), run(vae, x)) > 100 * CLOSE


@MODES
def test_an_estimate_knows_which_weights_are_there_at_once(mode):
    vae, pipe = autoencoder(), SimpleNamespace(progress_bar=Bar)
    halves = [vae.encoder.layers, vae.decoder.layers]
    found = family_of(vae).sites(vae, "vae", Options(vae_mode=mode), pipe)
    holds = [site.holds for site in found if site.module in halves and site.order == Order.IN_STAGES]
    assert len(holds) == 2 and all(holds)


def test_upstreams_tiling_is_off_meanwhile():
    vae, x = autoencoder(), INPUTS["decode"](1, 80, 7)
    expected = vae.decode(x).sample
    vae.enable_tiling()
    assert error(vae.decode(x).sample, expected) > 10 * CLOSE
    with in_pieces(vae, 5, 4):
        assert not vae.use_tiling
        assert error(vae.decode(x).sample, expected) < CLOSE
    assert vae.use_tiling


@BOTH
@MODES
def test_slicing_runs_the_samples_of_a_batch_in_turns(half, mode, monkeypatch):
    vae, x, run, seen = autoencoder(), INPUTS[half](3, 9, 7), HALVES[half], []
    expected = run(vae, x)
    vae.enable_slicing()
    kind = halves_room.Exact if mode == "exact" else kl.TwoPass
    run_pieces = kind._run

    def noted(self, original, some):
        seen.append(len(some))
        return run_pieces(self, original, some)

    monkeypatch.setattr(kind, "_run", noted)
    with in_pieces(vae, 5, 4, vae_mode=mode):
        assert not vae.use_slicing
        assert error(run(vae, x), expected) < CLOSE
    assert seen == [1, 1, 1]
    assert vae.use_slicing


@MODES
@pytest.mark.parametrize(
    "hook",
    [offloaded_by_leaves, offloaded_by_blocks, offloaded_by_layers, offloaded_as_a_model, cast_by_layers],
)
def test_hooks_that_bring_weights_work(mode, hook):
    vae = autoencoder()
    hook(vae)
    for half in HALVES:
        x, run = INPUTS[half](1, 9, 7), HALVES[half]
        expected = run(vae, x)
        for padding_mode in ("constant", "circular"):
            with in_pieces(vae, 5, 4, vae_mode=mode, padding_mode=padding_mode):
                result = run(vae, x)
            assert (error(result, expected) < CLOSE) == (padding_mode == "constant")
        assert torch.equal(run(vae, x), expected)


def test_two_levels_run_in_tiles_or_more():
    vae = autoencoder()
    family = family_of(vae)
    for half, encodes in ((vae.encoder, True), (vae.decoder, False)):
        splits = family.splits(half.layers, encodes)
        scales = [split.scale for split in splits]
        assert scales == ([1 / 4, 1 / 8, 1 / 8] if encodes else [2, 4, 8])
        assert splits[-1].tiled == range(len(half.layers))
    # One convolution and three blocks of three, half of one on the doubled map, and half of the last block and that.
    assert family.splits(vae.decoder.layers, False)[0].halo == 13


def pipeline(kind=StableDiffusionPipeline):
    return quiet(kind(**tiny.components(vae=autoencoder())))


VAE_ALONE = {"attn_full_tokens": 10**6, "ff_chunk_size": 10**6, "vae_chunk_size_x": 5, "vae_chunk_size_y": 5}


@MODES
def test_a_pipeline_paints_the_untiled_picture(mode):
    pipe = pipeline()
    before, expected = fingerprint(pipe), image(pipe, 96)
    with LargeResPatch(pipe, 96, 64, vae_mode=mode, **VAE_ALONE):
        assert error(image(pipe, 96), expected) < 10 * CLOSE  # of three layers more, that round to numbers of 8 bits
    assert fingerprint(pipe) == before
    assert torch.equal(image(pipe, 96), expected)


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("exact", "exactly, in strips of 5 rows"),
        ("two-pass", "exactly, in one pass over tiles of at most 7x5 latent pixels"),
    ],
)
def test_repr_says_how(mode, says):
    text = repr(LargeResPatch(pipeline(), 96, 64, vae_mode=mode, vae_chunk_size_x=7, vae_chunk_size_y=5))
    assert f"vae (AutoencoderTiny): encoder and decoder {says}\n" in f"{text}\n"


@pytest.mark.parametrize("mode", ["exact", "two-pass", "bare"])
@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_the_estimate_is_what_a_real_run_holds(stage, mode):
    pipe = pipeline(StableDiffusionImg2ImgPipeline if stage == "encode" else StableDiffusionPipeline)
    options = {} if mode == "bare" else {"vae_mode": mode}
    patch = LargeResPatch(pipe, 256, 192, vae_chunk_size_x=12, vae_chunk_size_y=12, **options)
    estimate = patch.estimate(patched=mode != "bare")
    x = INPUTS[stage](1, 24, 32)
    with nullcontext() if mode == "bare" else patch, LiveBytes("cpu") as count:
        x = x + 0
        if stage == "encode":
            kept = [torch.empty(1, 3, 192, 256), torch.empty(1, 3, 192, 256)]  # as it came, and prepared
            HALVES["encode"](pipe.vae, x)
            assert kept
        else:
            decoded = pipe.vae.decode(x, return_dict=False)[0]
            pipe.image_processor.postprocess(decoded, output_type="pt")
    assert getattr(estimate, stage) == pytest.approx(count.peak, rel=0.1)
