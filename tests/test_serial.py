"""A batch in turns gives what the batch gives, whatever it is called with."""

import pytest
import torch
from diffusers import Transformer2DModel, UNetMotionModel
from diffusers.models.attention_processor import AttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0
from diffusers.models.controlnets.controlnet import ControlNetOutput
from hypothesis import given, settings
from hypothesis import strategies as st

import live
import tiny
from calls import CONTROLNETS, UNETS, adapter_states, assert_same, flat, noise, residuals, text
from largerespatch.core.maps import StoredMap
from largerespatch.core.patching import PatchStack
from largerespatch.core.pieces import rehearsal
from largerespatch.techniques.serial import SerialBatch


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
    assert_same(model(sample, **arguments).sample, expected)
    assert_same(model(sample=sample, return_dict=False, **arguments), (expected,))
    assert sizes == [1] * 2 * batch


def test_adapter_states_are_split_and_left_in_the_callers_list(serially):
    model, sample = tiny.unet(), noise(3, 4, 9, 7)
    expected = model(sample, **text(3), **adapter_states(3, 9, 7)).sample
    assert expected.sub(model(sample, **text(3)).sample).abs().max() > 1e-3
    serially(model)
    states = adapter_states(3, 9, 7)
    assert_same(model(sample, **text(3), **states).sample, expected)
    assert len(states["down_intrablock_additional_residuals"]) == 2


def test_every_argument_may_be_positional(serially):
    model, sample, extra = tiny.unet(), noise(2, 4, 8, 8), residuals(2, 8, 8)
    arguments = (sample, 500, noise(2, 7, 32), None, None, None, None, None, *extra.values())
    expected = model(*arguments).sample
    sizes = serially(model)
    assert_same(model(*arguments).sample, expected)
    assert sizes == [1, 1]


@pytest.mark.parametrize("case", CONTROLNETS)
@pytest.mark.parametrize("batch", [2, 3])
def test_a_controlnet_serially_is_the_controlnet(case, batch, serially):
    build, arguments = CONTROLNETS[case]
    model, sample, arguments = build(), noise(batch, 4, 9, 7), arguments(batch)
    expected = model(sample, **arguments, return_dict=False)
    sizes = serially(model)
    assert_same(model(sample, **arguments, return_dict=False), expected)
    assert sizes == [1] * batch
    if case != "several":  # upstream takes tuples only
        output = model(sample, **arguments)
        assert isinstance(output, ControlNetOutput)
        assert_same(output.to_tuple(), expected)


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
    assert_same(model(sample, 500, words).sample, expected)
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
    assert_same(model(sample, **arguments).sample, expected)
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


@settings(max_examples=16)
@given(trees, st.sampled_from([1, 2, 3]))
def test_what_is_taken_apart_by_sample_can_be_put_together(tree, batch):
    serial = SerialBatch(torch.nn.Module())
    result = serial(lambda sample, argument: {"tree": argument}, torch.zeros(batch), tree)
    for actual, expected in zip(flat(result["tree"]), flat(tree), strict=True):
        if isinstance(expected, torch.Tensor) and expected.ndim and len(expected) % batch:
            expected = torch.cat([expected] * batch)  # concerned every sample, whole
        assert torch.equal(actual, expected) if isinstance(expected, torch.Tensor) else actual == expected


def test_results_take_their_memory_once():
    def make(sample):
        return {"sample": torch.ones(1, 1000), "more": (2 * torch.ones(1, 1000), [None, 0.5])}

    with live.LiveBytes() as counted:
        result = SerialBatch(torch.nn.Module())(make, torch.zeros(8, 1))
    assert result["sample"].shape == (8, 1000) and result["more"][1] == [None, 0.5]
    assert counted.peak["cpu"] < 4000 * (2 * 8 + 6)  # and a few of one sample


def test_a_rehearsal_runs_few_samples_and_has_all_results():
    seen = []
    with rehearsal():
        waiting = StoredMap.of(noise(1, 2, 3, 4))
        run = lambda sample: seen.append(sample) or (sample, waiting)  # noqa: E731
        result = SerialBatch(torch.nn.Module())(run, torch.zeros(50, 3))
    assert result[0].shape == (50, 3) and result[1].shape == (50, 2, 3, 4)
    assert len(seen) < 6
