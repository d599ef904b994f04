"""The walk through an encoder or decoder equals the untiled one, and keeps its promise about memory."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import given, settings
from hypothesis import strategies as st
from products import in_pairs

import streams
import tiny
from halves import BOTH, HALVES, INPUTS, Bar, cutting
from largerespatch.core.families import install
from largerespatch.core.hosts import Host
from largerespatch.core.patching import PatchStack
from largerespatch.techniques.padding import padding_sites
from largerespatch.techniques.vae.halves import Exact
from live import LiveBytes, fake

# Layers by the dozen in float32, statistics summed in another order.
ROUNDING = {"rtol": 0, "atol": 1e-4}


# Not where the model runs, though the same memory: whole maps live here and their strips are copied.
ELSEWHERE = Host("cpu:0", band_bytes=1500)
PADDING_MODES = ("constant", "circular", "reflect", "replicate")


def install_exact(stack, vae, size, wrap=False, **options):
    for half, latent_scale in (("encoder", 8), ("decoder", 1)):
        model = getattr(vae, half)
        exact = Exact(model, f"vae.{half}", cutting(size, latent_scale, wrap), **options)
        stack.wrap(model, "forward", exact, f"vae.{half}")


def sd_like():
    """All that Stable Diffusion's VAE has: widening and narrowing blocks, with and without a shortcut."""
    return tiny.vae(block_out_channels=(8, 16, 32, 32), layers_per_block=2, norm_num_groups=8)


@settings(max_examples=16)
@given(
    st.sampled_from(sorted(HALVES)),
    st.integers(1, 2),
    st.integers(1, 14),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from(PADDING_MODES),
    st.booleans(),
    st.sampled_from([None, ELSEWHERE]),
)
def test_exact_equals_untiled(half, batch, height, width, rows, mode, recompute, host):
    if mode == "reflect":
        height, width = max(height, 2), max(width, 2)
    vae, x, run = sd_like(), INPUTS[half](batch, height, width), HALVES[half]
    given_x = x.clone()
    with PatchStack() as stack:
        install(stack, padding_sites(vae, "vae", mode))
        expected = run(vae, x)
        install_exact(stack, vae, (rows, 1), wrap=mode == "circular", recompute=recompute, host=host)
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
        install_exact(stack, vae, (16, 16))
        exact = run(vae, x.to(dtype))
    assert exact.dtype == dtype
    assert (exact.float() - reference).norm() < 1.1 * (untiled.float() - reference).norm()


@BOTH
def test_an_input_of_one_tile_runs_unpatched(half):
    vae, x, run = sd_like(), INPUTS[half](1, 16, 12), HALVES[half]
    expected = run(vae, x)
    Bar.last = None
    with PatchStack() as stack:
        install_exact(stack, vae, (16, 12))
        assert torch.equal(run(vae, x), expected)
    assert Bar.last is None


@BOTH
def test_every_module_is_restored_and_the_bar_completes(half):
    vae, x, run = sd_like(), INPUTS[half](1, 20, 20), HALVES[half]
    before = {name: dict(vars(module)) for name, module in vae.named_modules()}
    with PatchStack() as stack:
        install_exact(stack, vae, (16, 16))
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
        Exact(vae.decoder, "vae.decoder", cutting((4, 4)))


def live_bytes(half, height, **options):
    """The peaks of the untiled half and of the exact one, for an input of ``height x 8`` latent pixels."""
    vae, x, run = sd_like(), INPUTS[half](1, height, 8), HALVES[half]
    with LiveBytes() as untiled:
        run(vae, x)
    with PatchStack() as stack:
        install_exact(stack, vae, (16, 16), **options)
        with LiveBytes() as exact:
            run(vae, x)
    return untiled.peak["cpu"], exact.peak["cpu"]


@BOTH
def test_half_of_the_untiled_memory_is_enough(half):
    untiled, exact = live_bytes(half, 64)
    assert exact <= 0.5 * untiled


@BOTH
def test_recomputing_needs_a_third_of_the_untiled_memory(half):
    untiled, exact = live_bytes(half, 64, recompute=True)
    assert exact <= 0.33 * untiled


def bytes_by_device(half, height, recompute):
    """Peaks on a device and on its host, played by fake tensors on ``meta`` and on ``cpu``: nothing is computed."""
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with fake():
        with torch.device("meta"):
            vae = tiny.vae(block_out_channels=(8, 16), layers_per_block=1, **levels)
            x = torch.empty(1, 3, 2 * height, 8) if half == "encode" else torch.empty(1, 4, height, 4)
        model = vae.encoder if half == "encode" else vae.decoder
        model.mid_block.attentions[0] = None  # attention takes its whole map to the device
        pieces = cutting((16, 4), 2 if half == "encode" else 1)
        exact = Exact(model, half, pieces, recompute=recompute, host=Host(band_bytes=500))
        with PatchStack() as stack, LiveBytes() as counted:
            stack.wrap(model, "forward", exact, half)
            result = model(x)
    assert result.device.type == ("meta" if half == "encode" else "cpu")  # where a large picture stays
    return counted.peak["meta"], counted.peak["cpu"]


@pytest.mark.parametrize(("half", "recompute"), [("encode", False), ("decode", True)])
def test_on_a_device_with_a_host_only_the_host_holds_more_for_a_larger_image(half, recompute):
    device, host = bytes_by_device(half, 32, recompute)
    larger_device, larger_host = bytes_by_device(half, 64, recompute)
    assert larger_device <= 1.05 * device
    assert larger_host >= 1.8 * host


@in_pairs({"half": HALVES, "recompute": [False, True], "wrap": [False, True]})
def test_copies_on_streams_of_their_own_are_waited_for(half, recompute, wrap):
    """As on CUDA, on streams that are played."""
    vae, x, run = sd_like(), INPUTS[half](1, 7, 5), HALVES[half]
    host = Host("cpu:0", band_bytes=1500)
    results = []
    for where in (None, host):
        with nullcontext() if where is None else streams.play(host) as watch, PatchStack() as stack:
            install(stack, padding_sites(vae, "vae", "circular" if wrap else "constant"))
            install_exact(stack, vae, (3, 4), wrap, recompute=recompute, host=where)
            results.append(run(vae, x))
    torch.testing.assert_close(*results, **ROUNDING)
    assert [stream.total > 50 for stream in watch.sides] == [True, True]
    assert watch.sound()


def listen(model):
    """Returns what each module gives, by path, as hooks get and keep it."""
    kept = {}
    for path, module in model.named_modules():
        module.register_forward_hook(lambda _, __, output, path=path: kept.setdefault(path, []).append(output))
    return kept


@in_pairs({"half": ["encode", "decode"], "recompute": [False, True], "host": [None, ELSEWHERE], "rows": [3, 7]})
def test_what_a_hook_is_given_is_right_and_stays_so_or_it_is_not_called(half, recompute, host, rows):
    vae, x, run = sd_like(), INPUTS[half](1, 12, 6), HALVES[half]
    model = vae.encoder if half == "encode" else vae.decoder
    kept = listen(model)
    run(vae, x)
    expected = dict(kept)
    kept.clear()
    with PatchStack() as stack:
        install_exact(stack, vae, (rows, 4), recompute=recompute, host=host)
        with pytest.warns(RuntimeWarning, match=r"so the forward hooks on \d+ of its modules are not called") as caught:
            run(vae, x)
            run(vae, x + 1)
        assert len(caught) == 1
    steps = dict(Exact(model, "", cutting((rows, 4))).steps)
    containers = [path for path, _ in model.named_modules() if any(step.startswith(f".{path}.") for step in steps)]
    called = [*(step[1:] for step in steps), *containers, ""]
    assert set(kept) == set(called) - {path for path in called if path not in expected}
    for path, (first, second) in kept.items():
        torch.testing.assert_close(first + 0, *expected[path], **ROUNDING, msg=path)
        assert not torch.equal(first, second)
    run(vae, x)
    assert set(kept) == set(expected)


@BOTH
def test_what_a_hook_gives_in_place_of_a_map_is_used(half):
    vae, x, run = sd_like(), INPUTS[half](1, 12, 6), HALVES[half]
    model = vae.encoder if half == "encode" else vae.decoder
    for module in (model.conv_in, model.mid_block, model.mid_block.resnets[0], model.conv_norm_out):
        module.register_forward_hook(lambda _, __, output: 0.5 * output)
    model.mid_block.resnets[1].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    expected = run(vae, x)
    with PatchStack() as stack:
        install_exact(stack, vae, (3, 4), recompute=True)
        torch.testing.assert_close(run(vae, x), expected, **ROUNDING)


def test_a_hook_on_every_module_there_is_keeps_right_values_too():
    vae, x, run, kept = sd_like(), INPUTS["decode"](1, 12, 6), HALVES["decode"], []
    step = vae.decoder.up_blocks[1].resnets[1]
    everywhere = lambda module, _, output: kept.append(output) if module is step else None  # noqa: E731
    handle = torch.nn.modules.module.register_module_forward_hook(everywhere)
    try:
        run(vae, x)
        with PatchStack() as stack:
            install_exact(stack, vae, (3, 4))
            with pytest.warns(
                RuntimeWarning, match="so hooks that are registered for every module there is see pieces"
            ):
                run(vae, x)
    finally:
        handle.remove()
    expected, actual = kept
    torch.testing.assert_close(actual + 0, expected, **ROUNDING)


@BOTH
def test_pieces_have_no_gradients_and_say_so(half):
    vae, x, run = sd_like(), INPUTS[half](1, 20, 20).requires_grad_(), HALVES[half]
    with torch.enable_grad(), PatchStack() as stack:
        install_exact(stack, vae, (16, 16))
        with pytest.raises(
            RuntimeError, match="VAE half of 20x20 latent pixels runs in pieces, which have no gradients"
        ):
            run(vae, x)
        assert not run(vae, x.detach()).requires_grad


@pytest.mark.parametrize(
    ("tile", "factor", "rows"),
    [(5, 8, 5), (64, 8, 64), (5, 4, 5), (3, 32, 12), (8, 32, 32), (24, 16, 32), (64, 32, 64)],
)
def test_strips_have_enough_rows_where_a_tile_has_few_latent_pixels(tile, factor, rows):
    assert replace(cutting((tile, 9)), factor=factor).strip_height == rows
