"""Whole pipelines whose maps are on a host: the same pictures, and a device that holds little whatever the size."""

import gc
import weakref
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.image_processor import VaeImageProcessor
from test_weights import cpu_as_accelerator  # noqa: F401  a fixture
from torch import nn

import live
import tiny
from calls import assert_same, noise, text
from conftest import quiet
from family import CASES, ONE_STEP, SIZE, run
from halves import CPU, OFFLOADS
from largerespatch import LargeResPatch
from largerespatch.autoencoders import kl
from largerespatch.core.hosts import Host, HostRows
from largerespatch.core.planes import Map
from largerespatch.denoisers import unet as unets
from largerespatch.techniques.attention import chunked_attention, context, key_runs
from test_patch import SMALL, fingerprint

FLAT = SMALL | {"unet_offload": "maps", "unet_strip_rows": 3, "vae_offload": True}
LEAST = 2000  # bytes

PIPELINES = [
    *("text-to-image", "image-to-image", "ControlNet", "ControlNet, two", "T2I-Adapter", "IP-Adapter", "LoRA", "FreeU"),
    *("IP-Adapter with a mask", "PAG"),
]


@contextmanager
def elsewhere(least=LEAST):
    """Where models run is not the host, though the same memory."""
    host = lambda least=least: Host("cpu:0", band_bytes=500, least=least)  # noqa: E731
    with mock.patch.object(unets, "Host", lambda least: host()), mock.patch.object(kl, "Host", lambda: host(0)):
        yield


@pytest.fixture
def rows(monkeypatch):
    """The memory of maps on the host: all that was made, and is still there."""
    made, empty = weakref.WeakSet(), HostRows.empty.__func__

    def noting(cls, *args):
        found = empty(cls, *args)
        made.add(found)
        noting.count += 1
        return found

    noting.count = 0
    monkeypatch.setattr(HostRows, "empty", classmethod(noting))
    return SimpleNamespace(alive=made, count=lambda: noting.count)


def named(case):
    return [name for name in CASES if name in (f"Stable Diffusion: {case}", f"Stable Diffusion XL: {case}")]


# Families and ways, at once and a sample at a time, in turns; the first few meet all.
CHOSEN = [
    (name, (i + j) % 2 == 1)
    for i, case in enumerate(PIPELINES)
    for j, name in enumerate(named(case))
    if i < 3 or i // 2 % 2 == j
]
CHOSEN += [("others: Kandinsky 2.2", serial) for serial in (False, True)]


@pytest.mark.filterwarnings("ignore:unet_serial. PAG:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:attn_context:RuntimeWarning")
@pytest.mark.parametrize(("case", "serial"), CHOSEN)
def test_a_pipeline_makes_the_same_picture_with_its_maps_on_a_host(case, serial, rows):
    pipe, arguments = quiet(CASES[case].build()), ONE_STEP | CASES[case].arguments
    with LargeResPatch(pipe, SIZE, SIZE, **SMALL, unet_serial=serial):
        expected = run(pipe, arguments)
    before = fingerprint(pipe)
    with elsewhere(), LargeResPatch(pipe, SIZE, SIZE, **FLAT, unet_serial=serial):
        actual = run(pipe, arguments)
    assert type(actual) is torch.Tensor
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)  # steps and tiny models amplify rounding
    assert rows.count() > 10
    assert fingerprint(pipe) == before
    gc.collect()
    assert not rows.alive


def block_group_offload(model):
    apply_group_offloading(model, CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


@OFFLOADS
@pytest.mark.usefixtures("cpu_as_accelerator")  # older versions of diffusers have no group offload without one
def test_weights_that_come_and_go_do_so_for_maps_on_a_host(offload, rows):
    assert_offload_works(offload, rows)


@pytest.mark.usefixtures("cpu_as_accelerator")
def test_groups_of_blocks_that_come_and_go_do_so_for_maps_on_a_host(rows):
    assert_offload_works(block_group_offload, rows)


def assert_offload_works(offload, rows):
    model, sample, arguments = tiny.unet(), noise(2, 4, 18, 14), text(2)
    pipe = SimpleNamespace(components={"unet": model}, scheduler=None, vae_scale_factor=8)
    with LargeResPatch(pipe, 112, 144, **SMALL):
        expected = model(sample, **arguments).sample
    offload(model)
    with elsewhere(), LargeResPatch(pipe, 112, 144, **FLAT):
        for _ in range(2):
            assert_same(model(sample, **arguments).sample, expected)
    assert rows.count() > 10


@contextmanager
def interrupted(module, rows):
    """What runs inside is interrupted when `module` is called for the third time; then maps are on the host."""
    calls = []

    def interrupt(*args):
        calls.append(len(rows.alive))
        if len(calls) > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), module.register_forward_pre_hook(interrupt):
        yield
    assert calls[-1] > 0


@pytest.mark.parametrize("where", ["down_blocks.0.resnets.0.conv2", "up_blocks.1.attentions.0.transformer_blocks.0.ff"])
def test_an_interrupt_in_the_middle_of_a_step_leaves_the_pipeline_as_it_was_and_no_map_behind(where, pipe, rows):
    run(pipe, CASES["Stable Diffusion: text-to-image"].arguments)  # text encoders change by themselves in the first run
    before, module = fingerprint(pipe), pipe.unet.get_submodule(where)
    with interrupted(module, rows), elsewhere(), LargeResPatch(pipe, SIZE, SIZE, **FLAT):
        run(pipe, CASES["Stable Diffusion: text-to-image"].arguments)
    assert fingerprint(pipe) == before
    gc.collect()
    assert not rows.alive


class BySide(live.LiveBytes):
    """Counts memory of maps on the host as ``"host"``'s, all else as the device's."""

    hosting = False

    def _count(self, storage, device):
        super()._count(storage, "host" if self.hosting else "device")


@contextmanager
def by_side():
    """Counts the most bytes alive at once on the device and on the host, in real runs."""
    count, empty = BySide(), HostRows.empty.__func__

    def hosted(cls, *args):
        count.hosting = True
        try:
            return empty(cls, *args)
        finally:
            count.hosting = False

    with mock.patch.object(HostRows, "empty", classmethod(hosted)):
        yield count


def peaks(model, height, width, **options):
    """Of a call of a U-Net."""
    pipe = SimpleNamespace(components={"unet": model}, scheduler=None, vae_scale_factor=8)
    options |= {"attn_slice_x": 8, "attn_slice_y": 8, "attn_full_tokens": 64, "attn_context": 32, "ff_chunk_size": 64}
    sample, words = noise(1, 4, height, width), text(1)
    patch = LargeResPatch(pipe, 8 * width, 8 * height, **options)
    with elsewhere(least=8000), by_side() as count, patch, count:
        model(sample, **words)
    return count.peak["device"], count.peak["host"]


def test_only_the_host_holds_more_for_a_larger_image(monkeypatch):
    """What the device holds more of are the latent and, while heavy tokens are sought, some numbers for each token."""
    monkeypatch.setattr(context, "SCORES", 2**14)
    monkeypatch.setattr(context, "CROWD", 64)
    model = tiny.unet(layers_per_block=2)
    whole, none = peaks(model, 64, 32)
    device, host = peaks(model, 64, 32, unet_offload="maps", unet_strip_rows=4)
    larger_device, larger_host = peaks(model, 128, 32, unet_offload="maps", unet_strip_rows=4)
    assert none == 0
    assert device < whole / 5
    latent, tokens = 4 * 64 * 32 * 4, 64 * 32 * 16
    assert larger_device <= device + 2 * latent + tokens
    assert 1.9 * host <= larger_host <= 2.1 * host


@pytest.mark.parametrize("mode", ["exact", "two-pass"])
def test_a_decode_holds_less_than_one_map_of_the_latents_size(mode, monkeypatch):
    """Attention to all of it included."""
    monkeypatch.setattr(chunked_attention, "QUERIES", 256)
    monkeypatch.setattr(key_runs, "KEYS", 256)
    vae, latent, bar = (
        tiny.vae(block_out_channels=(4, 4, 32, 32), norm_num_groups=4),
        noise(1, 4, 64, 32),
        mock.MagicMock(),
    )
    pipe = SimpleNamespace(components={"vae": vae}, vae_scale_factor=8, progress_bar=lambda **_: bar)
    options = {"vae_mode": mode, "vae_offload": True, "vae_chunk_size_x": 8, "vae_chunk_size_y": 4}
    with elsewhere(), by_side() as count, LargeResPatch(pipe, 8 * 32, 8 * 64, **options), count:
        picture = vae.decode(latent).sample
    plane = 32 * latent[0, 0].nbytes
    assert count.peak["device"] - picture.nbytes < plane
    assert count.peak["host"] > 4 * plane


VAES = {"in half precision": torch.float16, "in float32": torch.float32}


WAYS = [
    {"vae_mode": "exact"},
    {"vae_mode": "exact", "vae_recompute": True},
    {"vae_mode": "two-pass"},
    {"vae_attn": "blocked"},
]
SIDES = [2048, 8192, 16384]
# Each way at two of the sides.
KINDS = [([*VAES][(i + j) % 2], way, side) for i, way in enumerate(WAYS) for j, side in enumerate(SIDES) if j != i % 3]


@pytest.mark.parametrize(("kind", "way", "side"), KINDS)
def test_stable_diffusions_vae_takes_a_gibibyte_of_a_device_at_any_size(kind, way, side):
    """Simulated: beside its weights and a picture that it is given, which is the pipeline's."""
    with torch.device("meta"):
        vae = tiny.vae(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32).to(VAES[kind])
    bar = mock.MagicMock()
    pipe = SimpleNamespace(
        components={"vae": vae}, vae=vae, progress_bar=lambda **_: bar, image_processor=VaeImageProcessor()
    )
    estimate = LargeResPatch(pipe, side, side, vae_offload=True, **way).estimate()
    picture = 3 * side**2 * VAES[kind].itemsize
    assert estimate.decode <= 2**30
    assert estimate.encode - picture <= 2**30


def test_a_hook_of_the_user_may_keep_any_map(pipe, rows):
    """What it kept is right, even after the call."""
    model, sample, kept = pipe.unet, noise(2, 4, 18, 14), {}
    for path in ("conv_in", "down_blocks.0.resnets.0", "down_blocks.0.downsamplers.0", "conv_norm_out", "conv_act"):
        model.get_submodule(path).register_forward_hook(lambda _, __, output, path=path: kept.update({path: output}))
    host_pipe = SimpleNamespace(components={"unet": model}, scheduler=None, vae_scale_factor=8)
    with LargeResPatch(host_pipe, 112, 144, **SMALL):
        model(sample, **text(2))
    expected = kept.copy()
    with elsewhere(), LargeResPatch(host_pipe, 112, 144, **FLAT):
        model(sample, **text(2))
    for path, plane in kept.items():
        assert isinstance(plane, Map)
        assert_same(plane.copied(), expected[path])


def test_modules_of_a_unet_in_training_are_left_alone(rows):
    model, sample = tiny.unet().requires_grad_(True), noise(1, 4, 18, 14)
    pipe = SimpleNamespace(components={"unet": model}, scheduler=None, vae_scale_factor=8)
    with torch.enable_grad(), elsewhere(), LargeResPatch(pipe, 112, 144, **FLAT):
        nn.functional.mse_loss(model(sample, **text(1)).sample, sample).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert rows.count() == 0
