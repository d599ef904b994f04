"""Transformers with joint attention whose maps are on a host: the same pictures, and a device that holds little."""

import gc
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import diffusers as d
import pytest
import test_auraflow
import test_chroma
import test_flux
import test_flux2
import test_hunyuan_image
import test_krea2
import test_qwen_image
import test_sd3
import torch
from joint import CLOSE, error, paint, patch
from products import in_turns
from test_estimate import Operations
from test_flat import by_side, interrupted, rows  # noqa: F401  a fixture
from test_weights import cpu_as_accelerator  # noqa: F401  a fixture

import streams
from conftest import quiet
from family import noise
from halves import OFFLOADS
from largerespatch import LargeResPatch
from largerespatch.core.hosts import Host
from largerespatch.core.planes import Map
from largerespatch.denoisers import joint as denoisers
from largerespatch.memory import shadow
from largerespatch.techniques.joint import host_attention, kept_keys
from test_patch import fingerprint

LEAST = 2000  # bytes
FLAT = {"attn_context": 24, "unet_offload": "maps"}
GIB = 2**30

CASES = {
    "Flux": test_flux.TestFlux.cases["two pictures"],
    "references": test_flux.TestFlux.cases["Kontext"],
    "IP-Adapter": test_flux.TestFlux.cases["IP-Adapter"],
    "ControlNet": test_flux.TestFlux.cases["ControlNet"],
    "two attentions": test_sd3.TestStableDiffusion3.cases["3.5 medium"],
    "attention to pictures, too": test_sd3.TestStableDiffusion3.cases["3.5 medium, IP-Adapter"],
    "masks": test_qwen_image.TestQwenImage.cases["texts of different lengths"],
    "masks of both": test_hunyuan_image.TestHunyuanImage.cases["texts of different lengths"],
    "one stream": test_chroma.TestChroma.cases["a mask of truths"],
    "one stream, shared keys": test_krea2.TestKrea2.cases["text"],
    "one stream after two": test_auraflow.TestAuraFlow.cases["text"],
    "keys that are kept": test_flux2.TestFlux2.cases["Klein, keys of references kept"],
}


@contextmanager
def elsewhere():
    """Where models run is not the host, though the same memory."""
    with mock.patch.object(denoisers, "Host", lambda least: Host("cpu:0", band_bytes=500, least=LEAST)):
        yield


@pytest.fixture
def flux():
    return quiet(test_flux.pipeline()), test_flux.TEXT


WAYS = [("all at once", "tile"), ("one by one", "brick")]


@pytest.mark.parametrize(("case", "way"), in_turns([(case,) for case in CASES], WAYS))
def test_a_transformer_whose_maps_are_on_the_host_is_the_transformer(case, way, rows, monkeypatch):  # noqa: F811
    heads, shape = way
    pipe, arguments = quiet(CASES[case].build()), CASES[case].arguments
    if heads == "one by one":
        monkeypatch.setattr(host_attention, "HELD", 1)
    with patch(pipe, attn_context=24, attn_shape=shape):
        expected = paint(pipe, arguments)
    before = fingerprint(pipe)
    with elsewhere(), patch(pipe, **FLAT, attn_shape=shape):
        actual = paint(pipe, arguments)
    assert type(actual) is torch.Tensor
    assert error(actual, expected) < CLOSE / 10
    assert rows.count() > 10
    assert fingerprint(pipe) == before
    gc.collect()
    assert not rows.alive


@pytest.mark.parametrize("case", ["Flux", "references", "two attentions", "masks", "one stream, shared keys"])
def test_of_a_vast_map_on_the_host_the_same_is_kept(case, rows, monkeypatch):  # noqa: F811
    """Means over cells of 2x2, as on the device; they make no picture of their own."""
    pipe, arguments = quiet(CASES[case].build()), CASES[case].arguments
    results = {}
    for vast in (1, 10**6):
        monkeypatch.setattr(kept_keys, "VAST", vast)
        with patch(pipe, attn_context=24):
            results[vast] = paint(pipe, arguments)
    assert error(results[1], results[10**6]) > CLOSE
    monkeypatch.setattr(kept_keys, "VAST", 1)
    with elsewhere(), patch(pipe, **FLAT):
        assert error(paint(pipe, arguments), results[1]) < CLOSE / 10
    assert rows.count() > 10


def test_heads_that_come_one_by_one_do(flux, monkeypatch):
    pipe, arguments = flux
    together, of_heads = [], host_attention.Attending.of_heads

    def noting(self, first, last):
        together.append(last - first)
        return of_heads(self, first, last)

    monkeypatch.setattr(host_attention.Attending, "of_heads", noting)
    found = {}
    for held in (1, 2**28):
        together.clear()
        monkeypatch.setattr(host_attention, "HELD", held)
        with elsewhere(), patch(pipe, **FLAT):
            paint(pipe, arguments, num_inference_steps=1)
        found[held] = set(together)
    assert found == {1: {1}, 2**28: {2}}


def called(model, **options):
    """What a Flux makes of some latent."""
    ids = d.FluxPipeline._prepare_latent_image_ids(1, 9, 11, "cpu", torch.float32)
    told = {"encoder_hidden_states": noise(1, 5, 32), "pooled_projections": noise(1, 32), "img_ids": ids}
    told |= {"txt_ids": torch.zeros(5, 3), "timestep": torch.ones(1) / 2}
    pipe = SimpleNamespace(components={"transformer": model}, scheduler=None, vae_scale_factor=8)
    with elsewhere(), patch(pipe, **options):
        return model(noise(1, 99, 16), **told, return_dict=False)[0]


@pytest.mark.parametrize("case", ["Flux", "references", "one stream after two"])
def test_copies_on_streams_of_their_own_are_waited_for(case, monkeypatch):
    """As on CUDA, on streams that are played."""
    monkeypatch.setattr(host_attention, "HELD", 1)
    pipe, arguments, host = quiet(CASES[case].build()), CASES[case].arguments, Host("cpu:0", 1500, LEAST)
    with patch(pipe, attn_context=24):
        expected = paint(pipe, arguments, num_inference_steps=1)
    with (
        mock.patch.object(denoisers, "Host", lambda least: host),
        patch(pipe, **FLAT),
        streams.play(host) as watch,
    ):
        assert error(paint(pipe, arguments, num_inference_steps=1), expected) < CLOSE / 10
    assert [stream.total > 100 for stream in watch.sides] == [True, True]
    assert watch.sound()


@OFFLOADS
@pytest.mark.usefixtures("cpu_as_accelerator")
def test_weights_that_come_and_go_do_so_for_maps_on_a_host(offload, flux, rows):  # noqa: F811
    model = flux[0].transformer
    expected = called(model, attn_context=24)
    offload(model)
    for _ in range(2):
        assert error(called(model, **FLAT), expected) < CLOSE
    assert rows.count() > 10


def test_a_hook_of_the_user_may_keep_any_map(flux):
    """What it kept is right, even after the call."""
    pipe, arguments = flux
    kept = {}
    for path in ("x_embedder", "transformer_blocks.0", "single_transformer_blocks.1", "norm_out", "proj_out"):
        module = pipe.transformer.get_submodule(path)
        module.register_forward_hook(lambda _, __, output, path=path: kept.update({path: output}))
    with patch(pipe, attn_context=24):
        paint(pipe, arguments, num_inference_steps=1)
    expected = kept.copy()
    with elsewhere(), patch(pipe, **FLAT):
        paint(pipe, arguments, num_inference_steps=1)
    assert isinstance(kept["x_embedder"], Map) and not isinstance(kept["proj_out"], Map)
    for path, output in kept.items():
        found, there = (each[-1] if isinstance(each, tuple) else each for each in (output, expected[path]))
        assert error(found + 0, there) < CLOSE


def test_what_gradients_go_through_stays_on_the_device(flux, rows):  # noqa: F811
    model, found = flux[0].transformer.requires_grad_(True), []
    for options in ({"attn_context": 24}, FLAT):
        model.zero_grad()
        with torch.enable_grad():
            called(model, **options).sum().backward()
        found.append(model.x_embedder.weight.grad.clone())
    assert rows.count() == 0
    assert error(*found) < CLOSE


def test_an_interrupt_in_the_middle_of_a_step_leaves_no_map_behind(flux, rows):  # noqa: F811
    pipe, arguments = flux
    paint(pipe, arguments, num_inference_steps=1)  # a transformer changes by itself in the first run
    before, module = fingerprint(pipe), pipe.transformer.single_transformer_blocks[0].proj_out
    with pytest.warns(match="forward hooks inside"), interrupted(module, rows), elsewhere(), patch(pipe, **FLAT):
        paint(pipe, arguments)
    assert fingerprint(pipe) == before
    gc.collect()
    assert not rows.alive


def simulated(kind, model):
    """A pipeline with a published transformer, without data."""
    with torch.device("meta"):
        transformer = model()
    torch.nn.Module.to(transformer, torch.bfloat16)
    parts = dict.fromkeys(kind._get_signature_keys(kind)[0])
    return kind(**parts | {"transformer": transformer, "scheduler": d.FlowMatchEulerDiscreteScheduler()})


# With what goes through a block at once.
PUBLISHED = [
    (d.FluxPipeline, d.FluxTransformer2DModel, 1.1 * GIB),
    (d.ChromaPipeline, d.ChromaTransformer2DModel, 1.3 * GIB),
    (d.Krea2Pipeline, d.Krea2Transformer2DModel, 1.8 * GIB),
]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize(("kind", "model", "tiles"), PUBLISHED, ids=lambda each: getattr(each, "__name__", ""))
def test_a_device_holds_little_of_a_transformer_at_any_size(kind, model, tiles):
    """Simulated: of a step, beside its weights, where the device alone would hold 21 GiB or more."""
    estimate = LargeResPatch(simulated(kind, model), 16384, 16384, unet_offload="maps").estimate()
    # Beside positions, masks, latents and the keys of one head.
    assert estimate.step < tiles + 1024**2 * 3000


def test_flux_at_8192_takes_less_than_four_gibibytes_of_a_device_and_with_a_host_less_than_two():
    """And of the host what its hidden states, queries, keys and values take."""
    pipe = simulated(d.FluxPipeline, d.FluxTransformer2DModel)
    alone, estimate = (LargeResPatch(pipe, 8192, 8192, unet_offload=way).estimate() for way in (False, "maps"))
    assert alone.host == 0
    assert alone.step < 4 * GIB
    assert estimate.step < 1.5 * GIB
    assert estimate.host == 4 * 512 * 512 * 3072 * 2


def test_blocks_of_text_and_tokens_on_the_host_are_counted_once():
    """An estimate does next to nothing for four more of them."""
    done = []
    for number in (9, 5, 9):  # four of which are cut up in different ways
        with torch.device("meta"):
            model = d.ChromaTransformer2DModel(num_layers=1, num_single_layers=number)
        pipe = simulated(d.ChromaPipeline, lambda model=model: model)
        with Operations() as run:
            LargeResPatch(pipe, 8192, 8192, unet_offload="maps").estimate()
        done.append(run.count)
    assert done[2] - done[1] < 0.01 * done[1]


SIZES = {"attn_slice_x": 8, "attn_slice_y": 8, "attn_full_tokens": 64, "attn_context": 64, "unet_offload": "maps"}


MODELS = {
    "Flux": (test_flux.pipeline, test_flux.TEXT | test_flux.TestFlux.prompt),
    "one stream": (test_chroma.TestChroma.cases["text"].build, test_chroma.TEXT | test_chroma.TestChroma.prompt),
}


@pytest.mark.parametrize(("name", "held"), [("Flux", 1), ("Flux", 2**28), ("one stream", 1)])
def test_the_estimate_of_a_step_is_what_a_real_one_holds_on_the_device_and_on_the_host(name, held, monkeypatch):
    monkeypatch.setattr(host_attention, "HELD", held)
    build, arguments = MODELS[name]
    pipe = quiet(build())
    with elsewhere():
        patch = LargeResPatch(pipe, 384, 320, **SIZES)
        with by_side() as count, patch, count:
            paint(pipe, arguments, width=384, height=320, num_inference_steps=1)
    monkeypatch.setattr(denoisers, "LEAST_BYTES", LEAST)
    monkeypatch.setattr(shadow, "LIBRARIES", 0)  # what an accelerator's take
    for model in (pipe.transformer, pipe.vae):
        model.to("meta")
    estimate = LargeResPatch(pipe, 384, 320, **SIZES).estimate()
    assert estimate.step == pytest.approx(count.peak["device"], rel=0.1)
    assert estimate.host == pytest.approx(count.peak["host"], rel=0.1)
