"""Pipelines without weights."""

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module

import tiny
from largerespatch import LargeResPatch
from largerespatch.core.families import families_in
from largerespatch.core.maps import ComputedMap, JoinedMap, StoredMap
from largerespatch.core.pieces import rehearsal
from largerespatch.core.weights import Holding
from largerespatch.memory.run_once import RunOnce, _look
from largerespatch.memory.shadow import Shadow
from largerespatch.memory.weightless import Weightless, WithoutData
from largerespatch.techniques.strips.cuts import Strips
from largerespatch.techniques.strips.strips import StripResnet
from test_patch import SMALL, fingerprint


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_shadow_has_the_same_modules_without_data(pipe, place):
    pipe.unet.to(place)
    before = fingerprint(pipe)
    shadow = Shadow(pipe, [])
    assert fingerprint(pipe) == before
    assert shadow.pipe is not pipe and type(shadow.pipe) is type(pipe)
    assert set(shadow.models) == {"unet", "vae"} == set(families_in(pipe))
    for name, (copied, family) in shadow.models.items():
        model = getattr(pipe, name)
        assert copied is getattr(shadow.pipe, name) and copied is not model
        assert family is families_in(pipe)[name][1]
        for (path, own), (same, other) in zip(model.named_modules(), copied.named_modules(), strict=True):
            assert path == same and type(own) is type(other) and own is not other
        for own, other in zip(model.parameters(), copied.parameters(), strict=True):
            assert other.is_meta or isinstance(other, Weightless)
            assert (own.shape, own.stride(), own.dtype) == (other.shape, other.stride(), other.dtype)
            assert own.device.type == other.device.type


def test_a_shadow_has_no_replacements_and_no_hooks(pipe):
    handle = pipe.vae.decoder.register_forward_hook(lambda *_: None)
    add_hook_to_module(pipe.unet, CpuOffload("cpu"))
    patch = LargeResPatch(pipe, 96, 64, padding_mode="circular", **SMALL)
    with patch:
        shadow = Shadow(pipe, [patch._stack])
    for copied, _ in shadow.models.values():
        for module in copied.modules():
            assert not {"forward", "_hf_hook", "_old_forward", "_diffusers_hook"} & vars(module).keys()
            assert not module._forward_hooks
            assert getattr(module, "padding_mode", "zeros") == "zeros"
    handle.remove()


def test_what_is_layerwise_cast_counts_as_it_is_computed(pipe):
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    unet, _ = Shadow(pipe, []).models["unet"]
    assert pipe.unet.mid_block.resnets[0].conv1.weight.dtype == torch.bfloat16
    assert unet.mid_block.resnets[0].conv1.weight.dtype == torch.float32


def test_the_peak_is_what_is_alive_at_once(pipe):
    shadow = Shadow(pipe, [])

    def work():
        first = torch.ones(1000)
        second = first + 1
        del first
        third = second + 1
        assert isinstance(third, Weightless) and not third.requires_grad

    assert shadow.peaks(work) == (8000, 0)
    assert torch.ones(2).sum().item() == 2


@pytest.mark.parametrize("patched", [False, True])
def test_blocks_that_are_alike_are_counted_by_one_of_them(monkeypatch, patched):
    """The same result, with fewer calls, as when each block runs for itself."""
    from diffusers import StableDiffusionXLPipeline

    unet = tiny.unet(**tiny.XL_UNET | {"transformer_layers_per_block": (1, 9)})
    patch = LargeResPatch(StableDiffusionXLPipeline(**tiny.xl_components(unet=unet)), 128, 128, **SMALL)
    ran = []
    around = type(unet.mid_block.attentions[0].transformer_blocks[0]).forward

    def counted(self, *args, **kwargs):
        ran.append(self)
        return around(self, *args, **kwargs)

    monkeypatch.setattr(type(unet.mid_block.attentions[0].transformer_blocks[0]), "forward", counted)
    alike, few = patch.estimate(patched).step, len(ran)
    ran.clear()
    each = lambda models, phases: {module: id(module) for model in models for module in model.modules()}  # noqa: E731
    monkeypatch.setattr("largerespatch.memory.shadow.makes_of", each)
    assert patch.estimate(patched).step == alike
    assert few < len(ran)


@pytest.mark.parametrize("offload", [False, "skips", "maps"])
def test_alike_modules_in_strips_are_counted_by_one_of_them(pipe, monkeypatch, offload):
    """On the device and on the host, whatever their maps are: stored, joined, or tokens."""
    monkeypatch.setattr("largerespatch.denoisers.unet.LEAST_BYTES", 2**12)
    pipe.unet = tiny.unet(layers_per_block=3).to("meta")
    options = SMALL | {"unet_strip_rows": 3, "unet_offload": offload}
    ran = []
    run = StripResnet.run
    monkeypatch.setattr(StripResnet, "run", lambda self, *given: ran.append(self.module) or run(self, *given))

    def needed():
        patch = LargeResPatch(pipe, 160, 128, **options)
        estimator = patch._estimator(patch._on)
        return [need("step", 128, 160, patch.options) for need in (estimator.peak, estimator.host_peak)]

    alike, few = needed(), len(ran)
    assert (alike[1] > 0) == bool(offload)
    ran.clear()
    monkeypatch.setattr(Strips, "repeats", False)
    assert needed() == alike
    assert few < len(ran)


def test_maps_look_alike_if_what_they_are_made_of_does():
    plane, half = (torch.empty(1, channels, 8, 8) for channels in (4, 2))
    assert _look(JoinedMap.of([half, half], 1)) == _look(JoinedMap.of([half.clone(), half], 1))
    third = torch.empty(1, 1, 8, 8)
    assert _look(JoinedMap.of([half, half], 1)) != _look(JoinedMap.of([third, half, third], 1))
    assert _look(StoredMap.of(plane)) == _look(StoredMap.of(plane.clone())) != _look(StoredMap.of(plane, passing=True))
    computed = ComputedMap(plane.shape, plane, lambda runs: iter(()))
    assert _look(computed) != _look(computed), "whatever it is computed of"


def test_work_that_leaves_something_behind_is_run_again():
    kept, ran = [], []

    class Technique:
        strips = Strips(4, wrap=False)

        def __call__(self, original, given):
            ran.append(1)
            if given.shape[0] == 2:
                kept.append(given + 1)
            return given * 2

    module = torch.nn.Linear(1, 1)
    held = Holding(module, Technique())
    with WithoutData("meta") as count, rehearsal(RunOnce(count, {module: 0})):
        for batch, times in ((1, 1), (2, 2)):
            ran.clear()
            given = torch.empty(batch, 3, device="meta")
            results = [held(None, given), held(None, given)]
            assert len(ran) == times and len({id(each) for each in results}) == 2
            assert count.alive == sum(each.nbytes for each in (given, *results, *kept))
