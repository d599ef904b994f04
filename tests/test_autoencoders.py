"""What holds of families of autoencoders, on one of each: a new one is a line here, and what is its own elsewhere."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import accelerate
import autoencoders as published
import pytest
import test_asymmetric
import test_causal
import test_dc
import test_hunyuan_vae
import test_kl
import test_tiny
import test_vq
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline
from diffusers.hooks.group_offloading import GroupOffloadingType
from diffusers.image_processor import VaeImageProcessor
from products import in_pairs, in_turns
from test_weights import cpu_as_accelerator, offload_on_a_stream  # noqa: F401  fixtures
from waits import waits

import halves
from conftest import quiet
from halves import HALVES, MODES, Bar, cut_up, error, in_pieces, latent, live, patched, picture
from largerespatch import LargeResPatch
from largerespatch.core import calls
from largerespatch.memory import planner
from live import LiveBytes, fake

EVERY_WAY = (halves.model_offload, halves.sequential_offload, halves.leaf_group_offload)


class Case(NamedTuple):
    """How to build an autoencoder, what goes into it, how it is run; a pipeline that holds it, and under which name."""

    build: Callable[[], Any]
    pipeline: Callable[[], Any]
    inputs: Callable[..., torch.Tensor] = lambda run, *size: halves.INPUTS[run](*size)
    runs: dict[str, Callable[..., Any]] = HALVES
    offloads: tuple[Callable[[Any], None], ...] = EVERY_WAY
    name: str = "vae"
    estimated: tuple[str, ...] = ("exact", "two-pass")  # modes
    width: int = 6  # of what is compared in half precision, where so few cells round alike
    large: tuple[int, int] = (9, 7)  # of what is compared bit for bit
    tile: tuple[int, int] = (5, 4)  # of that


def flux_2_pipeline():
    """The batch norm over packed latents is outside of its autoencoder."""
    texts = dict.fromkeys(("transformer", "text_encoder", "tokenizer"))
    return quiet(Flux2Pipeline(vae=test_kl.flux_2(), scheduler=FlowMatchEulerDiscreteScheduler(), **texts))


CASES = {
    "HunyuanImage": Case(test_hunyuan_vae.vae, test_hunyuan_vae.pipeline),
    "DC": Case(test_dc.vae, test_dc.pipeline, width=8, large=(24, 20), tile=(10, 10)),
    "VQ": Case(
        test_vq.vae,
        lambda: quiet(test_vq.KANDINSKY.build()),
        test_vq.inputs,
        test_vq.HALVES,
        EVERY_WAY[:2],  # upstream has no group offload for it
        "movq",
    ),
    "Flux 2": Case(test_kl.flux_2, flux_2_pipeline, width=12),
    "asymmetric": Case(
        test_asymmetric.vae,
        test_asymmetric.pipeline,
        test_asymmetric.inputs,
        test_asymmetric.RUNS,
        estimated=("exact",),
    ),
}
RUNS = [(name, run) for name, case in CASES.items() for run in case.runs]


OFFLOADED = [
    (name, run, CASES[name].offloads[i % len(CASES[name].offloads)], mode)
    for i, (name, run, mode) in enumerate(in_turns(RUNS, ["exact", "two-pass"]))
]


@pytest.mark.parametrize(("name", "run", "offload", "mode"), OFFLOADED)
def test_weights_may_come_and_go(name, run, offload, mode):
    case = CASES[name]
    model, x, call = case.build(), case.inputs(run, 1, *case.large), case.runs[run]
    options = dict(zip(("vae_chunk_size_y", "vae_chunk_size_x"), case.tile, strict=True)) | {"vae_mode": mode}
    with patched(model, **options):
        expected = call(model, x)
    offload(model)
    with patched(model, **options):
        assert torch.equal(cut_up(lambda: call(model, x)), expected)
        assert torch.equal(call(model, x), expected)


# Upstream shows float32 alone.
HALF = in_turns([each for each in RUNS if each[1] != "shown"], [torch.float16, torch.bfloat16])


@pytest.mark.parametrize(("name", "run", "dtype"), HALF)
def test_in_half_precision_it_is_no_further_from_float32_than_untiled(name, run, dtype):
    model, x, call = CASES[name].build(), CASES[name].inputs(run, 1, 16, CASES[name].width), CASES[name].runs[run]
    reference = call(model, x)
    for parameter in model.parameters():
        parameter.data = parameter.to(dtype)
    untiled = error(call(model, x.to(dtype)), reference)
    with patched(model, vae_mode="exact"):
        result = cut_up(lambda: call(model, x.to(dtype)))
    assert result.dtype == dtype
    assert error(result, reference) < 1.1 * untiled


# Each mode of each, one way in one mode and the other way in the other: in turns.
ESTIMATED = [
    (name, mode, ("encode", "decode")[(i + j) % 2])
    for i, (name, case) in enumerate(CASES.items())
    for j, mode in enumerate(case.estimated)
]


@pytest.mark.filterwarnings("ignore:SanaTransformer2DModel is a denoiser of no known kind:RuntimeWarning")
@pytest.mark.parametrize(("name", "mode", "half"), ESTIMATED)
def test_the_estimate_is_what_a_real_run_holds(name, mode, half):
    """Beside the pictures that a pipeline for editing holds all through a call."""
    case, pipe = CASES[name], CASES[name].pipeline()
    patch = LargeResPatch(pipe, 192, 256, vae_mode=mode, vae_chunk_size_x=12, vae_chunk_size_y=12)
    model, shown = getattr(pipe, case.name), half == "decode" and "shown" in case.runs
    x = picture(1, 256, 192) if half == "encode" else latent(1, 32, 24)
    call = case.runs["shown" if shown else half]

    def run():
        result = call(model, x.clone())
        if half == "encode" or not hasattr(pipe, "image_processor"):
            return result
        return pipe.image_processor.postprocess(result, output_type="pt")

    pictures = sum(each.nbytes for each in calls.held(pipe, 256, 192))
    bare = live(run) + pictures
    with patch:
        held = live(run) + pictures
    assert getattr(patch.estimate(), half) == pytest.approx(held, rel=0.1)
    assert getattr(patch.estimate(patched=False), half) == pytest.approx(bare, rel=0.1)


# Built alike are Flux 2's and Stable Diffusion's, Qwen-Image's and Wan's.
@pytest.mark.parametrize("name", sorted(set(published.AUTOENCODERS) - {"AutoencoderKL (SD)", "AutoencoderKLWan"}))
@halves.BOTH
def test_half_of_the_untiled_memory_is_enough(name, half):
    """At 512 x 512, of the published configurations, on models that hold no data."""
    peaks = {}
    with fake():
        vae = published.build(name, "meta")
        x = published.source(name, half, vae, 512)
        for way, context in published.ways(name, vae, 512, 256).items():
            if way != published.OWN:
                with context(), LiveBytes() as count:
                    published.run(half, vae, x)
                peaks[way] = count.peak["meta"]
    for way in (published.DEFAULT, published.EXACT):
        assert peaks[way] <= 0.5 * peaks[published.UNTILED], way


@MODES
def test_a_large_picture_takes_little_beside_the_weights_with_maps_on_the_host(mode):
    """In half precision. The others take less."""
    vae = published.build("AutoencoderKLWan (2.2)", "meta", torch.float16)
    pipe = SimpleNamespace(components={"vae": vae}, vae=vae, progress_bar=Bar, image_processor=VaeImageProcessor())
    estimate = LargeResPatch(pipe, 4096, 4096, vae_mode=mode, vae_offload=True).estimate()
    assert max(estimate.encode, estimate.decode) < 1.5 * 2**30


BUILT = {name: (case.build, 8) for name, case in CASES.items()} | {
    "VQ": (test_vq.vae, 4),
    "Wan": (partial(test_causal.autoencoder, "Wan"), 8),
    "Wan 2.2": (partial(test_causal.autoencoder, "Wan 2.2"), 16),
    "tiny": (test_tiny.autoencoder, 8),
}


def alone(name):
    """A pipeline of nothing but an autoencoder, and the size of a picture for it."""
    build, factor = BUILT[name]
    vae = build()
    pipe = SimpleNamespace(components={"vae": vae}, vae=vae, progress_bar=Bar, image_processor=VaeImageProcessor())
    return pipe, (160 * factor, 128 * factor)


@MODES
@halves.BOTH
@pytest.mark.parametrize("name", BUILT)
def test_nothing_waits_for_a_device(name, half, mode):
    tiles = {"vae_chunk_size_x": 64, "vae_chunk_size_y": 48}
    pipe, size = alone(name)
    assert not waits(pipe, half, *size, vae_mode=mode, **tiles)


# In turns; of Wan 2.2's, run exactly, only the picture itself counts at this width.
PLANNED = [(name, "two-pass" if i % 2 or name == "Wan 2.2" else "exact") for i, name in enumerate(BUILT)]


def planning(name, mode):
    """What plans for a picture, its size, savers that change no host's memory, and what is needed with them."""
    pipe, size = alone(name)
    plan = partial(LargeResPatch, pipe, *size, vae_mode=mode)
    savers = planner.VAE_SAVERS[mode]
    least = {key: value for saver in savers for key, value in saver.settings.items() if key != "vae_offload"}
    return plan, size, least, plan(memory_limit=None, **least).estimate().peak


@pytest.fixture
def no_margin(monkeypatch):
    monkeypatch.setattr(planner, "margin", lambda limit: 0)  # larger than these models


@pytest.mark.usefixtures("no_margin")
@pytest.mark.parametrize(("name", "mode"), PLANNED)
def test_a_limit_picks_savers_that_fit(name, mode):
    plan, _, least, needed = planning(name, mode)
    most = plan(memory_limit=None).estimate().peak
    assert needed < most
    limit = (needed + most) // 2
    patch = plan(memory_limit=limit)
    picked = {key: getattr(patch.options, key) for key in least if getattr(patch.options, key) == least[key]}
    assert picked and patch.estimate().peak <= limit


@pytest.mark.usefixtures("no_margin")
@pytest.mark.parametrize(("name", "mode"), PLANNED[::3])  # the search for the largest image knows no families
def test_a_limit_that_nothing_fits_is_refused_with_the_size_that_does(name, mode):
    plan, (width, height), _, needed = planning(name, mode)
    with pytest.raises(ValueError, match=f"does not fit {width}x{height} .* the largest image of this") as refused:
        plan(memory_limit=needed - 1)
    smaller = map(int, str(refused.value).split()[-1].split("x"))
    pipe = plan.args[0]
    assert LargeResPatch(pipe, *smaller, vae_mode=mode, memory_limit=needed - 1).estimate().peak < needed


HOOKED = {"Wan": (partial(test_causal.autoencoder, "Wan"), test_causal.inputs, HALVES)}
HOOKED |= {"tiny": (test_tiny.autoencoder, lambda run, *size: halves.INPUTS[run](*size), test_tiny.HALVES)}


@in_pairs(
    {
        "name, offload_on_a_stream": [("Wan", each) for each in GroupOffloadingType]
        + [("tiny", GroupOffloadingType.LEAF_LEVEL)],
        "mode": ["exact", "two-pass"],
        "patched_first": [False, True],
    },
    ["offload_on_a_stream"],
)
def test_groups_that_come_ahead_on_a_stream_are_there_for_every_piece(name, mode, patched_first, offload_on_a_stream):  # noqa: F811
    build, inputs, runs = HOOKED[name]
    vae, unhooked = build(), build()
    offload_on_a_stream(vae)
    for cut in (patched_first, not patched_first, patched_first):
        for run in runs:
            with in_pieces(vae, 5, 4, vae_mode=mode) if cut else nullcontext():
                result = runs[run](vae, inputs(run, 1, 9, 7))
            with in_pieces(unhooked, 5, 4, vae_mode=mode) if cut else nullcontext():
                assert torch.equal(result, runs[run](unhooked, inputs(run, 1, 9, 7)))


SMALL = {"vae_chunk_size_x": 4, "vae_chunk_size_y": 5}
EACH = {name: (case.build, case.inputs, case.runs) for name, case in CASES.items()} | HOOKED
EVERY_RUN = [(name, run) for name, (*_, runs) in EACH.items() for run in runs]
IN_ALL = pytest.mark.parametrize(("name", "run"), EVERY_RUN)


@pytest.mark.parametrize(("name", "run", "mode"), in_turns(EVERY_RUN, ["exact", "two-pass"]))
def test_the_hook_of_model_offload_is_called_for_encode_and_decode(name, run, mode):
    (build, inputs, runs), calls = EACH[name], []

    class Noting(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    vae = build()
    accelerate.hooks.add_hook_to_module(vae, Noting())
    with patched(vae, vae_mode=mode, **SMALL):
        cut_up(lambda: runs[run](vae, inputs(run, 1, 9, 7)))
    assert calls == [vae]


@IN_ALL
def test_upstreams_tiling_and_slicing_are_off_meanwhile(name, run):
    build, inputs, runs = EACH[name]
    vae, x = build(), inputs(run, 2, 9, 7)
    expected = runs[run](vae, x)
    own = [each for each in ("tiling", "slicing") if hasattr(vae, f"use_{each}")]
    for each in own:
        getattr(vae, f"enable_{each}")()
    with patched(vae, vae_mode="exact", **SMALL):
        assert not any(getattr(vae, f"use_{each}") for each in own)
        assert error(cut_up(lambda: runs[run](vae, x)), expected) < 1e-4
    assert all(getattr(vae, f"use_{each}") for each in own)


@IN_ALL
def test_weights_may_be_cast_meanwhile_as_pipelines_do_that_upcast(name, run):
    build, inputs, runs = EACH[name]
    vae, x = build().half(), inputs(run, 1, 9, 7)
    expected = runs[run](copy.deepcopy(vae).float(), x)
    with patched(vae, vae_mode="exact", **SMALL):
        result = cut_up(lambda: runs[run](vae.float(), x))
        vae.half()
    assert result.dtype == torch.float32 and error(result, expected) < 1e-4
    assert vae.dtype == torch.float16
