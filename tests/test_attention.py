"""Blocked attention against its oracle: dense attention under a mask that joins the tokens of one tile."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnAddedKVProcessor,
    SlicedAttnProcessor,
)
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from largerespatch.attention import (
    COVERS,
    BlockedAttention,
    BlockedMapAttention,
    Blocking,
    MapNote,
    MapNoting,
    StepNote,
)
from largerespatch.patching import PatchStack

# Softmax over the same tokens, summed in another order.
ROUNDING = {"rtol": 1e-5, "atol": 2e-6}


def attention(**options):
    torch.manual_seed(0)
    return Attention(query_dim=16, heads=2, dim_head=8, **options)


def oracle(module, x, height, width, tiling):
    owner = torch.empty(height, width, dtype=torch.long)
    for i, tile in enumerate(tiling):
        owner[tile.rows, tile.columns] = i
    owner = owner.flatten()
    heads = (
        projection(x).unflatten(-1, (2, 8)).transpose(1, 2) for projection in (module.to_q, module.to_k, module.to_v)
    )
    result = F.scaled_dot_product_attention(*heads, attn_mask=owner[:, None] == owner[None, :])
    return module.to_out[0](result.transpose(1, 2).flatten(2))


def blocked(stack, module, height, width, blocking, step=0, layer=0):
    around = BlockedAttention(blocking, MapNote((height, width)), StepNote(step), layer)
    stack.wrap(module, "forward", around, "attn1.forward")


@given(st.sampled_from(sorted(COVERS)), st.integers(1, 17), st.integers(1, 17), st.integers(1, 9), st.integers(0, 3))
def test_each_phase_equals_dense_attention_under_its_block_mask(shape, height, width, size, phase):
    blocking, module = Blocking(shape, size, size + 1, full_tokens=4), attention()
    x = torch.randn(2, height * width, 16)
    if height * width <= 4:
        expected = oracle(module, x, height, width, COVERS[shape](height, width, 0, height, width))
    else:
        expected = oracle(module, x, height, width, blocking.cover(height, width, phase))
    with PatchStack() as stack:
        blocked(stack, module, height, width, blocking, step=phase)
        torch.testing.assert_close(module(x), expected, **ROUNDING)


@pytest.mark.parametrize("processor", [AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(1)])
def test_every_processor_runs_per_tile(processor):
    module = attention(processor=processor)
    blocking, x = Blocking("brick", 3, 3, full_tokens=1), torch.randn(2, 63, 16)
    expected = oracle(module, x, 7, 9, blocking.cover(7, 9, 1))
    with PatchStack() as stack:
        blocked(stack, module, 7, 9, blocking, step=1)
        torch.testing.assert_close(module(x), expected, **ROUNDING)


def test_no_call_attends_to_more_than_a_brick():
    blocking, module, seen = Blocking("brick", 4, 4, full_tokens=16), attention(), []
    module.to_q.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    with PatchStack() as stack:
        blocked(stack, module, 16, 16, blocking)
        module(torch.randn(1, 256, 16))
    assert max(seen) == 32
    assert sum(seen) == 256


def test_layers_and_steps_take_turns():
    """Contract 4: what tiling a layer sees follows from layer and step; consecutive ones differ."""
    blocking, module, x = Blocking("brick", 4, 4, 16), attention(), torch.randn(1, 144, 16)
    phases = [oracle(module, x, 12, 12, blocking.cover(12, 12, phase)) for phase in range(4)]
    for layer in range(3):
        for step in range(6):
            with PatchStack() as stack:
                blocked(stack, module, 12, 12, blocking, step, layer)
                result = module(x)
            errors = [(result - phase).abs().max().item() for phase in phases]
            assert errors.index(min(errors)) == (layer + step) % 4
            assert min(errors) < 1e-5 < sorted(errors)[1]


UNBLOCKED = {
    "cross-attention": lambda x: {"encoder_hidden_states": x[:, :50]},
    "cross-attention as long as the map": lambda x: {"encoder_hidden_states": x.flip(1)},
    "a mask": lambda x: {"attention_mask": torch.zeros(1, 1, x.shape[1])},
}


@pytest.mark.parametrize("arguments", UNBLOCKED.values(), ids=UNBLOCKED)
def test_other_calls_are_passed_on_as_they_are(arguments):
    module, x = attention(), torch.randn(1, 144, 16)
    expected = module(x, **arguments(x))
    with PatchStack() as stack:
        blocked(stack, module, 12, 12, Blocking("brick", 4, 4, 16))
        assert not torch.allclose(module(x), expected, atol=1e-3)  # the same tokens, called otherwise, are blocked
        assert torch.equal(module(x, **arguments(x)), expected)


@pytest.mark.parametrize("shape", [(1, 143, 16), (1, 16, 12, 12)])
def test_tokens_that_are_not_the_noted_map_are_attended_whole(shape):
    module = attention(residual_connection=True)
    x = torch.randn(shape)
    expected = module(x)
    with PatchStack() as stack:
        blocked(stack, module, 12, 12, Blocking("brick", 4, 4, 16))
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize(("full_tokens", "whole"), [(144, True), (143, False)])
def test_maps_of_at_most_full_tokens_are_attended_whole(full_tokens, whole):
    module, x = attention(), torch.randn(1, 144, 16)
    expected = module(x)
    with PatchStack() as stack:
        blocked(stack, module, 12, 12, Blocking("brick", 4, 4, full_tokens))
        assert torch.equal(module(x), expected) == whole


@pytest.mark.parametrize(("patch_size", "size"), [(1, (10, 6)), (2, (5, 3))])
def test_a_transformer_notes_the_map_that_it_is_given(patch_size, size):
    note = MapNote()
    noting = MapNoting(note, patch_size)
    assert noting(lambda hidden_states, scale: hidden_states * scale, torch.ones(1, 2, 10, 6), scale=3).mean() == 3
    assert note.size == size


def test_a_whole_transformer_is_blocked_at_each_size_it_is_given():
    torch.manual_seed(0)
    model = Transformer2DModel(2, 8, in_channels=16, norm_num_groups=4, cross_attention_dim=8).eval()
    note, lengths = MapNote(), []
    attn1 = model.transformer_blocks[0].attn1
    with PatchStack() as stack:
        stack.wrap(model, "forward", MapNoting(note, 1), "transformer.forward")
        attn1.to_q.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
        stack.wrap(attn1, "forward", BlockedAttention(Blocking("tile", 4, 4, 20), note, StepNote(), 0), "attn1.forward")
        for height, width in [(5, 4), (8, 8), (7, 3)]:
            model(torch.randn(1, 16, height, width), encoder_hidden_states=torch.randn(1, 3, 8))
    assert lengths == [20, 16, 16, 16, 16, 9, 12]


def test_blocked_attention_is_differentiable():
    with torch.enable_grad():
        module, x = attention(), torch.randn(1, 144, 16, requires_grad=True)
        blocking = Blocking("brick", 4, 4, 16)
        (expected,) = torch.autograd.grad(oracle(module, x, 12, 12, blocking.cover(12, 12, 0)).square().sum(), x)
        with PatchStack() as stack:
            blocked(stack, module, 12, 12, blocking)
            (gradient,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


class SeeingOwnTile(TorchFunctionMode):
    """Dense attention over a map's tokens, after `text` others, under the mask of a tiling."""

    def __init__(self, height, width, tiling, text):
        super().__init__()
        owner = torch.empty(height, width, dtype=torch.long)
        for i, tile in enumerate(tiling):
            owner[tile.rows, tile.columns] = i
        same = owner.flatten()[:, None] == owner.flatten()[None, :]
        self.mask = torch.cat([torch.ones(height * width, text, dtype=torch.bool), same], dim=1)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            kwargs = kwargs | {"attn_mask": self.mask}
        return func(*args, **(kwargs or {}))


def map_attention(processor=None, text=False, **options):
    """As in Kandinsky's U-Net with text, as in a U-Net without text otherwise."""
    options |= {"added_kv_proj_dim": 12, "cross_attention_dim": 16, "bias": True} if text else {}
    module = attention(norm_num_groups=4, residual_connection=True, **options)
    module.set_processor(processor or (AttnAddedKVProcessor2_0 if text else AttnProcessor2_0)())
    return module


def blocked_map(stack, module, blocking, step=0):
    stack.wrap(module, "forward", BlockedMapAttention(blocking, module, StepNote(step), 0), "attention.forward")


@pytest.mark.parametrize("text", [False, True])
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 5), st.integers(0, 3))
def test_attention_to_a_map_equals_dense_attention_under_its_block_mask(text, height, width, size, phase):
    """With the group statistics of the whole map, and text for every tile."""
    blocking, module = Blocking("brick", size, size + 1, full_tokens=3), map_attention(text=text)
    x = torch.randn(2, 16, height, width) + torch.linspace(-3, 3, width)  # tiles alone would be normalized otherwise
    prompt = {"encoder_hidden_states": torch.randn(2, 5, 12)} if text else {}
    with SeeingOwnTile(height, width, blocking.cover(height, width, phase), 5 if text else 0):
        expected = module(x, **prompt)
    with PatchStack() as stack:
        blocked_map(stack, module, blocking, step=phase)
        torch.testing.assert_close(module(x, **prompt), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "processor", [AttnAddedKVProcessor(), AttnAddedKVProcessor2_0(), SlicedAttnAddedKVProcessor(1)]
)
def test_every_processor_of_maps_runs_per_tile(processor):
    x, prompt = torch.randn(2, 16, 7, 9), torch.randn(2, 5, 12)
    blocking = Blocking("tile", 3, 3, 9)
    expected = map_attention(AttnAddedKVProcessor2_0(), text=True)
    with PatchStack() as stack:
        blocked_map(stack, expected, blocking)
        expected = expected(x, encoder_hidden_states=prompt)
    with PatchStack() as stack:
        module = map_attention(processor, text=True)
        assert not torch.allclose(module(x, encoder_hidden_states=prompt), expected, atol=1e-3)
        blocked_map(stack, module, blocking)
        torch.testing.assert_close(module(x, encoder_hidden_states=prompt), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (False, {"encoder_hidden_states": torch.zeros(1, 5, 16)}),
        (True, {"encoder_hidden_states": torch.zeros(1, 5, 12), "attention_mask": torch.zeros(1, 1, 5)}),
    ],
    ids=["cross-attention", "a mask"],
)
def test_other_calls_with_a_map_are_passed_on_as_they_are(text, arguments):
    module, x = map_attention(text=text), torch.randn(1, 16, 7, 9)
    expected = module(x, **arguments)
    with PatchStack() as stack:
        blocked_map(stack, module, Blocking("tile", 3, 3, 9))
        assert torch.equal(module(x, **arguments), expected)
