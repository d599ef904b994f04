"""What only CUDA can show: streams, pinned memory, the allocator, offloading that moves weights, half precision."""

import functools
import gc
import warnings

import pytest
import test_flux
import torch
import torch.nn.functional as F
from diffusers.hooks import apply_group_offloading
from joint import ALL, CLOSE, error, paint, patch
from table import transformers
from test_attention import attention, blocked
from torch.utils._pytree import tree_map_only

import tiny
from conftest import quiet
from largerespatch import LargeResPatch
from largerespatch.core.hosts import Host
from largerespatch.core.maps import StoredMap
from largerespatch.core.patching import PatchStack
from largerespatch.core.planes import fetch
from largerespatch.core.tilings import Runs, Tile
from largerespatch.denoisers import joint as joint_room
from largerespatch.denoisers import unet as unet_room
from largerespatch.techniques.attention import tile_attention as tile_room
from largerespatch.techniques.attention.blocked import Blocking
from largerespatch.techniques.attention.key_runs import _attend, _attend_plainly
from largerespatch.techniques.joint import ends, host_attention, kept_keys
from test_patch import SMALL, image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
OURS = "/largerespatch/"
STATISTICS_MATTER = {"block_out_channels": (32, 32, 64, 64)}


@pytest.fixture(autouse=True)
def exact_arithmetic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_rows_come_back_as_they_were_stored(rows):
    """Memory that was stored from is overwritten at once, and read memory is used again, as in a loop over strips."""
    host = Host(band_bytes=2**16)
    for _ in range(3):
        plane = torch.randn(2, 16, 257, 129, device="cuda")
        kept = StoredMap.empty(plane.shape, plane, host)
        assert all(band.is_pinned() for band in kept.memory.bands)
        for top, bottom in Runs(257, rows):
            part = plane[:, :, top:bottom].clone()
            kept.write(Tile(top, 0, bottom, 129), part)
            part.fill_(float("nan"))
            torch.mm(torch.randn(512, 512, device="cuda"), torch.randn(512, 512, device="cuda"))
        seen = torch.cat([part.clone() for part in fetch(kept, Runs(257, rows))], dim=2)
        assert torch.equal(seen, plane)
        assert torch.equal(kept.memory.gather(Tile(3, 5, 200, 77)), plane[:, :, 3:200, 5:77].cpu())


@pytest.mark.parametrize("direction", ["decode", "encode"])
@pytest.mark.parametrize("mode", ["two-pass", "exact", "recompute"])
def test_maps_of_a_vae_leave_and_return(mode, direction):
    vae = tiny.vae(**STATISTICS_MATTER).cuda()
    pipe = quiet(tiny.text_to_image())
    pipe.vae = vae
    options = {"vae_mode": "two-pass"} if mode == "two-pass" else {"vae_mode": "exact"}
    options |= {"vae_recompute": True} if mode == "recompute" else {}
    shape = (1, 4, 96, 72) if direction == "decode" else (1, 3, 768, 576)
    source = torch.randn(shape, device="cuda")
    results = {}
    for offload in (False, True):
        with LargeResPatch(pipe, 576, 768, vae_chunk_size_x=24, vae_chunk_size_y=16, vae_offload=offload, **options):
            for _ in range(3):
                result = vae.decode(source).sample if direction == "decode" else vae.encode(source).latent_dist.mode()
        results[offload] = result.cpu()
    torch.testing.assert_close(results[True], results[False], rtol=1e-4, atol=1e-5)


def test_the_exact_vae_is_exact_in_half_precision():
    """No further from float32 than the untiled decode in half precision."""
    pipe = quiet(tiny.text_to_image())
    source = torch.randn(1, 4, 64, 64)
    exact = pipe.vae.decode(source).sample
    pipe.vae.to("cuda", torch.float16)
    half = pipe.vae.decode(source.cuda().half()).sample.float().cpu()
    with LargeResPatch(pipe, 512, 512, vae_mode="exact", vae_chunk_size_y=16):
        pieces = pipe.vae.decode(source.cuda().half()).sample.float().cpu()
    assert (pieces - exact).abs().max() <= 1.5 * (half - exact).abs().max()


@pytest.mark.parametrize("options", [{}, {"unet_serial": True, "unet_strip_rows": 8, "unet_offload": True}])
def test_a_picture_is_that_of_the_host(options):
    host, device = (quiet(tiny.text_to_image()) for _ in range(2))
    expected = patched_image(host, **options)
    found = patched_image(device.to("cuda"), **options)
    assert (found - expected).abs().max() < 1e-3


def patched_image(pipe, **options):
    with LargeResPatch(pipe, 96, 64, **SMALL, **options):
        return torch.as_tensor(image(pipe, 96)).float().cpu()


def sequential(pipe):
    pipe.enable_sequential_cpu_offload()


def by_model(pipe):
    pipe.enable_model_cpu_offload()


def leaves(pipe, stream=False):
    for model in (pipe.unet, pipe.vae):
        apply_group_offloading(
            model,
            onload_device=torch.device("cuda"),
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=stream,
        )
    pipe.text_encoder.to("cuda")


def leaves_by_stream(pipe):
    leaves(pipe, stream=True)


@pytest.mark.parametrize("options", [{}, {"vae_mode": "exact", "unet_offload": True, "vae_offload": True}])
@pytest.mark.parametrize("offload", [sequential, by_model, leaves, leaves_by_stream])
def test_weights_may_come_and_go(offload, options):
    plain, pipe = (quiet(tiny.text_to_image()) for _ in range(2))
    expected = patched_image(plain.to("cuda"), **options)
    offload(pipe)
    for _ in range(2):
        assert (patched_image(pipe, **options) - expected).abs().max() < 1e-3


def test_auto_plans_when_the_first_call_starts(caplog):
    pipe = quiet(tiny.text_to_image()).to("cuda")
    with caplog.at_level("INFO", logger="largerespatch"), LargeResPatch(pipe, 512, 512, **SMALL) as patch:
        assert "when the first call starts" in repr(patch)
        image(pipe, 96)
        told = repr(patch)
    assert "no saver needed" in told
    assert "no saver needed" in caplog.text


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("queries", [1, 777, 2048])
def test_the_kernel_that_tells_masses_tells_the_right_ones(dtype, bound, queries):
    """Of a run of keys: the mean of their values, and the mass that means are added up by."""
    query, key, value = (torch.randn(1, 1, n, 512, device="cuda", dtype=dtype) for n in (queries, 3001, 3001))
    mean, mass = _attend(query, key, value, 512**-0.5)
    expected_mean, expected_mass = _attend_plainly(query.double(), key.double(), value.double(), 512**-0.5)
    assert mass.shape == expected_mass.shape
    assert (mean - expected_mean).abs().max() < bound
    assert (mass - expected_mass).abs().max() < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_context_is_corrected_and_nobody_waits_for_it(dtype, monkeypatch):
    module = attention().to("cuda", dtype)
    x = F.interpolate(torch.randn(1, 16, 6, 6), size=(24, 24), mode="bilinear").flatten(2).transpose(1, 2)
    x = x.to("cuda", dtype)
    expected, errors = module(x).float(), []
    for known in ((), tile_room.PROJECTS_PLAINLY):
        monkeypatch.setattr(tile_room, "PROJECTS_PLAINLY", known)
        with PatchStack() as stack:
            blocked(stack, module, 24, 24, Blocking("brick", 6, 6, full_tokens=1, context=144))
            module(x)  # what happens once, waits included
            torch.cuda.set_sync_debug_mode("error")
            try:
                result = module(x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        errors.append((result.float() - expected).square().mean())
    assert errors[1] < errors[0] / (200 if dtype == torch.float32 else 10)


@pytest.mark.parametrize("options", [{}, {"unet_serial": True, "unet_strip_rows": 16}])
def test_a_unet_with_its_maps_on_the_host_is_that_of_the_device(options, monkeypatch):
    monkeypatch.setattr(unet_room, "LEAST_BYTES", 0)
    unet = tiny.unet(block_out_channels=(32, 64), cross_attention_dim=32).cuda()
    pipe = quiet(tiny.text_to_image())
    pipe.unet = unet
    source, words = torch.randn(2, 4, 97, 61, device="cuda"), torch.randn(2, 7, 32, device="cuda")

    def step(**more):
        with torch.no_grad(), LargeResPatch(pipe, 512, 512, memory_limit=None, **SMALL | options | more):
            return unet(source, 500, words).sample

    expected = step()
    for _ in range(3):
        assert (step(unet_offload="maps") - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("held", [1, 2**28])
@pytest.mark.parametrize("case", ["two pictures", "Kontext"])
def test_a_transformer_with_its_maps_on_the_host_is_that_of_the_device(case, held, monkeypatch):
    monkeypatch.setattr(joint_room, "LEAST_BYTES", 0)
    monkeypatch.setattr(host_attention, "HELD", held)
    build, arguments, _ = test_flux.TestFlux.cases[case]
    pipe = quiet(build()).to("cuda")
    told = tree_map_only(torch.Tensor, torch.Tensor.cuda, arguments)

    def drawn(**more):
        with patch(pipe, attn_context=24, memory_limit=None, **more):
            return paint(pipe, told)

    expected = drawn()
    for _ in range(3):
        assert error(drawn(unet_offload="maps"), expected) < CLOSE


TRANSFORMERS = pytest.mark.parametrize("kind", transformers(), ids=lambda kind: kind.family)


@TRANSFORMERS
def test_a_transformer_is_that_of_the_host(kind, monkeypatch):
    """With all tokens as context and not all of them looked at at once; and with few cells of a vast map."""
    monkeypatch.setattr(ends, "ENOUGH", 30)
    case = next(iter(kind.cases.values()))
    pipe = quiet(case.build())
    told = tree_map_only(torch.Tensor, torch.Tensor.cuda, case.arguments)
    with patch(pipe, attn_context=24), monkeypatch.context() as vast:
        vast.setattr(kept_keys, "VAST", 1)
        expected = paint(pipe, case.arguments)
    pipe.to("cuda")
    dense = paint(pipe, told)
    with patch(pipe, attn_context=ALL, memory_limit=None):
        assert error(paint(pipe, told), dense) < CLOSE
    with patch(pipe, attn_context=24, memory_limit=None), monkeypatch.context() as vast:
        vast.setattr(kept_keys, "VAST", 1)
        assert error(paint(pipe, told).cpu(), expected) < 10 * CLOSE


@pytest.mark.parametrize("vast", [False, True])
@TRANSFORMERS
def test_a_transformers_steps_wait_for_nothing(kind, vast, monkeypatch):
    """But for timesteps, where the pipeline does not say which one it is at. What is read once is read in the first."""
    monkeypatch.setattr(kept_keys, "VAST", 1 if vast else 10**6)
    case = next(iter(kind.cases.values()))
    pipe = quiet(case.build()).to("cuda")
    told, original, calls = tree_map_only(torch.Tensor, torch.Tensor.cuda, case.arguments), [], []

    @functools.wraps(pipe.transformer.forward)
    def watched(*args, **kwargs):
        calls.append(True)
        torch.cuda.set_sync_debug_mode("warn" if len(calls) > 2 else "default")  # guidance may be in two calls
        try:
            return original[0](*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with warnings.catch_warnings(record=True) as caught, patch(pipe, attn_context=24, memory_limit=None):
        warnings.simplefilter("always")
        original.append(pipe.transformer.forward)
        with monkeypatch.context() as watching:
            watching.setitem(vars(pipe.transformer), "forward", watched)
            paint(pipe, told, num_inference_steps=4)
    waits = {each.filename for each in caught if "synchroniz" in str(each.message) and OURS in each.filename}
    known = {entry.split(", ")[1].split(":")[0] for entry in kind.waits} | {"techniques/notes.py"}
    assert len(calls) > 2
    assert {path.split(OURS)[1] for path in waits} <= known


@pytest.mark.parametrize("mode", ["two-pass", "exact"])
def test_an_image_is_decoded_as_its_strips_come(mode):
    pipe = quiet(tiny.text_to_image()).to("cuda")
    latents = torch.randn(1, 4, 64, 48, device="cuda")
    with LargeResPatch(pipe, 384, 512, memory_limit=None, vae_mode=mode, vae_offload=True, **SMALL) as patch:
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        expected = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
        assert patch.decode(latents).tobytes() == expected.tobytes()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_models_on_two_devices():
    pipe = quiet(tiny.text_to_image())
    pipe.unet.to("cuda:0")
    pipe.vae.to("cuda:1")
    source, words = torch.randn(2, 4, 64, 64, device="cuda:0"), torch.randn(2, 7, 32, device="cuda:0")
    with LargeResPatch(pipe, 512, 512, unet_offload=True, vae_offload=True, vae_mode="exact") as patch:
        pipe.unet(source, 500, words)
        decoded = pipe.vae.decode(source[:1].to("cuda:1")).sample
        weights = patch.estimate().weights
    assert decoded.device == torch.device("cuda:1")
    assert weights == sum(each.numel() * each.element_size() for each in pipe.unet.parameters())
