from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    Transformer2DModel,
    UNetMotionModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0
from diffusers.models.controlnets import MultiControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from hypothesis import given, settings
from hypothesis import strategies as st

import live
import streams
import tiny
from conftest import quiet
from largerespatch import LargeResPatch
from largerespatch.attention import StepNote
from largerespatch.offload import Joined, Link, OffMap, Waiting
from largerespatch.patching import PatchStack
from largerespatch.strips import Strips, unet_replacements
from largerespatch.unet import SerialBatch, StepNoting, offloadings, put_sample, step_index, take_sample
from test_patch import SMALL, fingerprint


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler])
def test_steps_count_up_by_one_per_distinct_timestep(kind):
    scheduler = kind()
    scheduler.set_timesteps(7)
    steps = [step_index(timestep, scheduler) for timestep in scheduler.timesteps]
    assert sorted(set(steps)) == list(range(len(set(steps))))
    assert steps == sorted(steps)
    # asking again, in another order and for a whole batch, changes nothing
    again = [step_index(timestep.expand(2), scheduler) for timestep in scheduler.timesteps.flip(0)]
    assert again == steps[::-1]


def test_without_a_schedule_the_timestep_itself_counts():
    assert step_index(torch.tensor(41), None) == 41
    assert step_index(7.0, object()) == 7


class Denoiser(torch.nn.Module):
    def forward(self, sample, timestep, encoder_hidden_states=None):
        return sample


@pytest.mark.parametrize(
    "call", [lambda m, t: m(0, t), lambda m, t: m(timestep=t, sample=0), lambda m, t: m(0, t, None)]
)
def test_the_timestep_is_found_positional_or_by_keyword(call):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    note, model = StepNote(), Denoiser()
    with PatchStack() as stack:
        stack.wrap(model, "forward", StepNoting(note, lambda: scheduler), "unet.forward")
        assert call(model, scheduler.timesteps[6]) == 0
    assert note.step == 6


def same(actual, expected):
    """Equal to rounding in float32 on toy models whose outputs are of order one, in whatever structure."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def text(batch, width=32):
    return {"timestep": torch.tensor(500), "encoder_hidden_states": noise(batch, 7, width)}


def xl_text(batch):
    return text(batch, 64) | {"added_cond_kwargs": {"text_embeds": noise(batch, 32), "time_ids": noise(batch, 6)}}


def residuals(batch, height, width):
    """As a ControlNet makes them for `tiny.unet`."""
    half = ((height + 1) // 2, (width + 1) // 2)
    sizes = [(16, height, width), (16, height, width), (16, *half), (32, *half)]
    return {
        "down_block_additional_residuals": [noise(batch, *size) for size in sizes],
        "mid_block_additional_residual": noise(batch, 32, *half),
    }


def with_ip_adapter(model):
    """Two of them, with one and two images."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    torch.manual_seed(7)
    processors = {
        name: processor
        if "attn1" in name
        else IPAdapterAttnProcessor2_0(model.get_submodule(name[: -len(".processor")]).inner_dim, 32, (3, 3))
        for name, processor in model.attn_processors.items()
    }
    model.set_attn_processor(processors)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(10, 32, 3) for _ in range(2)])
    model.config.encoder_hid_dim_type = "ip_image_proj"
    return model.requires_grad_(False)


def images(batch):
    return {"added_cond_kwargs": {"image_embeds": [noise(batch, 1, 10), noise(batch, 2, 10)]}}


def masks(*shape):
    return {"cross_attention_kwargs": {"ip_adapter_masks": (noise(*shape) > 0).float()}}


def listed_masks(batch):
    return {"cross_attention_kwargs": {"ip_adapter_masks": [noise(1, 1, 24, 24), noise(batch, 2, 24, 24)]}}


def gligen(batch):
    return {
        "cross_attention_kwargs": {
            "gligen": {
                "boxes": noise(batch, 5, 4),
                "masks": (noise(batch, 5) > 0).float(),
                "positive_embeddings": noise(batch, 5, 32),
            },
            "scale": 0.5,
        }
    }


# name: (the model, changes to its arguments for a batch, a height and a width)
UNETS = {
    "SD": (tiny.unet, lambda b, h, w: text(b)),
    "one timestep each": (tiny.unet, lambda b, h, w: text(b) | {"timestep": torch.arange(b) * 300 + 5}),
    "one timestep as a list of one": (tiny.unet, lambda b, h, w: text(b) | {"timestep": torch.tensor([77])}),
    "XL": (lambda: tiny.unet(**tiny.XL_UNET), lambda b, h, w: xl_text(b)),
    "ControlNet residuals": (tiny.unet, lambda b, h, w: text(b) | residuals(b, h, w)),
    "text mask": (tiny.unet, lambda b, h, w: text(b) | {"encoder_attention_mask": noise(b, 7) > 0}),
    "class labels": (
        lambda: tiny.unet(num_class_embeds=9),
        lambda b, h, w: text(b) | {"class_labels": torch.arange(b) + 3},
    ),
    "guidance embedding": (
        lambda: tiny.unet(time_cond_proj_dim=6),
        lambda b, h, w: text(b) | {"timestep_cond": noise(b, 6)},
    ),
    "IP-Adapters": (lambda: with_ip_adapter(tiny.unet()), lambda b, h, w: text(b) | images(b)),
    "IP-Adapters, masks as a tensor": (
        lambda: with_ip_adapter(tiny.unet()),
        lambda b, h, w: (
            text(b) | {"added_cond_kwargs": {"image_embeds": [noise(b, 1, 10)] * 2}} | masks(2, 1, 24, 24)
        ),  # as many adapters as samples in a batch of two
    ),
    "IP-Adapters, masks as a list": (
        lambda: with_ip_adapter(tiny.unet()),
        lambda b, h, w: text(b) | images(b) | listed_masks(b),
    ),
    "GLIGEN": (
        lambda: with_position_net(tiny.unet(attention_type="gated")),
        lambda b, h, w: text(b) | gligen(b),
    ),
}


def with_position_net(model):
    for module in model.modules():
        if hasattr(module, "alpha_attn"):  # as they are initialized the objects have no effect
            module.alpha_attn.data.fill_(0.7)
            module.alpha_dense.data.fill_(0.7)
    return model


def adapter_states(batch, height, width):
    """As a T2I-Adapter makes them: for the end of each down block's attentions, and for the block without any."""
    half = ((height + 1) // 2, (width + 1) // 2)
    return {"down_intrablock_additional_residuals": [noise(batch, 16, height, width), noise(batch, 32, *half)]}


@pytest.fixture
def serially():
    """Make a model run its batches in turns; returns the sizes of the batches that it saw."""
    with PatchStack() as stack:

        def install(model):
            sizes = []

            def count(original, *args, **kwargs):
                sizes.append(len(kwargs.get("sample", args[0] if args else None)))
                return original(*args, **kwargs)

            stack.wrap(model, "forward", count, "forward")
            stack.wrap(model, "forward", SerialBatch(model), "forward")
            return sizes

        yield install


@pytest.mark.parametrize("case", UNETS)
@pytest.mark.parametrize(("batch", "height", "width"), [(2, 8, 8), (3, 9, 7)])
def test_a_unet_serially_is_the_unet(case, batch, height, width, serially):
    build, arguments = UNETS[case]
    model, sample = build(), noise(batch, 4, height, width)
    arguments = arguments(batch, height, width)
    expected = model(sample, **arguments).sample
    assert expected[0].sub(expected[1]).abs().max() > 1e-3  # samples mixed up would be seen
    sizes = serially(model)
    same(model(sample, **arguments).sample, expected)
    same(model(sample=sample, return_dict=False, **arguments), (expected,))
    assert sizes == [1] * 2 * batch


def test_adapter_states_are_split_and_left_in_the_callers_list(serially):
    model, sample = tiny.unet(), noise(3, 4, 9, 7)
    expected = model(sample, **text(3), **adapter_states(3, 9, 7)).sample
    assert expected.sub(model(sample, **text(3)).sample).abs().max() > 1e-3
    serially(model)
    states = adapter_states(3, 9, 7)
    same(model(sample, **text(3), **states).sample, expected)
    assert len(states["down_intrablock_additional_residuals"]) == 2


def test_every_argument_may_be_positional(serially):
    model, sample, extra = tiny.unet(), noise(2, 4, 8, 8), residuals(2, 8, 8)
    arguments = (sample, 500, noise(2, 7, 32), None, None, None, None, None, *extra.values())
    expected = model(*arguments).sample
    sizes = serially(model)
    same(model(*arguments).sample, expected)
    assert sizes == [1, 1]


CONTROLNETS = {
    "ControlNet": (tiny.controlnet, lambda b: text(b) | {"controlnet_cond": noise(b, 3, 72, 56)}),
    "in guess mode": (
        tiny.controlnet,
        lambda b: text(b) | {"controlnet_cond": noise(b, 3, 72, 56), "guess_mode": True},
    ),
    "one picture for all": (tiny.controlnet, lambda b: text(b) | {"controlnet_cond": noise(1, 3, 72, 56)}),
    "XL": (lambda: tiny.controlnet(xl=True), lambda b: xl_text(b) | {"controlnet_cond": noise(b, 3, 72, 56)}),
    "several": (
        lambda: MultiControlNetModel([tiny.controlnet(), tiny.controlnet()]),
        lambda b: (
            text(b)
            | {"controlnet_cond": [noise(b, 3, 72, 56), noise(b, 3, 72, 56) ** 2], "conditioning_scale": [0.3, 1.5]}
        ),
    ),
}


@pytest.mark.parametrize("case", CONTROLNETS)
@pytest.mark.parametrize("batch", [2, 3])
def test_a_controlnet_serially_is_the_controlnet(case, batch, serially):
    build, arguments = CONTROLNETS[case]
    model, sample, arguments = build(), noise(batch, 4, 9, 7), arguments(batch)
    expected = model(sample, **arguments, return_dict=False)
    sizes = serially(model)
    same(model(sample, **arguments, return_dict=False), expected)
    assert sizes == [1] * batch
    if case != "several":  # upstream takes tuples only
        output = model(sample, **arguments)
        assert isinstance(output, ControlNetOutput)
        same(output.to_tuple(), expected)


@pytest.mark.parametrize("frames", [1, 3])
def test_frames_stay_with_their_video(frames, serially):
    torch.manual_seed(8)
    model = UNetMotionModel(
        **{key: tiny.UNET[key] for key in ("sample_size", "block_out_channels", "cross_attention_dim")},
        **{"layers_per_block": 1, "norm_num_groups": 8, "num_attention_heads": 4, "motion_num_attention_heads": 4},
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    ).eval()
    sample, words = noise(2, 4, frames, 9, 7), noise(2 * frames, 7, 32)
    expected = model(sample, 500, words).sample
    assert expected[0].sub(expected[1]).abs().max() > 1e-3
    sizes = serially(model)
    same(model(sample, 500, words).sample, expected)
    assert sizes == [1, 1]


def test_a_transformer_of_its_own_serially_is_the_transformer(serially):
    torch.manual_seed(9)
    model = Transformer2DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 8},
        **{"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False},
    ).eval()
    arguments = {"timestep": torch.tensor([5, 600]), "class_labels": torch.tensor([1, 7])}
    sample = noise(2, 4, 8, 8)
    expected = model(sample, **arguments).sample
    assert expected[0].sub(expected[1]).abs().max() > 1e-3
    sizes = serially(model)
    same(model(sample, **arguments).sample, expected)
    assert sizes == [1, 1]


def test_one_sample_is_passed_on_as_it_is():
    seen = []
    given = (noise(1, 4, 8, 8), {"list": [noise(2, 3)]})
    answer = SerialBatch(torch.nn.Module())(lambda sample, extra: seen.append((sample, extra)) or extra, *given)
    assert answer is given[1]
    assert seen[0][0] is given[0] and seen[0][1] is given[1]


def test_gradients_pass_through_a_serial_batch(serially):
    model, sample = tiny.unet(), noise(2, 4, 8, 8).requires_grad_()
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(model(sample, **text(2)).sample.square().sum(), sample)
        serially(model)
        (actual,) = torch.autograd.grad(model(sample, **text(2)).sample.square().sum(), sample)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # sums of many terms


class Swapping(AttnProcessor2_0):
    """As cross-frame attention, a processor that shows every sample the first one's keys and values."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return super().__call__(attn, hidden_states, keys[:1].expand(len(hidden_states), -1, -1), **kwargs)


@pytest.mark.parametrize("processor", [Swapping(), PAGIdentitySelfAttnProcessor2_0()])
def test_a_batch_stays_whole_where_samples_may_see_each_other(processor, serially):
    model, sample = tiny.unet(), noise(2, 4, 8, 8)
    model.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(processor)
    expected = model(sample, **text(2)).sample
    sizes = serially(model)
    with pytest.warns(RuntimeWarning, match=f"unet_serial: {type(processor).__name__} may look across.*2 samples"):
        assert torch.equal(model(sample, **text(2)).sample, expected)
    assert sizes == [2]


leaves = st.sampled_from([(2, 3), (4, 3), (6, 1), (1, 5), (5, 2), ()]).map(lambda size: noise(*size))
others = st.none() | st.floats(allow_nan=False) | st.text(max_size=3)
trees = st.recursive(
    leaves | others,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(max_size=3), inner),
)


@settings(max_examples=25)
@given(trees, st.sampled_from([1, 2, 3]))
def test_what_is_taken_apart_by_sample_can_be_put_together(tree, batch):
    joined = None
    for index in range(batch):
        joined = put_sample(joined, take_sample({"tree": tree}, index, batch), index, batch)
    for actual, expected in zip(flat(joined["tree"]), flat(tree), strict=True):
        if isinstance(expected, torch.Tensor) and expected.ndim and len(expected) % batch:
            expected = torch.cat([expected] * batch)  # concerned every sample, whole
        assert torch.equal(actual, expected) if isinstance(expected, torch.Tensor) else actual == expected


def flat(tree):
    """The leaves of a tree with the kinds of its branches."""
    if isinstance(tree, list | tuple | dict):
        yield type(tree)
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from flat(each)
    else:
        yield tree


PIPELINES = {
    "SD": lambda: (StableDiffusionPipeline(**tiny.components()), {}),
    "XL, two prompts": lambda: (
        StableDiffusionXLPipeline(**tiny.xl_components()),
        {"prompt": ["a house", "the sea"]},
    ),
    "ControlNet": lambda: (
        StableDiffusionControlNetPipeline(**tiny.components(controlnet=tiny.controlnet())),
        {"image": noise(1, 3, 72, 56).sigmoid()},
    ),
}


@pytest.mark.parametrize("case", PIPELINES)
def test_a_pipeline_run_serially_gives_the_picture_of_whole_batches(case):
    pipe, arguments = PIPELINES[case]()
    quiet(pipe)
    sizes = {}
    for name in ("unet", "controlnet"):
        if model := getattr(pipe, name, None):
            model.conv_in.register_forward_pre_hook(lambda _, args, name=name: sizes[name].add(len(args[0])))
    latents = {}
    for serial in (False, True):
        sizes |= {"unet": set(), "controlnet": set()}
        before = fingerprint(pipe)
        # On the host the second option changes nothing.
        with LargeResPatch(pipe, 56, 72, **SMALL, unet_serial=serial, unet_offload=serial) as patch:
            assert ("one sample at a time, skip connections off the device" in repr(patch)) is serial
            given = {"prompt": "a house", "width": 56, "height": 72, "num_inference_steps": 3} | arguments
            latents[serial] = pipe(**given, generator=torch.Generator().manual_seed(0), output_type="latent").images
        assert all(size == {1} for size in sizes.values() if size) is serial
        assert not serial or fingerprint(pipe) == before  # text encoders change by themselves in the first run
    torch.testing.assert_close(latents[True], latents[False], rtol=1e-3, atol=1e-4)  # three steps, guidance


@pytest.mark.parametrize("option", ["unet_serial", "unet_offload"])
@pytest.mark.parametrize("value", [1, "yes", None])
def test_switches_are_true_or_false(pipe, option, value):
    with pytest.raises(TypeError, match=f"{option} must be one of True, False; got {value!r}"):
        LargeResPatch(pipe, 64, 64, **{option: value})


@pytest.fixture
def offloading():
    """Make a model's skip connections travel, in small bands, although they are on the host; returns what left."""
    link, left = Link("cpu:0", band_bytes=1500), []  # "cpu" is another name of it, which a tensor's device never has
    send = link.send
    link.send = lambda band: left.append(band.shape) or send(band)
    with PatchStack() as stack:

        def install(model):
            for path, module, each in offloadings(model, link):
                stack.wrap(module, "forward", each, path)
            return left

        yield install


@pytest.mark.parametrize("case", UNETS)
@pytest.mark.parametrize(("batch", "height", "width"), [(2, 8, 8), (3, 9, 7)])
def test_a_unet_whose_skip_connections_leave_is_the_unet(case, batch, height, width, offloading):
    build, arguments = UNETS[case]
    model, sample = build(), noise(batch, 4, height, width)
    arguments = arguments(batch, height, width)
    expected = model(sample, **arguments).sample
    left = offloading(model)
    actual = model(sample, **arguments).sample
    assert type(actual) is torch.Tensor
    same(actual, expected)
    assert {size[1] for size in left} == {16, 32}


@pytest.mark.parametrize("build", [tiny.unet, lambda: tiny.unet(**tiny.XL_UNET)], ids=["SD", "XL"])
def test_free_u_keeps_its_effect(build, offloading):
    model, sample, arguments = build(), noise(2, 4, 9, 7), xl_text(2) if build is not tiny.unet else text(2)
    plain = model(sample, **arguments).sample
    model.enable_freeu(s1=0.6, s2=0.4, b1=1.5, b2=1.6)
    expected = model(sample, **arguments).sample
    assert expected.sub(plain).abs().max() > 1e-3
    left = offloading(model)
    same(model(sample, **arguments).sample, expected)
    assert left


@pytest.mark.parametrize("build", [tiny.unet, lambda: tiny.unet(**tiny.XL_UNET)], ids=["SD", "XL"])
def test_adapters_may_add_to_maps_in_place(build, offloading):
    """What an adapter adds to the end of a block is also added to that block's last skip connection."""
    model, sample, arguments = build(), noise(2, 4, 9, 7), xl_text(2) if build is not tiny.unet else text(2)
    states = {"SD": [(16, 9, 7), (32, 5, 4)], "XL": [(16, 5, 4), (32, 5, 4)]}["SD" if build is tiny.unet else "XL"]

    def adapted():
        given = [noise(2, *size) for size in states]
        return model(sample, **arguments, down_intrablock_additional_residuals=given).sample

    expected = adapted()
    assert expected.sub(model(sample, **arguments).sample).abs().max() > 1e-3
    left = offloading(model)
    same(adapted(), expected)
    assert left


@pytest.mark.parametrize("case", CONTROLNETS)
@pytest.mark.parametrize("serial", [False, True])
def test_a_controlnets_residuals_wait_on_the_host_for_the_unet(case, serial, offloading, serially):
    build, arguments = CONTROLNETS[case]
    control, arguments = build(), arguments(2)
    model, sample, words = tiny.unet(**tiny.XL_UNET) if case == "XL" else tiny.unet(), noise(2, 4, 9, 7), text(2)
    if case == "XL":
        words = xl_text(2)

    def both():
        down, mid = control(sample, **arguments, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return down, model(sample, **words, **residuals).sample

    expected_down, expected = both()
    offloading(control), offloading(model)
    if serial:
        serially(control), serially(model)
    down, actual = both()
    same(actual, expected)
    assert all(isinstance(each, OffMap) and each.away for each in down)
    same([each.whole() for each in down], list(expected_down))


def test_gradients_pass_where_nothing_leaves(offloading):
    model, sample = tiny.unet(), noise(2, 4, 8, 8).requires_grad_()
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(model(sample, **text(2)).sample.square().sum(), sample)
        left = offloading(model)
        (actual,) = torch.autograd.grad(model(sample, **text(2)).sample.square().sum(), sample)
    assert torch.equal(actual, expected)
    assert left == []


def test_on_the_host_nothing_leaves():
    model, sample = tiny.unet(), noise(2, 4, 8, 8)
    expected = model(sample, **text(2)).sample
    seen = []
    model.down_blocks[0].register_forward_hook(lambda _, __, output: seen.extend([output[0], *output[1]]))
    with PatchStack() as stack:
        for path, module, each in offloadings(model, Link()):
            stack.wrap(module, "forward", each, path)
        assert torch.equal(model(sample, **text(2)).sample, expected)
    assert len(seen) == 3 and not any(isinstance(each, OffMap) for each in seen)


def test_a_hook_may_keep_and_read_what_waits(offloading):
    """As tools do that collect features: what they kept is the map, even after it has left."""
    model, sample, kept = tiny.unet(), noise(2, 4, 9, 7), []
    hooked = [model.conv_in, *model.down_blocks, *model.up_blocks]
    for module in hooked:
        module.register_forward_hook(lambda _, __, output: kept.append(output))
    model(sample, **text(2))
    expected, kept[:] = list(kept), []
    offloading(model)
    model(sample, **text(2))
    assert any(isinstance(each, OffMap) for each in kept)
    for actual, wanted in zip(kept, expected, strict=True):
        same([_dense(each) for each in flat_tensors(actual)], flat_tensors(wanted))


def flat_tensors(output):
    return [each for each in flat(output) if isinstance(each, torch.Tensor)]


def _dense(plane):
    return plane.whole() if isinstance(plane, OffMap) else plane


def peaks(build, batch=1, size=64, **options):
    """Most live bytes on accelerator and host during one call of a patched U-Net, weights and arguments aside."""
    with live.fake():
        with torch.device("meta"):
            model, sample, words = build(), torch.empty(batch, 4, size, size), torch.empty(batch, 7, 32)
        pipe = SimpleNamespace(components={"unet": model}, scheduler=None, vae_scale_factor=8)
        options = {"ff_chunk_size": 1024, "attn_full_tokens": 4096} | options
        with LargeResPatch(pipe, 8 * size, 8 * size, **options), live.LiveBytes() as counted:
            output = model(sample, 500, words).sample
            assert (type(output), output.device.type, output.shape) == (type(sample), "meta", sample.shape)
            del output
    assert counted.now["meta"] == 0  # nothing is kept when the call is over
    return counted.peak["meta"], counted.peak["cpu"]


MAP = 16 * 64 * 64 * 4  # bytes of one map of one sample at the finest level


def deeper():
    return tiny.unet(layers_per_block=2)


def test_one_sample_at_a_time_needs_the_memory_of_one():
    one, _ = peaks(tiny.unet)
    three, _ = peaks(tiny.unet, batch=3, unet_serial=True)
    outputs = 3 * 4 * 64 * 64 * 4
    assert one < three <= one + outputs


def test_skip_connections_are_on_the_host_while_they_wait():
    held, none = peaks(deeper)
    light, host = peaks(deeper, unet_offload=True)
    skips = (3 + 1 / 4 + 2 / 2) * MAP  # at the finest level, between the levels, at the level with twice the channels
    assert none < 100  # the timestep
    assert skips <= host <= skips + 2 * MAP  # and the input of the finest up block, which the U-Net holds meanwhile
    # At the peak, in the finest up block, two skip connections wait, one is being read, and that input has left.
    assert light <= held - (2 + 2) * MAP


def test_a_concatenation_costs_its_parts_no_second_time():
    link = Link(band_bytes=MAP // 64)
    with live.fake(), live.LiveBytes() as counted:
        skip = Waiting.on_device(torch.empty(1, 16, 64, 64, device="meta"), link)
        skip.leave()
        joined = torch.cat([torch.empty(1, 16, 64, 64, device="meta"), skip], dim=1)
        assert counted.now["meta"] == MAP
        torch.nn.functional.silu(joined[:, :, 3:5])
        assert counted.peak["meta"] < 1.3 * MAP  # some rows of it
        joined.whole()
        assert counted.peak["meta"] < 3.1 * MAP  # the part on the device is copied
        assert counted.now["meta"] == 2 * MAP  # and then gone


def test_strips_read_what_waits_row_by_row(monkeypatch):
    model, sample, link, whole = deeper(), noise(2, 4, 17, 6), Link("cpu:0", band_bytes=1500), []
    expected = model(sample, **text(2)).sample
    monkeypatch.setattr(Joined, "whole", lambda self, real=Joined.whole: whole.append(self.shape) or real(self))
    monkeypatch.setattr(
        Joined, "rows", lambda self, *cut, real=Joined.rows: read.append(self.shape) or real(self, *cut)
    )
    read = []
    with PatchStack() as stack:
        for path, module, each in unet_replacements(model, Strips(4, wrap=False), "unet"):
            stack.wrap(module, "forward", each, path)
        for path, module, each in offloadings(model, link):
            stack.wrap(module, "forward", each, path)
        same(model(sample, **text(2)).sample, expected)
    assert read and not whole


@pytest.mark.parametrize("serial", [False, True])
@pytest.mark.parametrize("strips", [False, True])
def test_copies_on_streams_of_their_own_are_waited_for(strips, serial, monkeypatch):
    """As on CUDA, on streams that are played; in strips, which read ahead of what they need."""
    model, sample, link = deeper(), noise(2, 4, 17, 6), Link("cpu:0", band_bytes=1500)
    arguments = text(2)
    expected = model(sample, **arguments).sample
    unkept, side = streams.play(monkeypatch), streams.Stream()
    monkeypatch.setattr(link, "_side", lambda device: side)
    with PatchStack() as stack:
        if serial:
            stack.wrap(model, "forward", SerialBatch(model), "unet")
        if strips:
            for path, module, each in unet_replacements(model, Strips(4, wrap=False), "unet"):
                stack.wrap(module, "forward", each, path)
        for path, module, each in offloadings(model, link):
            stack.wrap(module, "forward", each, path)
        for _ in range(2):
            same(model(sample, **arguments).sample, expected)
    assert not unkept


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: copies run on a stream of their own there")
@pytest.mark.parametrize("serial", [False, True])
def test_on_cuda_skip_connections_leave_and_return(serial):
    model = tiny.unet(block_out_channels=(64, 128), layers_per_block=2).cuda()
    sample, words = noise(2, 4, 256, 192).cuda(), noise(2, 7, 32).cuda()
    pipe = SimpleNamespace(components={"unet": model}, scheduler=None, vae_scale_factor=8)
    options = {"attn_full_tokens": 2**20, "unet_serial": serial}
    results, used = {}, {}
    for offload in (False, True):
        with LargeResPatch(pipe, 192 * 8, 256 * 8, unet_offload=offload, **options):
            for _ in range(3):  # memory of earlier steps is used again, before and after its copies are done
                torch.cuda.reset_peak_memory_stats()
                results[offload] = model(sample, 500, words).sample
                used[offload] = torch.cuda.max_memory_allocated()
    torch.testing.assert_close(results[True], results[False], rtol=1e-3, atol=1e-4)  # TF32 convolutions
    assert used[True] < 0.8 * used[False]
