"""Strip-wise execution equals the unpatched modules, and keeps its promise about memory."""

from fractions import Fraction

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from _common import LiveBytes
from largerespatch.padding import PADDING_MODES, install_padding
from largerespatch.patching import PatchStack
from largerespatch.strips import Strips, replacements
from largerespatch.vae import Exact
from test_vae import BOTH, HALVES, INPUTS, Bar, cutting

# Layers by the dozen in float32, statistics summed in another order.
ROUNDING = {"rtol": 0, "atol": 1e-4}


def install(stack, vae, size, wrap=False):
    for half, latent_scale in (("encoder", 8), ("decoder", 1)):
        model = getattr(vae, half)
        stack.wrap(model, "forward", Exact(model, f"vae.{half}", cutting(size, latent_scale, wrap)), f"vae.{half}")


def sd_like():
    """All that Stable Diffusion's VAE has: widening and narrowing blocks, with and without a shortcut."""
    return tiny.vae(block_out_channels=(8, 16, 32, 32), layers_per_block=2, norm_num_groups=8)


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(HALVES)),
    st.integers(1, 2),
    st.integers(1, 14),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from(PADDING_MODES),
)
def test_exact_equals_untiled(half, batch, height, width, rows, mode):
    if mode == "reflect":
        height, width = max(height, 2), max(width, 2)
    vae, x, run = sd_like(), INPUTS[half](batch, height, width), HALVES[half]
    given_x = x.clone()
    with PatchStack() as stack:
        install_padding(stack, vae, "vae", mode)
        expected = run(vae, x)
        install(stack, vae, (rows, 1), wrap=mode == "circular")
        torch.testing.assert_close(run(vae, x), expected, **ROUNDING)
    assert torch.equal(x, given_x)  # working in place stops short of the caller's own tensor


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_is_no_further_from_float32_than_untiled(half, dtype):
    vae, x, run = sd_like(), INPUTS[half](1, 24, 10), HALVES[half]
    reference = run(vae, x)
    for parameter in vae.parameters():
        parameter.data = parameter.to(dtype)
    untiled = run(vae, x.to(dtype))
    with PatchStack() as stack:
        install(stack, vae, (16, 16))
        exact = run(vae, x.to(dtype))
    assert exact.dtype == dtype
    assert (exact.float() - reference).norm() < 1.1 * (untiled.float() - reference).norm()


@BOTH
def test_an_input_of_one_tile_runs_unpatched(half):
    vae, x, run = sd_like(), INPUTS[half](1, 16, 12), HALVES[half]
    expected = run(vae, x)
    Bar.last = None
    with PatchStack() as stack:
        install(stack, vae, (16, 12))
        assert torch.equal(run(vae, x), expected)
    assert Bar.last is None


@BOTH
def test_every_module_is_restored_and_the_bar_completes(half):
    vae, x, run = sd_like(), INPUTS[half](1, 20, 20), HALVES[half]
    before = {name: dict(vars(module)) for name, module in vae.named_modules()}
    with PatchStack() as stack:
        install(stack, vae, (16, 16))
        run(vae, x)
    assert Bar.last.updates == Bar.last.total > 10
    assert {name: dict(vars(module)) for name, module in vae.named_modules()} == before


@pytest.mark.parametrize("options", [{"up": True}, {"down": True}, {"temb_channels": 8}])
def test_what_cannot_run_strip_by_strip_is_named(options):
    vae = sd_like()
    resnet = {"in_channels": 8, "groups": 8, "temb_channels": None} | options
    vae.decoder.up_blocks[1].resnets[2] = ResnetBlock2D(**resnet)
    with pytest.raises(
        ValueError, match=r"not know how to run vae\.decoder\.up_blocks\.1\.resnets\.2 \(ResnetBlock2D\)"
    ):
        Exact(vae.decoder, "vae.decoder", cutting((4, 4)))
    vae.decoder.conv_act = torch.nn.Hardtanh()
    with pytest.raises(ValueError, match=r"vae\.decoder\.\S+ \("):
        list(replacements(vae.decoder, Strips(4, False), "vae.decoder"))


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_reading_is_unharmed_by_writing_over_what_was_read(height, rows, halo, wrap):
    halo = min(halo, height)
    plane = torch.arange(float(height)).view(1, 1, height, 1).expand(1, 1, height, 2).clone()
    strips = Strips(rows, wrap)
    for strip, above, block in strips.read(plane, strips.cut(plane), halo):
        expected = torch.arange(strip.top - above, strip.top - above + block.shape[2])
        assert block[0, 0, :, 0].tolist() == (expected % height).tolist()
        assert strip.height <= rows
        assert above + strip.height <= block.shape[2]
        plane[:, :, strip.rows] = -1


@pytest.mark.parametrize("scale", [Fraction(1, 2), Fraction(1), Fraction(2)])
def test_strips_are_within_bounds_before_and_after_scaling(scale):
    for strip in Strips(8, False).cut(torch.zeros(1, 1, 50, 3), scale):
        assert max(strip.height, strip.height * scale) <= 8
        assert strip.top % scale.denominator == strip.bottom % scale.denominator == 0


@BOTH
def test_half_of_the_untiled_memory_is_enough(half):
    vae, x, run = sd_like(), INPUTS[half](1, 64, 16), HALVES[half]
    with LiveBytes() as untiled:
        run(vae, x)
    with PatchStack() as stack:
        install(stack, vae, (16, 16))
        with LiveBytes() as exact:
            run(vae, x)
    assert exact.peak <= 0.5 * untiled.peak


@BOTH
def test_pieces_have_no_gradients_and_say_so(half):
    vae, x, run = sd_like(), INPUTS[half](1, 20, 20).requires_grad_(), HALVES[half]
    with torch.enable_grad(), PatchStack() as stack:
        install(stack, vae, (16, 16))
        with pytest.raises(
            RuntimeError, match="VAE half of 20x20 latent pixels runs in pieces, which have no gradients"
        ):
            run(vae, x)
        assert not run(vae, x.detach()).requires_grad
