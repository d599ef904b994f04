"""Weights that are brought to the device for each call come once for all pieces, and leave when these are done."""

from collections import Counter
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import accelerate.hooks
import pytest
import torch
from diffusers.hooks import apply_group_offloading, group_offloading
from diffusers.hooks.group_offloading import GroupOffloadingConfig, GroupOffloadingType, ModuleGroup
from products import in_pairs
from test_company import CPU, cpu_offload, group_offload, leaf_group_offload
from torch import nn

import streams
import tiny
from conftest import quiet
from halves import HALVES, INPUTS
from largerespatch import LargeResPatch
from largerespatch.core.weights import weights_held
from largerespatch.memory.devices import weights_on
from test_patch import SMALL

META = torch.device("meta")
OFFLOADS = [cpu_offload, leaf_group_offload, group_offload]


@pytest.fixture(autouse=True)
def cpu_as_accelerator(monkeypatch):
    """Group offload of older diffusers wants one, be it used or not."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="cpu"))


class Loads(Counter):
    """How often what came to the device: single weights by accelerate's hooks, groups of them by diffusers'.

    `peak` is the most bytes of it that were there at once.
    """

    def __init__(self):
        super().__init__()
        self.there, self.peak = {}, 0

    def come(self, key, weights):
        self[key] += 1
        self.there[key] = sum(weight.nbytes for weight in weights)
        self.peak = max(self.peak, sum(self.there.values()))


@pytest.fixture
def loads(monkeypatch):
    loads, put = Loads(), accelerate.hooks.set_module_tensor_to_device
    onload, offload = ModuleGroup.onload_, ModuleGroup.offload_

    def noting_put(module, name, device, *args, **kwargs):
        put(module, name, device, *args, **kwargs)
        if torch.device(device) == META:
            loads.there.pop((module, name), None)
        else:
            loads.come((module, name), [getattr(module, name)])

    def noting_onload(group):
        onload(group)
        loads.come(group, {*group.parameters, *(weight for module in group.modules for weight in module.parameters())})

    def noting_offload(group):
        offload(group)
        loads.there.pop(group, None)

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", noting_put)
    monkeypatch.setattr(ModuleGroup, "onload_", noting_onload)
    monkeypatch.setattr(ModuleGroup, "offload_", noting_offload)
    return loads


def denoise(pipe):
    sample = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    return pipe.unet(sample, 500, torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))).sample


STAGES = {
    "step": denoise,
    "encode": lambda pipe: HALVES["encode"](pipe.vae, INPUTS["encode"](1, 8, 12)),
    "decode": lambda pipe: HALVES["decode"](pipe.vae, INPUTS["decode"](1, 8, 12)),
}
WAYS = {  # of a VAE, each beside one of a U-Net
    "two-pass": {},
    "three passes, serial": {"vae_passes": 3, "unet_serial": True},
    "exact, strips": {"vae_mode": "exact", "unet_strip_rows": 2},
    "recomputed": {"vae_mode": "exact", "vae_recompute": True},
}


@cache
def unhooked(stage, way):
    """What a pipeline gives whose weights stay, in that way; unpatched by none. Not to be changed."""
    pipe = quiet(tiny.text_to_image())
    with nullcontext() if way is None else LargeResPatch(pipe, 96, 64, **SMALL, **WAYS[way]):
        return STAGES[stage](pipe)


def counted(loads, stage, pipe):
    loads.clear()
    result = STAGES[stage](pipe)
    return result, +loads


def hooked(hook):
    pipe = quiet(tiny.text_to_image())
    hook(pipe)
    return pipe


def hooks_of(pipe):
    """All that hooks hold, with identity and order."""
    changing = {"input_device", "tied_pointers_to_remove"}  # of the last call
    return [
        [(key, id(value)) for key, value in vars(holder).items() if key not in changing]
        for model in (pipe.unet, pipe.vae)
        for module in model.modules()
        for holder in holders(module)
    ]


def holders(module):
    if hasattr(module, "_hf_hook"):
        yield module._hf_hook
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None:
        yield from registry._fn_refs
        for hook in registry.hooks.values():
            yield hook
            if hasattr(hook, "group"):
                yield hook.group


@pytest.mark.parametrize(
    ("hook", "way"), [(cpu_offload, way) for way in WAYS] + [(leaf_group_offload, way) for way in [*WAYS][::2]]
)
def test_a_weight_comes_once_however_many_pieces_its_module_sees(hook, way, loads):
    pipe = hooked(hook)
    options = SMALL | WAYS[way]
    for stage in STAGES:
        unpatched = counted(loads, stage, pipe)[1]
        assert set(unpatched.values()) == {1}
        before = hooks_of(pipe)
        with LargeResPatch(pipe, 96, 64, **options):
            result, patched = counted(loads, stage, pipe)
        assert torch.equal(result, unhooked(stage, way))
        if "unet_serial" in options and stage == "step":
            assert patched == unpatched + unpatched  # a sample at a time, as if called for each
        else:
            assert patched == unpatched
        assert hooks_of(pipe) == before
        assert hook is not cpu_offload or not any(map(is_there, [*pipe.unet.parameters(), *pipe.vae.parameters()]))


@pytest.mark.parametrize(("hook", "way"), [(OFFLOADS[i % 3], way) for i, way in enumerate([*WAYS, *WAYS][:6])])
def test_no_more_is_there_at_once_than_the_estimate_says(hook, way, loads):
    pipe = hooked(hook)
    staying = sum(weight.nbytes for weight in [*pipe.text_encoder.parameters(), *pipe.text_encoder.buffers()])
    for stage in STAGES:
        counted(loads, stage, pipe)
    assert loads.peak == weights_on(pipe, CPU) - staying
    unpatched, loads.peak = loads.peak, 0
    patch = LargeResPatch(pipe, 96, 64, **SMALL | {"ff_chunk_size": 8}, **WAYS[way])  # all blocks in chunks
    with patch:
        for stage in STAGES:
            counted(loads, stage, pipe)
    said = weights_on(pipe, CPU, patch.options) - staying
    assert patch.estimate(patched=True).weights == said + staying
    assert patch.estimate(patched=False).weights == unpatched + staying
    assert unpatched <= loads.peak <= said
    assert said < 2 * loads.peak  # of an encoder or decoder it counts the stages that are not in tiles, too
    assert not loads.there


@pytest.mark.parametrize("way", WAYS)
def test_a_group_of_blocks_comes_once_for_all_tiles(way, loads):
    pipe = hooked(group_offload)
    for stage in ("encode", "decode"):
        unpatched = counted(loads, stage, pipe)[1]
        with LargeResPatch(pipe, 96, 64, **SMALL, **WAYS[way]):
            assert counted(loads, stage, pipe)[1] == unpatched


def by_layer(model):
    accelerate.cpu_offload(model, execution_device=CPU)


def by_group(model):
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


@pytest.mark.parametrize("offload", [by_layer, by_group])
def test_what_is_held_twice_leaves_with_the_outer_one_and_what_is_not_called_never_comes(offload, loads):
    model, x = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))), torch.ones(1, 3)
    expected = model[1](model[0](model[1](x)))
    offload(model)
    loads.clear()
    size = sum(weight.numel() for weight in nn.Linear(3, 3).parameters()) * 4
    with weights_held(model[:2].modules()):
        for _ in range(3):
            with weights_held(model[1].modules()):
                assert torch.equal(model[1](model[0](model[1](x))), expected)
                with weights_held(model[1].modules()):
                    model[1](x)
            assert sum(loads.there.values()) == 2 * size
        model[2](x)
        assert sum(loads.there.values()) == 2 * size  # it is not among what is held
    assert not loads.there and set(loads.values()) == {1}
    model[1](x)
    assert set(loads.values()) == {1, 2} and not loads.there


def test_what_is_brought_ahead_for_a_later_call_stays(loads):
    """As by the group before it, on its last call."""
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.ones(1, 3)
    by_group(model)
    groups = [layer._diffusers_hook.hooks["group_offloading"].group for layer in model]
    with weights_held(model.modules()):
        model(x)
        groups[0].onload_()
    assert list(loads.there) == [groups[0]]


class Stop(BaseException):
    pass


@in_pairs({"hook": OFFLOADS, "way": ["two-pass", "exact, strips", "recomputed"], "stage": STAGES})
def test_after_an_exception_on_the_way_all_has_left_and_hooks_are_as_before(hook, way, stage, monkeypatch):
    pipe, convolve, calls = hooked(hook), nn.Conv2d._conv_forward, []
    pipe_stage = STAGES[stage]
    unpatched, before = pipe_stage(pipe), hooks_of(pipe)

    def stopping(module, *args):
        calls.append(module)
        if len(calls) == stop_at:
            raise Stop
        return convolve(module, *args)

    with LargeResPatch(pipe, 96, 64, **SMALL, **WAYS[way]):
        expected, inside = pipe_stage(pipe), hooks_of(pipe)
        monkeypatch.setattr(nn.Conv2d, "_conv_forward", stopping)
        for stop_at in (1, 2, 3, 5, 8, 13):  # noqa: B007  read where it stops
            calls.clear()
            with pytest.raises(Stop) as caught:
                pipe_stage(pipe)
            assert hooks_of(pipe) == inside
            there = {module for module in pipe.vae.modules() if any(map(is_there, module.parameters(recurse=False)))}
            assert hook is not cpu_offload or there <= {calls[-1]}  # as accelerate leaves it where nothing is held
            del caught  # that was while the exception is still known
        monkeypatch.undo()
        assert torch.equal(pipe_stage(pipe), expected)
    assert hooks_of(pipe) == before
    assert torch.equal(pipe_stage(pipe), unpatched)


def is_there(weight):
    return weight.device != META


class PlayedGroup(ModuleGroup):
    """A group that comes on a played stream, and whose weights are on the meta device while it is away."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        inside = [module for root in self.modules for module in root.modules()]
        around = [module for module in self.offload_leader.modules() if module not in inside]
        self._kept = {
            (module, name): weight.data
            for module in (*inside, *around)
            for name, weight in module._parameters.items()
            if weight is not None and (module in inside or any(weight is each for each in self.parameters))
        }

    def _init_cpu_param_dict(self):
        return {}

    def _put(self, weights):
        for (module, name), weight in weights.items():
            module._parameters[name] = nn.Parameter(weight, requires_grad=False)
        self.parameters[:] = [module._parameters[name] for module, name in weights if module not in self._inside()]

    def _inside(self):
        return {module for root in self.modules for module in root.modules()}

    def offload_(self):
        self._put({slot: weight.to(META) for slot, weight in self._kept.items()})

    def onload_(self):
        if self.stream is None:
            return self._put(self._kept)
        self.stream.synchronize()
        coming = {slot: torch.full_like(weight, float("nan")) for slot, weight in self._kept.items()}
        self._put(coming)
        self.stream.put(lambda: [coming[slot].copy_(weight) for slot, weight in self._kept.items()])
        if not self.non_blocking:
            self.stream.synchronize()


@pytest.fixture(params=GroupOffloadingType)
def offload_on_a_stream(request, monkeypatch):
    """Group offload, each group on its way while the one before it runs; as on CUDA, on a stream that is played."""
    monkeypatch.setattr(group_offloading, "ModuleGroup", PlayedGroup)

    def offload(*models):
        for model in models:
            config = GroupOffloadingConfig(
                onload_device=CPU,
                offload_device=META,
                offload_type=request.param,
                non_blocking=False,
                record_stream=False,
                low_cpu_mem_usage=False,
                num_blocks_per_group=1,
                stream=streams.Stream(),
                block_modules=getattr(model, "_group_offload_block_modules", None),
            )
            group_offloading._apply_group_offloading(model, config)

    return offload


@pytest.fixture
def streamed(offload_on_a_stream):
    pipe = quiet(tiny.text_to_image())
    offload_on_a_stream(pipe.unet, pipe.vae)
    return pipe


def test_where_weights_are_held_a_call_that_nobody_foresaw_finds_them_and_a_foreseen_one_waits(offload_on_a_stream):
    layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    model, x = nn.Sequential(layers, nn.Linear(3, 3)).requires_grad_(False), torch.ones(1, 3)
    first, second, third = (layer(x) for layer in layers)
    offload_on_a_stream(model)
    model(x)  # so it is learnt which one comes next
    with weights_held(model.modules()):
        assert torch.equal(layers[1](x), second)
        layers[0]._diffusers_hook.hooks["group_offloading"].group.onload_()  # under way
        assert torch.equal(layers[0](x), first)  # ahead of which the second one would come, but is there
        assert torch.equal(layers[2](x), third)


@in_pairs(
    {"way": WAYS, "patched_first": [False, True], "offload_on_a_stream": GroupOffloadingType}, ["offload_on_a_stream"]
)
def test_groups_that_come_ahead_on_a_stream_are_there_for_every_piece(way, patched_first, streamed):
    """Which one comes next is learnt in the first call. That may be one with the patch on, or without."""
    pipe, patch = streamed, LargeResPatch(streamed, 96, 64, **SMALL, **WAYS[way])
    for patched in (patched_first, not patched_first, patched_first):
        for stage in STAGES:
            with patch if patched else nullcontext():
                assert torch.equal(STAGES[stage](pipe), unhooked(stage, way if patched else None))


def test_with_a_stream_another_group_is_there_by_the_estimate(streamed):
    pipe = streamed
    groups = {holder for model in (pipe.unet, pipe.vae) for module in model.modules() for holder in holders(module)}
    groups = [group for group in groups if getattr(group, "stream", None) is not None]
    with_streams, in_unet = weights_on(pipe, CPU), set(pipe.unet.modules())  # where most visit at once
    ahead = (group._kept.values() for group in groups if group.offload_leader in in_unet)
    for group in groups:
        group.stream = None
    assert with_streams - weights_on(pipe, CPU) == max(sum(weight.nbytes for weight in kept) for kept in ahead)


@in_pairs(
    {
        "way": ["two-pass", "exact, strips"],
        "patched_first": [False, True],
        "offload_on_a_stream": GroupOffloadingType,
    },
    ["offload_on_a_stream"],
)
def test_groups_that_come_ahead_on_a_stream_are_there_for_every_slice(way, patched_first, streamed):
    pipe, unhooked = streamed, quiet(tiny.text_to_image())
    patches = [LargeResPatch(each, 96, 64, **SMALL, **WAYS[way]) for each in (pipe, unhooked)]
    for each in (pipe, unhooked):
        each.vae.enable_slicing()
    x = INPUTS["decode"](3, 8, 12)
    if not patched_first:
        HALVES["decode"](pipe.vae, x)
    with patches[0], patches[1]:
        for _ in range(2):
            assert torch.equal(HALVES["decode"](pipe.vae, x), HALVES["decode"](unhooked.vae, x))
