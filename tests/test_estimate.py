"""Estimates against what real runs hold."""

import gc
from functools import partial

import pytest
import torch
from diffusers import (
    ControlNetUnionModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from torch.utils._python_dispatch import TorchDispatchMode

import family
import tiny
from conftest import quiet
from largerespatch import LargeResPatch
from largerespatch.core import pieces
from largerespatch.core.calls import encodes
from largerespatch.denoisers.any import seen_picture
from largerespatch.memory import shadow
from largerespatch.memory.counting import LiveBytes, gibibytes
from largerespatch.memory.estimate import STAGES, MemoryEstimate
from largerespatch.memory.run_once import RunOnce
from largerespatch.memory.weightless import WithoutData
from test_patch import SMALL, fingerprint

BLOCKS = {"attn_slice_x": 12, "attn_slice_y": 12, "attn_full_tokens": 144, "ff_chunk_size": 200}
TILES = {"vae_chunk_size_x": 12, "vae_chunk_size_y": 12}
BUILD = {
    "sd": lambda: quiet(tiny.text_to_image()),
    "sd image-to-image": lambda: quiet(StableDiffusionImg2ImgPipeline(**tiny.components())),
    "xl": lambda: quiet(StableDiffusionXLPipeline(**tiny.xl_components())),
    "xl image-to-image": lambda: quiet(StableDiffusionXLImg2ImgPipeline(**tiny.xl_components())),
}


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
    pipe = BUILD[kind]()
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
        "Stable Diffusion: x4 upscaler",
        "Stable Diffusion XL: PAG",
        "others: Kandinsky 2.2",
        "others: PixArt",
    ],
)
def test_every_kind_of_pipeline_can_be_estimated(case):
    build, arguments, _ = family.CASES[case]
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
    assert (serial.step < 0.8 * whole.step) == serial_helps


@pytest.mark.parametrize(("case", "samples"), [("T2I-Adapter", 1), ("ControlNet", 2)])
def test_pictures_are_seen_as_often_as_pipelines_copy_them(case, samples):
    pipe = family.SD[case].build()
    assert seen_picture(pipe, pipe.unet, 64, 32).shape == (samples, 3, 64, 32)


def test_a_denoiser_that_is_not_known_is_an_error(pipe):
    class Other(type(pipe.unet)):
        pass

    pipe.unet.__class__ = Other
    with pytest.raises(ValueError, match=r"whose memory can be estimated; it is not known .* call Other"):
        LargeResPatch(pipe, 64, 64).estimate()


@pytest.mark.parametrize("options", [{}, BLOCKS])
def test_the_estimate_of_a_step_is_what_a_real_step_holds(pipe, options):
    """Whole pipelines peak in their VAE."""
    patch = LargeResPatch(pipe, 256, 192, **options)
    with patch:
        patched = measured(pipe, partial(text_to_image, output_type="latent"), 256, 192)
    assert patch.estimate().step == pytest.approx(patched, rel=0.1)


def test_the_estimate_of_kandinskys_step_is_what_a_real_one_holds():
    build, arguments, _ = family.OTHERS["Kandinsky 2.2"]
    pipe = build()
    patch = LargeResPatch(pipe, family.SIZE, family.SIZE, **SMALL)
    with patch, LiveBytes("cpu") as count:
        family.run(pipe, arguments, output_type="latent")
    assert patch.estimate().step == pytest.approx(count.peak, rel=0.1)


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


@pytest.mark.parametrize("within", ["techniques.attention.blocked.Context", "techniques.vae.shared_norms.record"])
def test_an_interrupted_estimate_leaves_no_trace(pipe, monkeypatch, within):
    def interrupt(*args):
        raise KeyboardInterrupt

    before = fingerprint(pipe)
    monkeypatch.setattr(f"largerespatch.{within}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        LargeResPatch(pipe, 96, 64, **SMALL).estimate()
    assert fingerprint(pipe) == before
    assert torch.ones(2).sum().item() == 2  # no mode is left on: this is a real tensor
    assert not pieces.rehearsing()


@pytest.mark.parametrize("mode", ["two-pass", "exact"])
def test_an_estimate_allocates_nothing_and_is_no_more_work_for_a_larger_image(pipe, mode):
    operations = {}
    for side in (8192, 65536):
        patch = LargeResPatch(pipe, side, side, vae_mode=mode)
        with Operations() as work:
            estimate = patch.estimate()
        operations[side] = work.count
    assert operations[65536] <= 1.1 * operations[8192]
    assert operations[8192] < {"two-pass": 20_000, "exact": 8_000}[mode], "a second or two on any machine"
    assert estimate.decode > 2**36  # more than there is: one map of these is larger than this machine's memory


def test_what_is_known_is_not_counted_again(pipe, monkeypatch):
    patch = LargeResPatch(pipe, 64, 64)
    estimator = patch._estimator(patch._on)
    first = estimator.peak("step", 64, 64, patch.options)
    monkeypatch.setattr(estimator.shadow, "peaks", lambda work, most: (1, 1))
    assert estimator.peak("step", 64, 64, LargeResPatch(pipe, 96, 96).options) == first, "equal options"
    assert estimator.peak("step", 64, 96, patch.options) == 1
    assert estimator.peak("decode", 64, 64, patch.options) == 1


ENCODING = {
    "Stable Diffusion": {
        "image-to-image",
        "inpaint",
        "inpaint, 9 channels",
        "depth-to-image",
        "InstructPix2Pix",
        "ControlNet image-to-image",
        "ControlNet inpaint",
    },
    "Stable Diffusion XL": {
        "image-to-image",
        "refiner",
        "inpaint",
        "inpaint, 9 channels",
        "InstructPix2Pix",
        "ControlNet image-to-image",
        "ControlNet inpaint",
    },
    "others": set(),
}


@pytest.mark.parametrize("name", ENCODING)
def test_it_is_known_which_pipelines_encode(name):
    assert {case for case, (build, *_) in family.FAMILIES[name].items() if encodes(build())} == ENCODING[name]


def test_a_picture_that_a_union_of_controlnets_looks_at_is_not_encoded():
    settings = {key: value for key, value in tiny.XL_UNET.items() if key not in ("sample_size", "up_block_types")}
    union = ControlNetUnionModel(**settings, **tiny.CONTROLNET_ONLY, num_control_type=2)
    pipe = StableDiffusionXLControlNetUnionPipeline(**tiny.xl_components(controlnet=union))
    assert not encodes(pipe)


def test_encoding_counts_where_the_pipeline_encodes():
    text, image = (LargeResPatch(BUILD[kind](), 64, 64).estimate() for kind in ("sd", "sd image-to-image"))
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
    pipe = BUILD["xl"]()
    whole = LargeResPatch(pipe, 128, 128).estimate()
    pipe.vae.half()
    half = LargeResPatch(pipe, 128, 128).estimate()
    grown = sum(weight.nbytes for weight in pipe.vae.parameters())
    assert half.decode == whole.decode + grown
    assert half.weights < whole.weights


def test_where_the_models_are_makes_no_difference_to_what_they_need(pipe, monkeypatch):
    """But for what an accelerator's libraries take. Attention runs in one kernel there, which counts as such."""
    monkeypatch.setattr(shadow, "LIBRARIES", 0)
    monkeypatch.setattr(WithoutData, "workspace", lambda *operation: 0)
    patch = LargeResPatch(pipe, 256, 256)
    host = patch.estimate()
    for model in (pipe.unet, pipe.vae):
        model.to("meta")
    device = patch.estimate()
    assert (device.step, device.decode) == pytest.approx((host.step, host.decode), rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, whose allocator it asks")
def test_the_estimate_is_what_cuda_allocates(pipe):
    """For channels enough that convolutions take the kernels of real models, which want a workspace."""
    pipe.unet, pipe.vae = tiny.unet(block_out_channels=(128, 256)), tiny.vae(block_out_channels=(64, 64, 128, 128))
    patch = LargeResPatch(pipe.to("cuda", torch.float16), 1024, 1024)
    estimate = patch.estimate()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    with patch:
        text_to_image(pipe, 1024, 1024)
    assert estimate.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


SHORT = {"attn_slice_x": 6, "attn_slice_y": 6, "attn_full_tokens": 36, "ff_chunk_size": 50, "attn_context": 8}
SHORT |= {"vae_chunk_size_x": 6, "vae_chunk_size_y": 6}
SAVERS = {"unet_serial": True, "unet_offload": True, "unet_strip_rows": 5, "vae_offload": True}
AROUND = {"padding_mode": "circular", "attn_shape": "tile"}
REHEARSED = [
    ("sd image-to-image", (88, 120), {}),
    ("sd image-to-image", (120, 80), SAVERS),
    ("sd image-to-image", (104, 112), {"vae_mode": "exact", "vae_recompute": True} | SAVERS),
    ("sd image-to-image", (112, 88), AROUND | {"vae_attn": "blocked"}),
    ("xl image-to-image", (88, 120), {"vae_mode": "exact", "vae_recompute": True}),
    ("xl image-to-image", (104, 88), {"vae_mode": "exact", "attn_context": 0} | AROUND),
    ("xl image-to-image", (96, 104), {"vae_passes": 3, "unet_serial": True}),
    ("xl image-to-image", (88, 104), {"padding_mode": "reflect", "vae_attn": "blocked"}),
]


def rehearse_nothing(monkeypatch):
    """Every piece is visited by the one loop that there is, and every block run."""
    monkeypatch.setattr(pieces, "visited", lambda every, carries: every)
    monkeypatch.setattr(RunOnce, "__call__", lambda self, known, key, work, given, **named: work(*given, **named))


@pytest.mark.parametrize(("kind", "size", "options"), REHEARSED)
def test_a_rehearsal_needs_what_the_whole_needs(monkeypatch, kind, size, options):
    """Every piece visited, every block run: the same bytes with much less work."""
    pipe = BUILD[kind]()
    for model in (pipe.unet, pipe.vae):
        model.to("meta")  # what leaves the device counts there no more
    patch = LargeResPatch(pipe, *size, **SHORT | options)
    with Operations() as few:
        rehearsed = patch.estimate()
    rehearse_nothing(monkeypatch)
    with Operations() as all_of_them:
        whole = patch.estimate()
    assert few.count < 0.8 * all_of_them.count
    if "padding_mode" not in options:
        assert rehearsed.step == whole.step
    # A few numbers per piece are left for the statistics of group norms.
    for stage in STAGES:
        assert getattr(rehearsed, stage) == pytest.approx(getattr(whole, stage), rel=0.005)


@pytest.mark.parametrize("stage", STAGES)
def test_whether_it_fits_is_known_sooner_where_it_does_not(stage):
    patch = LargeResPatch(BUILD["sd image-to-image"](), 120, 136, **SHORT)
    needed = patch._estimator(patch._on).peak(stage, 120, 136, patch.options)

    def fits(room):
        estimator = patch._estimator(patch._on)
        with Operations() as run:
            found = estimator.fits(stage, 120, 136, patch.options, room)
        assert estimator.peak(stage, 120, 136, patch.options) == needed  # whether it was stopped before or not
        return found, run

    enough, all_of_it = fits(needed)
    too_little, nearly = fits(needed - 1)
    half, few = fits(needed // 2)
    assert (enough, too_little, half) == (True, False, False)
    assert few.count < nearly.count <= all_of_it.count


DOZEN = [(64, 64), (56, 64), (64, 56), (48, 88), (72, 56), (64, 72)]
DOZEN += [(80, 48), (72, 64), (56, 80), (72, 72), (88, 56), (56, 96)]
LEAST = {
    "step": {"unet_serial": True, "unet_offload": "maps", "unet_strip_rows": 4},
    "decode": {"vae_offload": True, "vae_attn": "blocked"},
    "exact": {"vae_mode": "exact", "vae_recompute": True, "vae_offload": True, "vae_chunk_size_y": 5},
}


@pytest.mark.parametrize("of", LEAST)
def test_what_is_left_with_every_saver_is_the_same_at_a_dozen_sizes_when_all_of_it_is_run(of, monkeypatch):
    """On the device and on the host, to the byte where no statistics are recorded piece by piece."""
    monkeypatch.setattr("largerespatch.denoisers.unet.LEAST_BYTES", 2**12)
    pipe = BUILD["sd"]()
    for model in (pipe.unet, pipe.vae):
        model.to("meta")
    stage = of if of in STAGES else "decode"

    def needed():
        patch = LargeResPatch(pipe, 64, 64, **SHORT | LEAST[of])
        estimator = patch._estimator(patch._on)
        needs = (estimator.peak, estimator.host_peak)
        return [[need(stage, height, width, patch.options) for need in needs] for width, height in DOZEN]

    rehearsed = needed()
    rehearse_nothing(monkeypatch)
    whole = needed()
    assert [host for _, host in rehearsed] == [host for _, host in whole] and all(host for _, host in whole[1:])
    for found, truth in zip(rehearsed, whole, strict=True):
        assert found == truth if of == "step" else found[0] == pytest.approx(truth[0], rel=0.005)


def test_every_stage_has_its_figure(pipe):
    patch = LargeResPatch(pipe, 64, 64)
    estimator, estimate = patch._estimator(patch._on), patch.estimate()
    told = [estimator.peak(stage, 64, 64, patch.options) for stage in STAGES]
    assert told == [estimate.step, estimate.encode, estimate.decode]


def test_what_the_host_holds_is_told_where_something_leaves(pipe):
    for model in (pipe.unet, pipe.vae):
        model.to("meta")
    sizes = {"attn_full_tokens": 256, "attn_slice_x": 8, "attn_slice_y": 8, "ff_chunk_size": 256, "attn_context": 32}
    held = LargeResPatch(pipe, 4096, 4096, **sizes).estimate()
    skips = LargeResPatch(pipe, 4096, 4096, **sizes, unet_offload="skips").estimate()
    maps = LargeResPatch(pipe, 4096, 4096, **sizes, unet_offload="maps").estimate()
    plane = 16 * 512 * 512 * 4
    assert held.host == 0 and "on the host" not in str(held)
    assert skips.host >= 2 * 2 * plane and "on the host" in str(skips) and str(skips).endswith(gibibytes(skips.host))
    assert LargeResPatch(pipe, 64, 64, unet_offload="maps").estimate().host < 2**20, "small maps stay"
    assert LargeResPatch(pipe, 4096, 4096, vae_offload=True).estimate().host >= 3 * 4096 * 4096 * 4, "the picture"
    assert maps.host < skips.host, "but those of 32 MiB"
    assert LargeResPatch(pipe, 8192, 8192, **sizes, unet_offload="maps").estimate().host >= 8 * 4 * plane
