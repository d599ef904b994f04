"""Blocked attention against its oracle: dense attention under a mask that joins the tokens of one tile."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    SlicedAttnAddedKVProcessor,
    SlicedAttnProcessor,
)
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from largerespatch.core.maps import StoredMap
from largerespatch.core.patching import PatchStack
from largerespatch.core.statistics import GivenStatistics, record
from largerespatch.core.tilings import COVERS, sampled_cells
from largerespatch.techniques import attention as attention_room
from largerespatch.techniques.attention import BlockedAttention, Blocking, ChunkedAttention
from largerespatch.techniques.context import Context, Judges
from largerespatch.techniques.notes import MapNote, MapNoting, StepNote

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
    around = BlockedAttention(module, blocking, StepNote(step), layer, MapNote((height, width)))
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


def test_a_whole_transformer_is_blocked_at_each_size_it_is_given():
    torch.manual_seed(0)
    model = Transformer2DModel(2, 8, in_channels=16, norm_num_groups=4, cross_attention_dim=8).eval()
    note, lengths = MapNote(), []
    attn1 = model.transformer_blocks[0].attn1
    with PatchStack() as stack:
        stack.wrap(model, "forward", MapNoting(note, 1), "transformer.forward")
        attn1.to_q.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
        around = BlockedAttention(attn1, Blocking("tile", 4, 4, 20), StepNote(), 0, note)
        stack.wrap(attn1, "forward", around, "attn1.forward")
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


def pooled(context, module, x, size, seed, prepare=lambda tokens: tokens):
    """By the definition, one cell after another: its token, and its weight if all of its members are outside."""

    def heads(project, norm, tokens):
        split = project(prepare(tokens)).unflatten(-1, (module.heads, -1)).transpose(1, 2)
        return split if norm is None else norm(split)

    judges = list(sampled_cells(*size, 128, f"{seed} judges"))
    query, key = heads(module.to_q, module.norm_q, x)[:, :, judges], heads(module.to_k, module.norm_k, x)
    total = (query @ key.mT * module.scale).logsumexp(dim=-1, keepdim=True)

    def shares(key):
        return (query @ key.mT * module.scale - total).exp().mean(dim=(1, 2))

    tokens, together, share = torch.zeros_like(context.tokens), torch.zeros(context.tokens.shape[:2]), shares(key)
    for i, cells in enumerate(context.cells):
        for cell in cells.unique():
            members = cells == cell
            parts = (share[i, members] * len(cells)).clamp(min=0.01) ** 1.5
            tokens[i, cell] = (parts[:, None] * x[i, members]).sum(dim=0) / parts.sum()
            together[i, cell] = share[i, members].sum()
    return tokens, (together / shares(heads(module.to_k, module.norm_k, tokens))).log()


def context_mask(context, weights, height, width, tiling):
    """Which token counts for which, ``[B, 1, Q, K + S]``: for itself, or those of the context for their members."""
    batch, cells = weights.shape
    mask = torch.full((batch, 1, height * width, height * width + cells), -torch.inf)
    places = torch.arange(height * width).view(height, width)
    for tile in tiling:
        own = places[tile.rows, tile.columns].flatten()
        mask[:, :, own[:, None], own] = 0
        for i in range(batch):
            outside = torch.ones(height * width, dtype=torch.bool)
            outside[own] = False
            count = torch.bincount(context.cells[i], minlength=cells)
            left = torch.bincount(context.cells[i][outside], minlength=cells)
            mask[i, :, own, height * width :] = weights[i] + (left / count.clamp(min=1)).log()
    return mask


def context_oracle(module, x, height, width, blocking, phase, seed):
    context = Context(module, x, (height, width), blocking.context, seed)
    tokens, weights = pooled(context, module, x, (height, width), seed)
    torch.testing.assert_close(context.tokens[context.counts > 0], tokens[context.counts > 0], rtol=1e-4, atol=1e-5)
    both = torch.cat([x, tokens], dim=1)
    mask = context_mask(context, weights, height, width, blocking.cover(height, width, phase))
    heads = (
        projection(given).unflatten(-1, (2, 8)).transpose(1, 2)
        for projection, given in ((module.to_q, x), (module.to_k, both), (module.to_v, both))
    )
    result = F.scaled_dot_product_attention(*heads, attn_mask=mask)
    return module.to_out[0](result.transpose(1, 2).flatten(2))


@given(
    st.sampled_from(sorted(COVERS)),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(1, 200),
    st.integers(0, 3),
)
def test_context_equals_dense_attention_under_its_weights(shape, height, width, size, tokens, phase):
    blocking, module = Blocking(shape, size, size + 1, full_tokens=0, context=tokens), attention()
    x = torch.randn(2, height * width, 16)
    with PatchStack() as stack:
        blocked(stack, module, height, width, blocking, step=phase)
        result = module(x)
    expected = context_oracle(module, x, height, width, blocking, phase, f"layer 0 step {phase}")
    torch.testing.assert_close(result, expected, **ROUNDING)


@pytest.mark.parametrize(
    "processor", [AttnProcessor(), AttnProcessor2_0(), FusedAttnProcessor2_0(), SlicedAttnProcessor(1)]
)
def test_every_processor_attends_to_the_context(processor):
    module, x = attention(), 4 * torch.randn(2, 63, 16)
    module.fuse_projections()
    module.set_processor(processor)
    blocking = Blocking("brick", 3, 3, full_tokens=1, context=12)
    with PatchStack() as stack:
        blocked(stack, module, 7, 9, blocking, step=1)
        result = module(x)
    torch.testing.assert_close(result, context_oracle(module, x, 7, 9, blocking, 1, "layer 0 step 1"), **ROUNDING)


@pytest.mark.parametrize(
    ("processor", "attended"), [(PAGIdentitySelfAttnProcessor2_0(), 1), (PAGCFGIdentitySelfAttnProcessor2_0(), 2)]
)
def test_the_context_reaches_the_unperturbed_part_of_perturbed_attention_guidance(processor, attended):
    module, x = attention(processor=processor), torch.randn(attended + 1, 63, 16)
    blocking = Blocking("brick", 3, 3, full_tokens=1, context=12)
    unblocked = module(x)
    with PatchStack() as stack:
        blocked(stack, module, 7, 9, blocking, step=1)
        result = module(x)
    expected = context_oracle(module, x, 7, 9, blocking, 1, "layer 0 step 1")
    torch.testing.assert_close(result[:attended], expected[:attended], **ROUNDING)
    torch.testing.assert_close(result[attended:], unblocked[attended:], **ROUNDING)


def test_a_processor_that_cannot_be_told_the_weights_sees_the_blocks_alone():
    def processor(attention, hidden_states, encoder_hidden_states=None, attention_mask=None):
        scores = attention.to_q(hidden_states) @ attention.to_k(hidden_states).transpose(1, 2)
        return scores.softmax(dim=-1) @ attention.to_v(hidden_states)

    module, x = attention(processor=processor), torch.randn(2, 63, 16)
    results = []
    for context in (0, 12):
        with PatchStack() as stack:
            blocked(stack, module, 7, 9, Blocking("brick", 3, 3, full_tokens=1, context=context))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                results.append(module(x))
                module(x)
            # Once, and only where there is a context.
            assert [str(warning.message)[:22] for warning in caught] == ["attn_context: function"] * (context > 0)
    assert torch.equal(*results)


def test_cells_are_of_like_keys_wherever_they_lie():
    """Four kinds of tokens, scattered over the map, and as many tokens of the context, of which some are of a kind."""
    module, kinds = attention(), 3 * torch.randn(4, 16)
    kind = torch.randint(4, (2, 400))
    x = kinds[kind] + 0.01 * torch.randn(2, 400, 16)
    context = Context(module, x, (20, 20), 16, "a")
    for i in range(2):
        for cell in context.cells[i].unique():
            assert len(kind[i][context.cells[i] == cell].unique()) == 1
    centers = module.to_k(x)[:, list(sampled_cells(20, 20, 16, "a centers"))]
    distances = torch.cdist(module.to_k(x), centers)
    own = distances.gather(2, context.cells[..., None].long())
    assert (own <= distances.amin(dim=2, keepdim=True) + 1e-4).all()


@pytest.mark.parametrize("qk_norm", [None, "layer_norm"])
def test_what_tokens_get_is_counted_over_judges_and_heads(qk_norm, monkeypatch):
    """With everyone in the crowd it is what attention gives them, and adds up however the map is cut for it."""
    module, x, judges = attention(qk_norm=qk_norm), 2 * torch.randn(2, 100, 16), torch.arange(40)
    if qk_norm:
        module.norm_q.weight.data = 4 * torch.rand(8)
    query, key = ((p(x)).unflatten(-1, (2, 8)).transpose(1, 2) for p in (module.to_q, module.to_k))
    query, key = (query, key) if qk_norm is None else (module.norm_q(query), module.norm_k(key))
    wants = (query[:, :, :40] @ key.mT / 8**0.5).softmax(-1).mean(dim=(1, 2))
    found = Judges(module, x, judges, torch.arange(100))
    torch.testing.assert_close(found.shares(found.keys(x)), wants)
    whole = Context(module, x, (10, 10), 12, "a")
    monkeypatch.setattr("largerespatch.techniques.context.SCORES", 2 * 2 * 100 * 17)
    parts = Context(module, x, (10, 10), 12, "a")
    assert torch.equal(whole.cells, parts.cells) and torch.equal(whole.counts, parts.counts)
    torch.testing.assert_close(whole.tokens, parts.tokens)
    torch.testing.assert_close(whole.correction, parts.correction)


def test_what_gets_no_attention_at_all_does_no_harm():
    """Scores so far apart that shares underflow."""
    module, x = attention(), 300 * torch.randn(1, 144, 16)
    expected = module(x)
    for count in (12, 288):
        with PatchStack() as stack:
            blocked(stack, module, 12, 12, Blocking("brick", 4, 4, 16, context=count))
            result = module(x)
        assert result.isfinite().all()
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-2)


def test_context_nears_dense_attention():
    """Neighbours that are alike, a few tokens that all want: as in trained networks."""
    module = attention()
    small = torch.randn(1, 16, 4, 4)
    x = F.interpolate(small, size=(24, 24), mode="bilinear").flatten(2).transpose(1, 2) * 3
    expected, errors = module(x), []
    for tokens in (0, 16, 64, 256):
        with PatchStack() as stack:
            blocked(stack, module, 24, 24, Blocking("brick", 4, 4, full_tokens=1, context=tokens))
            errors.append((module(x) - expected).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 30


def test_context_is_per_sample_and_the_same_whatever_ran_before():
    module, x = attention(), torch.randn(3, 144, 16)
    with PatchStack() as stack:
        blocked(stack, module, 12, 12, Blocking("brick", 4, 4, 16, context=20), step=2)
        together = module(x)
        torch.rand(7)
        alone = torch.cat([module(sample[None]) for sample in x])
    torch.testing.assert_close(alone, together, **ROUNDING)


def test_context_keeps_half_precision_near_its_float32_result():
    module, x = attention(), torch.randn(2, 144, 16)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        with PatchStack() as stack:
            blocked(stack, module.to(dtype), 12, 12, Blocking("tile", 4, 4, 16, context=20))
            results.append(module(x.to(dtype)))
    assert results[1].dtype == torch.bfloat16
    torch.testing.assert_close(results[1].float(), results[0], rtol=0.05, atol=0.03)


def test_qk_norms_and_gradients_hold_with_context():
    with torch.enable_grad():
        module, x = attention(qk_norm="layer_norm"), torch.randn(1, 144, 16, requires_grad=True)
        with PatchStack() as stack:
            blocked(stack, module, 12, 12, Blocking("brick", 4, 4, 16, context=288))
            result = module(x)
        # With everything in the context nothing is approximate.
        expected = module(x)
        torch.testing.assert_close(result, expected, **ROUNDING)
        gradients = [torch.autograd.grad(each.square().sum(), x)[0] for each in (result, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


class Masked(TorchFunctionMode):
    """Dense attention under a mask over a map's tokens, after `text` others that everyone sees.

    `more` are keys and values that the mask knows besides, after those of the map.
    """

    def __init__(self, mask, text=0, more=()):
        super().__init__()
        self.mask = F.pad(mask, (text, 0))
        self.more = more

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, *given = args
            args = (
                (query, *(torch.cat(both, dim=2) for both in zip(given, self.more, strict=True))) if self.more else args
            )
            kwargs = kwargs | {"attn_mask": self.mask}
        return func(*args, **(kwargs or {}))


def block_mask(height, width, tiling):
    owner = torch.empty(height, width, dtype=torch.long)
    for i, tile in enumerate(tiling):
        owner[tile.rows, tile.columns] = i
    same = owner.flatten()[:, None] == owner.flatten()[None, :]
    return torch.zeros(same.shape).masked_fill(~same, -torch.inf)


def map_attention(processor=None, text=False, **options):
    """As in Kandinsky's U-Net with text, as in a U-Net without text otherwise."""
    options |= {"added_kv_proj_dim": 12, "cross_attention_dim": 16, "bias": True} if text else {}
    module = attention(norm_num_groups=4, residual_connection=True, **options)
    module.set_processor(processor or (AttnAddedKVProcessor2_0 if text else AttnProcessor2_0)())
    return module


def blocked_map(stack, module, blocking, step=0):
    stack.wrap(module, "forward", BlockedAttention(module, blocking, StepNote(step), 0), "attention.forward")


@pytest.mark.parametrize("text", [False, True])
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 5), st.integers(0, 3))
def test_attention_to_a_map_equals_dense_attention_under_its_block_mask(text, height, width, size, phase):
    """With the group statistics of the whole map, and text for every tile."""
    blocking, module = Blocking("brick", size, size + 1, full_tokens=3), map_attention(text=text)
    x = torch.randn(2, 16, height, width) + torch.linspace(-3, 3, width)  # tiles alone would be normalized otherwise
    prompt = {"encoder_hidden_states": torch.randn(2, 5, 12)} if text else {}
    with Masked(block_mask(height, width, blocking.cover(height, width, phase)), 5 if text else 0):
        expected = module(x, **prompt)
    with PatchStack() as stack:
        blocked_map(stack, module, blocking, step=phase)
        torch.testing.assert_close(module(x, **prompt), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("passing", [False, True])
def test_context_of_a_map_equals_dense_attention_under_its_weights(text, passing):
    """With keys normalized as the whole map is. A map that was passed on is written over."""
    blocking, module = Blocking("brick", 3, 4, full_tokens=3, context=20), map_attention(text=text)
    x = torch.randn(2, 16, 9, 8) + torch.linspace(-3, 3, 8)
    statistics = record(x, 4)

    def prepare(tokens):
        with GivenStatistics(statistics):
            return module.group_norm(tokens.transpose(1, 2)).transpose(1, 2)

    tokens = x.flatten(2).transpose(1, 2)
    context = Context(module, tokens, (9, 8), 20, "layer 0 step 1", prepare)
    joined, weights = pooled(context, module, tokens, (9, 8), "layer 0 step 1", prepare)
    prompt = {"encoder_hidden_states": torch.randn(2, 5, 12)} if text else {}
    more = [project(prepare(joined)).unflatten(-1, (2, 8)).transpose(1, 2) for project in (module.to_k, module.to_v)]
    with Masked(context_mask(context, weights, 9, 8, blocking.cover(9, 8, 1)), 5 if text else 0, more):
        expected = module(x, **prompt)
    with PatchStack() as stack:
        blocked_map(stack, module, blocking, step=1)
        result = module(StoredMap.of(x, passing=True) if passing else x, **prompt)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert (result.data_ptr() == x.data_ptr()) == passing


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


def chunked_map(monkeypatch, stack, module, queries=10):
    """Returns a list that the number of queries of each call is noted in."""
    monkeypatch.setattr(attention_room, "QUERIES", queries)
    seen = []
    module.to_q.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[-2]))
    stack.wrap(module, "forward", ChunkedAttention(module), "attention.forward")
    return seen


@pytest.mark.parametrize("processor", [AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(1)])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "part of a wider map"])
def test_attention_to_a_whole_map_in_chunks_of_queries_is_dense_attention(monkeypatch, processor, layout):
    module, x = map_attention(processor), torch.randn(2, 16, 9, 7) + torch.linspace(-3, 3, 7)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "part of a wider map":
        x = F.pad(x, (1, 0))[..., 1:]
    expected = module(x.clone(), temb=None)
    with PatchStack() as stack:
        seen = chunked_map(monkeypatch, stack, module)
        result = module(x, temb=None)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert seen == [7] * 9


@pytest.mark.parametrize(("queries", "chunks"), [(63, [63]), (28, [21] * 3), (20, [7] + [14] * 4), (4, [3, 4] * 9)])
def test_no_chunk_has_more_queries_than_allowed(monkeypatch, queries, chunks):
    module, x = map_attention(), torch.randn(1, 16, 9, 7)
    expected = module(x)
    with PatchStack() as stack:
        seen = chunked_map(monkeypatch, stack, module, queries)
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert seen == chunks


def test_chunks_of_a_map_that_was_passed_on_are_written_over_it(monkeypatch):
    module, x = map_attention(), torch.randn(2, 16, 9, 7)
    expected = module(x)
    with PatchStack() as stack:
        chunked_map(monkeypatch, stack, module)
        result = module(StoredMap.of(x, passing=True))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert result.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("case", ["small", "cross", "text", "gradients", "own processor"])
def test_other_calls_with_a_whole_map_are_passed_on_as_they_are(monkeypatch, case):
    module, x = map_attention(text=case == "text"), torch.randn(1, 16, 9, 7)
    prompts = {"cross": torch.randn(1, 5, 16), "text": torch.randn(1, 5, 12)}
    arguments = {"encoder_hidden_states": prompts[case]} if case in prompts else {}
    if case == "own processor":
        module.set_processor(lambda attention, hidden_states, **_: 2 * attention.to_q(hidden_states.flatten(2).mT))
    with torch.set_grad_enabled(case == "gradients"), PatchStack() as stack:
        expected = module(x, **arguments)
        seen = chunked_map(monkeypatch, stack, module, queries=63 if case == "small" else 10)
        assert torch.equal(module(x, **arguments), expected)
    assert seen == [63]
