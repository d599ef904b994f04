"""Estimates against what real runs hold, and settings that fit a budget."""

import sys
from functools import partial

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from torch.utils._python_dispatch import TorchDispatchMode

import family
import tiny
from conftest import quiet
from largerespatch import LargeResPatch, planner, stages
from largerespatch.memory import LiveBytes, parse_bytes
from largerespatch.planner import MemoryEstimate, Planner, free_bytes
from largerespatch.rehearsal import pieces, rehearsal
from test_patch import SMALL, fingerprint

MIB = 2**20
BLOCKS = {"attn_slice_x": 12, "attn_slice_y": 12, "attn_full_tokens": 144, "ff_chunk_size": 200}
TILES = {"vae_chunk_size_x": 12, "vae_chunk_size_y": 12}


def text_to_image(pipe, width, height, output_type="pt"):
    return pipe("a house", width=width, height=height, num_inference_steps=1, output_type=output_type)


def image_to_image(pipe, width, height):
    image = torch.zeros(1, 3, height, width)
    return pipe("a house", image=image, strength=1.0, num_inference_steps=1, output_type="pt")


def measured(pipe, run, width, height):
    """The most bytes of tensors alive at once in a real run, weights aside."""
    with LiveBytes("cpu") as count:
        run(pipe, width, height)
    return count.peak


def build(kind):
    return {
        "sd": lambda: quiet(tiny.text_to_image()),
        "sd image-to-image": lambda: quiet(StableDiffusionImg2ImgPipeline(**tiny.components())),
        "xl": lambda: quiet(StableDiffusionXLPipeline(**tiny.xl_components())),
        "xl image-to-image": lambda: quiet(StableDiffusionXLImg2ImgPipeline(**tiny.xl_components())),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "run", "size", "options"),
    [
        ("sd", text_to_image, (256, 128), BLOCKS | TILES),
        ("sd image-to-image", image_to_image, (192, 192), BLOCKS | TILES),
        ("xl", text_to_image, (192, 192), {}),
        ("xl image-to-image", image_to_image, (256, 192), {"vae_mode": "exact"} | TILES),
    ],
)
def test_the_estimate_is_what_a_real_run_holds(kind, run, size, options):
    pipe = build(kind)
    patch = LargeResPatch(pipe, *size, **options)
    with patch:
        patched = measured(pipe, run, *size)
    bare = measured(pipe, run, *size)
    for estimate, peak in ((patch.estimate(), patched), (patch.estimate(patched=False), bare)):
        assert estimate.peak - estimate.weights == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    "case",
    [
        "Stable Diffusion: ControlNet",
        "Stable Diffusion XL: T2I-Adapter",
        "Stable Diffusion: inpaint",
        "Stable Diffusion XL: PAG",
        "others: Kandinsky 2.2 (U-Net alone)",
        "others: PixArt",
        "others: Stable Diffusion 3 (VAE alone)",
        "others: Flux (VAE alone)",
    ],
)
def test_every_kind_of_pipeline_can_be_estimated(case):
    build, arguments, _ = family.CASES[case]
    if "Flux" in case:
        arguments = arguments | {"prompt_embeds": torch.zeros(1, 512, 32)}  # as many as its pipeline makes of a prompt
    pipe = quiet(build())
    patch = LargeResPatch(pipe, family.SIZE, family.SIZE, **BLOCKS | TILES | {"attn_full_tokens": 36})
    with patch, LiveBytes("cpu") as count:
        family.run(pipe, arguments)
    estimate = patch.estimate()
    assert estimate.peak - estimate.weights == pytest.approx(count.peak, rel=0.1)


@pytest.mark.parametrize(("case", "serial_helps"), [("text-to-image", True), ("PAG", False)])
def test_an_estimate_knows_what_a_batch_that_stays_whole_needs(case, serial_helps):
    pipe = quiet(family.SD[case].build())
    whole, serial = (LargeResPatch(pipe, 256, 256, **BLOCKS, unet_serial=each).estimate() for each in (False, True))
    assert (serial.unet < 0.8 * whole.unet) == serial_helps


@pytest.mark.parametrize(("case", "samples"), [("T2I-Adapter", 1), ("ControlNet", 2)])
def test_pictures_are_seen_as_often_as_pipelines_copy_them(case, samples):
    picture = stages._seen_image(family.SD[case].build(), 64, 32)
    assert picture.shape == (samples, 3, 64, 32)


def test_a_denoiser_that_is_not_known_is_an_error(pipe):
    class Other(type(pipe.unet)):
        pass

    pipe.unet.__class__ = Other
    with pytest.raises(ValueError, match=r"whose memory can be estimated \(UNet2DConditionModel, .*; got Other"):
        LargeResPatch(pipe, 64, 64).estimate()


@pytest.mark.parametrize("options", [{}, BLOCKS])
def test_the_estimate_of_a_step_is_what_a_real_step_holds(pipe, options):
    """Whole pipelines peak in their VAE."""
    patch = LargeResPatch(pipe, 256, 192, **options)
    with patch:
        patched = measured(pipe, partial(text_to_image, output_type="latent"), 256, 192)
    assert patch.estimate().unet == pytest.approx(patched, rel=0.1)


@pytest.mark.parametrize("inside", [False, True])
def test_an_estimate_leaves_the_pipeline_alone(pipe, inside):
    calls = []
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    patch = LargeResPatch(pipe, 96, 64, padding_mode="circular", **SMALL)
    outside = patch.estimate(), patch.estimate(patched=False)
    assert outside[0] != outside[1]
    if inside:
        patch.enable()
    before = fingerprint(pipe)
    assert (patch.estimate(), patch.estimate(patched=False)) == outside
    assert fingerprint(pipe) == before
    patch.disable()
    handle.remove()
    assert not calls


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("within", ["attention.sampled_cells", "groupnorm.record"])
def test_an_interrupted_estimate_leaves_no_trace(pipe, monkeypatch, within):
    def interrupt(*args):
        raise KeyboardInterrupt

    before = fingerprint(pipe)
    monkeypatch.setattr(f"largerespatch.{within}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        LargeResPatch(pipe, 96, 64, **SMALL).estimate()
    assert fingerprint(pipe) == before
    assert torch.ones(2).sum().item() == 2  # no mode is left on: this is a real tensor


@pytest.mark.parametrize("mode", ["two-pass", "exact"])
def test_an_estimate_allocates_nothing_and_is_no_more_work_for_a_larger_image(pipe, mode):
    operations = {}
    for side in (8192, 65536):
        patch = LargeResPatch(pipe, side, side, vae_mode=mode)
        with Operations() as work:
            estimate = patch.estimate()
        operations[side] = work.count
    assert operations[65536] <= 1.1 * operations[8192]
    assert estimate.decode > 2**36  # more than there is: one map of these is larger than this machine's memory


def test_weights_count_where_they_are_on_the_device(pipe):
    def size(*models):
        return sum(weight.nbytes for model in models for weight in [*model.parameters(), *model.buffers()])

    patch = LargeResPatch(pipe, 64, 64)
    assert patch.estimate().weights == size(pipe.unet, pipe.vae, pipe.text_encoder)
    for model in (pipe.unet, pipe.vae):
        model.to("meta")
    assert patch.estimate().weights == size(pipe.unet, pipe.vae), "the text encoder is on the host"


def test_models_offloaded_by_accelerate_count_one_at_a_time(pipe):
    whole = LargeResPatch(pipe, 64, 64).estimate()
    sizes = [
        sum(weight.nbytes for weight in [*model.parameters(), *model.buffers()]) for model in (pipe.unet, pipe.vae)
    ]
    for model in (pipe.text_encoder, pipe.unet, pipe.vae):
        add_hook_to_module(model, CpuOffload("meta"))
    offloaded = LargeResPatch(pipe, 64, 64).estimate()
    assert offloaded.weights == max(sizes) < whole.weights
    assert (offloaded.unet, offloaded.decode) == (whole.unet, whole.decode)


def test_encoding_counts_where_the_pipeline_encodes():
    text, image = (LargeResPatch(build(kind), 64, 64).estimate() for kind in ("sd", "sd image-to-image"))
    assert (text.encodes, image.encodes) == (False, True)
    assert 0 < text.encode < image.encode, "the pictures that were given are held"
    assert MemoryEstimate(5, 10, 30, 20).peak == 25
    assert MemoryEstimate(5, 10, 30, 20, encodes=True).peak == 35


def test_an_estimate_reads_as_a_table():
    lines = str(MemoryEstimate(3 * 2**30, 2**31, 2**20, 2**32)).splitlines()
    assert lines[0] == "weights         3.00 GiB"
    assert lines[2] == "encode          1.00 MiB  (this pipeline does not encode)"
    assert lines[4] == "peak            7.00 GiB"


def test_the_xl_vae_counts_in_float32_where_it_is_upcast():
    pipe = build("xl")
    whole = LargeResPatch(pipe, 128, 128).estimate()
    pipe.vae.half()
    half = LargeResPatch(pipe, 128, 128).estimate()
    grown = sum(weight.nbytes for weight in pipe.vae.parameters())
    assert half.decode == whole.decode + grown
    assert half.weights < whole.weights


def peak(pipe, **options):
    return LargeResPatch(pipe, 256, 256, **options).estimate().peak


def test_a_limit_that_fits_changes_nothing(pipe):
    patch = LargeResPatch(pipe, 256, 256, memory_limit=peak(pipe))
    assert "no saver needed" in repr(patch)
    assert repr(patch).splitlines()[:-1] == repr(LargeResPatch(pipe, 256, 256)).splitlines()


def test_the_first_settings_that_fit_are_picked(pipe, monkeypatch):
    full, smaller = peak(pipe), peak(pipe, vae_chunk_size_x=16, vae_chunk_size_y=16)
    monkeypatch.setattr(planner, "DENOISER_SAVERS", ())
    steps = ({"vae_chunk_size_x": 16, "vae_chunk_size_y": 16}, {"vae_chunk_size_x": 8})
    monkeypatch.setitem(planner.VAE_SAVERS, "two-pass", steps)
    patch = LargeResPatch(pipe, 256, 256, memory_limit=(full + smaller) // 2)
    assert (patch.vae_chunk_size_x, patch.vae_chunk_size_y) == (16, 16)
    assert patch.estimate().peak == smaller
    assert "vae_chunk_size_x=16, vae_chunk_size_y=16; estimated peak" in repr(patch)
    kept = LargeResPatch(pipe, 256, 256, vae_chunk_size_y=64, memory_limit=full - 1)
    assert (kept.vae_chunk_size_x, kept.vae_chunk_size_y) == (16, 64)


class Invented:
    """An estimator whose stages need what `needs` says of the settings, at any size."""

    device, weights, factor = torch.device("meta"), 100, 8

    def __init__(self, needs, encodes=False):
        self.needs, self.encodes, self.tried = needs, encodes, []

    def step(self, height, width, settings):
        self.tried.append(settings)
        return self.needs["step"](settings)

    def encode(self, height, width, settings):
        return self.needs["encode"](settings)

    def decode(self, height, width, settings):
        return self.needs["decode"](settings)

    def estimate(self, height, width, settings):
        return MemoryEstimate(self.weights, *(needed(settings) for needed in self.needs.values()), self.encodes)


def fewer(settings):
    return 50 - 10 * len(settings)


def test_savers_are_added_one_by_one_until_every_stage_fits():
    estimator = Invented({"step": fewer, "encode": fewer, "decode": lambda settings: 5})
    plan = Planner(estimator, 130, "two-pass", frozenset()).plan(64, 64)
    assert plan.settings == {"unet_serial": True, "unet_offload": True}
    assert estimator.tried[1:] == [{}, {"unet_serial": True}, plan.settings]  # the first: whether anything fits
    assert plan.estimate.unet == 30


@pytest.mark.parametrize("encodes", [False, True])
def test_what_an_encoder_needs_counts_where_the_pipeline_encodes(encodes):
    needs = {"step": lambda settings: 5, "encode": fewer, "decode": lambda settings: 5}
    plan = Planner(Invented(needs, encodes), 130, "two-pass", frozenset()).plan(64, 64)
    assert plan.settings == ({"vae_offload": True, "vae_attn": "blocked"} if encodes else {})


def test_where_the_models_are_makes_no_difference_to_what_they_need(pipe):
    """On an accelerator attention runs in one kernel, where fake tensors would make it quadratic."""
    patch = LargeResPatch(pipe, 256, 256)
    host = patch.estimate()
    for model in (pipe.unet, pipe.vae):
        model.to("meta")
    device = patch.estimate()
    assert (device.unet, device.decode) == pytest.approx((host.unet, host.decode), rel=0.05)


@pytest.mark.parametrize("vae_mode", ["two-pass", "exact"])
def test_only_what_can_leave_the_device_is_tried_to(pipe, vae_mode):
    def tried():
        estimator = LargeResPatch(pipe, 64, 64)._estimator(planner.bare)
        found = Planner(estimator, 2**40, vae_mode, frozenset())
        return {name for settings in found.denoiser + found.vae for name in settings if name.endswith("_offload")}

    assert tried() == set()
    for model in (pipe.unet, pipe.vae):
        model.to("meta")
    assert tried() == {"unet_offload", "vae_offload"}


def test_where_nothing_fits_the_error_says_what_does(pipe, monkeypatch):
    monkeypatch.setattr(planner, "DENOISER_SAVERS", ())
    monkeypatch.setitem(planner.VAE_SAVERS, "two-pass", ({"vae_chunk_size_x": 32, "vae_chunk_size_y": 32},))
    before = fingerprint(pipe)
    limit = peak(pipe, vae_chunk_size_x=32, vae_chunk_size_y=32) - MIB
    with pytest.raises(ValueError, match=r"does not fit 512x256 sample pixels, which need .* MiB") as refused:
        LargeResPatch(pipe, 512, 256, memory_limit=limit)
    width, height = map(int, str(refused.value).split()[-1].split("x"))
    assert width == 2 * height
    assert LargeResPatch(pipe, width, height, memory_limit=limit).estimate().peak <= limit
    with pytest.raises(ValueError, match="does not fit"):
        LargeResPatch(pipe, 2 * (height + 64), height + 64, memory_limit=limit)
    assert fingerprint(pipe) == before


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("8 GB", 8 * 10**9),
        (" 512MiB ", 512 * MIB),
        ("1.5gib", 3 * 2**29),
        (".5 KiB", 512),
        ("7b", 7),
        ("8", None),
        ("-8GiB", None),
        ("8 parrots", None),
        ("1e3MB", None),
        ("nan", None),
        ("", None),
    ],
)
def test_amounts(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        ("8", ValueError, "a positive amount such as '8GiB'.*got '8'"),
        ("0GiB", ValueError, "got '0GiB'"),
        (0, ValueError, "got 0"),
        (-(2**33), ValueError, "got -8589934592"),
        (8.0e9, TypeError, r"whole number of bytes.*got 8000000000\.0"),
        (float("nan"), TypeError, "got nan"),
        (True, TypeError, "got True"),
        ([], TypeError, r"got \[\]"),
        ("1KiB", ValueError, r"more than the weights on cpu, which take 1\.\d\d MiB; got '1KiB'"),
        ("auto", ValueError, "'auto' needs a pipeline on a device that reports its free memory, this one is on cpu"),
    ],
)
def test_limits_that_are_none(pipe, limit, error, message):
    with pytest.raises(error, match=f"memory_limit .*{message}"):
        LargeResPatch(pipe, 64, 64, memory_limit=limit)


def test_auto_is_what_the_device_has_free_less_a_margin(pipe, monkeypatch):
    monkeypatch.setattr(planner, "free_bytes", lambda device: 100 * MIB)
    weights = LargeResPatch(pipe, 64, 64).estimate().weights
    assert LargeResPatch(pipe, 64, 64, memory_limit="auto").memory_limit == 95 * MIB + weights


def test_free_bytes_count_what_torch_has_in_its_cache(monkeypatch):
    class Backend:
        mem_get_info = staticmethod(lambda device: (1000, 5000))
        memory_reserved = staticmethod(lambda device: 300)
        memory_allocated = staticmethod(lambda device: 100)

    monkeypatch.setattr(torch, "cuda", Backend)
    assert free_bytes(torch.device("cuda")) == 1200
    assert free_bytes(torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, whose allocator it asks")
def test_the_estimate_is_what_cuda_allocates(pipe):
    patch = LargeResPatch(pipe.to("cuda", torch.float16), 1024, 1024)
    estimate = patch.estimate()
    torch.cuda.reset_peak_memory_stats()
    with patch:
        text_to_image(pipe, 1024, 1024)
    assert estimate.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


def test_a_rehearsal_visits_the_largest_pieces():
    sizes = [(4,), (9,), (5,), (9,), (9,), (9,), (2,)]
    assert pieces(sizes, lambda each: each) is sizes
    with rehearsal():
        assert pieces(sizes, lambda each: each) == [(4,), (9,), (9,), (9,), (2,)]
        assert pieces([(2, 8), (8, 2), (2, 2), (1, 1)], lambda each: each) == [(2, 8), (8, 2), (1, 1)]
        assert pieces(range(10)) == [0, 1, 2, 9]
        assert pieces([]) == []
    assert pieces(sizes) is sizes


@pytest.mark.parametrize("mode", ["two-pass", "exact"])
def test_a_rehearsal_needs_what_the_whole_needs(pipe, monkeypatch, mode):
    patch = LargeResPatch(pipe, 320, 256, vae_mode=mode, attn_shape="tile", **BLOCKS | TILES)
    rehearsed = patch.estimate()
    for name in ("attention", "feedforward", "strips", "vae"):
        monkeypatch.setattr(sys.modules[f"largerespatch.{name}"], "pieces", lambda every, size=None: every)
    whole = patch.estimate()
    for stage in ("unet", "encode", "decode"):
        assert getattr(rehearsed, stage) == pytest.approx(getattr(whole, stage), rel=0.01)
