"""Flux 2's autoencoder: `AutoencoderKL`'s encoder and decoder. The batch norm over packed latents is outside of it."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline
from test_kl import flux_2

from conftest import quiet
from halves import BOTH, HALVES, INPUTS, OFFLOADS, cut_up, error, latent, live, patched, picture
from largerespatch import LargeResPatch
from largerespatch.core import calls

MODES = pytest.mark.parametrize("mode", ["exact", "two-pass"])


@BOTH
@OFFLOADS
@MODES
def test_weights_may_come_and_go(half, offload, mode):
    model, x, run = flux_2(), INPUTS[half](1, 24, 20), HALVES[half]
    with patched(model, vae_mode=mode):
        expected = run(model, x)
    offload(model)
    with patched(model, vae_mode=mode):
        assert torch.equal(cut_up(lambda: run(model, x)), expected)
        assert torch.equal(run(model, x), expected)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_is_no_further_from_float32_than_untiled(half, dtype):
    model, x, run = flux_2(), INPUTS[half](1, 16, 12), HALVES[half]
    reference = run(model, x)
    for parameter in model.parameters():
        parameter.data = parameter.to(dtype)
    untiled = error(run(model, x.to(dtype)), reference)
    with patched(model, vae_mode="exact"):
        assert error(cut_up(lambda: run(model, x.to(dtype))), reference) < 1.1 * untiled


@MODES
def test_half_of_the_untiled_memory_is_enough(mode):
    model, z = flux_2(), latent(1, 64, 64)
    untiled = live(lambda: model.decode(z))
    with patched(model, vae_mode=mode, vae_chunk_size_x=16, vae_chunk_size_y=16):
        assert live(lambda: cut_up(lambda: model.decode(z))) <= 0.5 * untiled


def test_upstreams_slicing_is_off_meanwhile():
    model, z = flux_2(), latent(2, 24, 20)
    expected = model.decode(z).sample
    model.enable_slicing()
    with patched(model, vae_mode="exact"):
        assert not model.use_slicing
        assert error(model.decode(z).sample, expected) < 1e-4
    assert model.use_slicing


def pipeline():
    parts = dict.fromkeys(("text_encoder", "tokenizer", "transformer"))
    return quiet(Flux2Pipeline(vae=flux_2(), scheduler=FlowMatchEulerDiscreteScheduler(), **parts))


@BOTH
@MODES
def test_the_estimate_is_what_a_real_run_holds(half, mode):
    pipe = pipeline()
    patch = LargeResPatch(pipe, 256, 320, vae_mode=mode, vae_chunk_size_x=12, vae_chunk_size_y=12)
    x = picture(1, 320, 256) if half == "encode" else latent(1, 40, 32)

    def run():
        result = HALVES[half](pipe.vae, x.clone())
        return pipe.image_processor.postprocess(result, output_type="pt") if half == "decode" else result

    pictures = sum(each.nbytes for each in calls.held(pipe, 320, 256))  # that may be edited, all through a call
    bare = live(run) + pictures
    with patch:
        held = live(run) + pictures
    assert getattr(patch.estimate(), half) == pytest.approx(held, rel=0.1)
    assert getattr(patch.estimate(patched=False), half) == pytest.approx(bare, rel=0.1)
    assert "vae (AutoencoderKLFlux2): encoder and decoder" in repr(patch)
