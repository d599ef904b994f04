"""Blocked attention against its oracle: dense attention under a mask that joins the tokens of one tile."""

import math
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

from largerespatch.core.bands import Band
from largerespatch.core.maps import StoredMap
from largerespatch.core.patching import PatchStack
from largerespatch.core.statistics import GivenStatistics, record
from largerespatch.core.tilings import COVERS, Tile
from largerespatch.techniques.attention import calibration
from largerespatch.techniques.attention import chunked_attention as attention_room
from largerespatch.techniques.attention import context as context_room
from largerespatch.techniques.attention import tile_attention as tile_room
from largerespatch.techniques.attention.blocked import BlockedAttention, Blocking
from largerespatch.techniques.attention.chunked_attention import ChunkedAttention
from largerespatch.techniques.attention.context import Context, Heads, drawn, lots, wanted_tokens
from largerespatch.techniques.notes import MapNote, MapNoting, StepNote

# Softmax over the same tokens, summed in another order.
ROUNDING = {"rtol": 1e-5, "atol": 2e-6}


def attention(**options):
    torch.manual_seed(0)
    return Attention(query_dim=16, heads=2, dim_head=8, **options)


def with_heads(module, x):
    """Queries, keys and values."""
    return (
        projection(x).unflatten(-1, (2, 8)).transpose(1, 2) for projection in (module.to_q, module.to_k, module.to_v)
    )


def oracle(module, x, height, width, tiling):
    owner = torch.empty(height, width, dtype=torch.long)
    for i, tile in enumerate(tiling):
        owner[tile.rows, tile.columns] = i
    owner = owner.flatten()
    result = F.scaled_dot_product_attention(*with_heads(module, x), attn_mask=owner[:, None] == owner[None, :])
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


def context_mask(context, batch, height, width, tiling):
    """Which token counts for which, ``[B, 1, Q, K]``: for itself or for others, or not at all."""
    mask = torch.full((batch, 1, height * width, height * width), -torch.inf)
    for tile in tiling:
        own = {row * width + column for row in range(height)[tile.rows] for column in range(width)[tile.columns]}
        for i, places in enumerate((context.rows * width + context.columns).tolist()):
            counts = dict(zip(places, context.counts(tile)[i].tolist(), strict=True))
            assert len(counts) == len(places)  # no token is there twice
            assert own & set(places) == {place for place, count in counts.items() if count == 0}
            sampled = [count for count in counts.values() if count > 1]
            assert not sampled or abs(sum(counts.values()) + len(own) - height * width) < 1e-3
            for query in own:
                mask[i, 0, query, sorted(own)] = 0
                for place in set(places) - own:
                    mask[i, 0, query, place] = math.log(counts[place])
    return mask


def context_oracle(module, x, height, width, blocking, phase, seed, corrected=True):
    context = Context(module, x, (height, width), blocking.context, seed)
    query, key, value = with_heads(module, x)
    result = torch.empty_like(query)
    chosen = (context.rows * width + context.columns)[:, None, :, None].expand(-1, 2, -1, 8)
    for tile in blocking.cover(height, width, phase):
        own = torch.arange(height * width).view(height, width)[tile.rows, tile.columns].flatten()
        keys, values = (torch.cat([each[:, :, own], each.gather(2, chosen)], dim=2) for each in (key, value))
        log_weights = F.pad(context.log_weights(tile), (len(own), 0))
        if corrected and context.calibration is not None:
            values, log_weights = context.corrected(tile, 0, keys, values)
        mask = log_weights[:, :, None]
        result[:, :, own] = F.scaled_dot_product_attention(query[:, :, own], keys, values, attn_mask=mask)
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
    ("processor", "corrected"),
    [
        (AttnProcessor(), False),
        (AttnProcessor2_0(), True),
        (FusedAttnProcessor2_0(), True),
        (SlicedAttnProcessor(1), False),
    ],
)
def test_every_processor_attends_to_the_context(processor, corrected):
    """Corrected where it is known what the processor makes of tokens, and can be told."""
    module, x = attention(), torch.randn(2, 63, 16)
    module.fuse_projections()
    module.set_processor(processor)
    blocking = Blocking("brick", 3, 3, full_tokens=1, context=12)
    with PatchStack() as stack:
        blocked(stack, module, 7, 9, blocking, step=1)
        result = module(x)
    expected = context_oracle(module, x, 7, 9, blocking, 1, "layer 0 step 1", corrected)
    torch.testing.assert_close(result, expected, **ROUNDING)


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
    expected = context_oracle(module, x, 7, 9, blocking, 1, "layer 0 step 1", corrected=False)
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


def test_heavy_tokens_are_those_that_queries_want():
    """They are there for certain, and stand for themselves; where all are wanted alike there are none."""
    module, everywhere = attention(), torch.randn(16)
    x = everywhere + 0.1 * torch.randn(2, 400, 16)  # so every query points one way
    assert (Context(module, x, (20, 20), 24, "a").stands_for > 1).all()
    wanted = [7, 123, 399]
    x[1, wanted] += 12 * F.normalize(module.to_q(everywhere) @ module.to_k.weight, dim=0)
    context = Context(module, x, (20, 20), 24, "a")
    heavy = context.stands_for == 1
    assert heavy.sum(dim=1).tolist() == [0, 3]
    assert sorted((context.rows * 20 + context.columns)[heavy].tolist()) == wanted


def test_tokens_are_looked_at_in_whole_rows(monkeypatch):
    """Of a map on the host: a run that begins and ends within rows needs one more of them than others."""
    seen, read = [], context_room.runs_of
    monkeypatch.setattr(context_room, "SCORES", (2 * 4 + 3 * 16) * 50)
    monkeypatch.setattr(context_room, "runs_of", lambda tokens, runs: seen.extend(runs) or read(tokens, runs))
    Context(attention(), torch.randn(1, 20 * 16, 16), (20, 16), 16, "a")
    assert len(seen) > 1 and all(start % 16 == stop % 16 == 0 for start, stop in seen)


@pytest.mark.parametrize("qk_norm", [None, "layer_norm"])
def test_tokens_are_wanted_as_much_as_by_the_head_that_wants_them_most(qk_norm, monkeypatch):
    """With everyone in the crowd, as much as attention itself says, however the map is cut for it."""
    monkeypatch.setattr("largerespatch.techniques.attention.context.SCORES", 2 * 2 * 40 * 17)
    module, x, judges = attention(qk_norm=qk_norm), 2 * torch.randn(2, 100, 16), torch.arange(40)
    if qk_norm:
        module.norm_q.weight.data = 4 * torch.rand(8)
    query, key, value = with_heads(module, x)
    query, key = (query, key) if qk_norm is None else (module.norm_q(query), module.norm_k(key))
    shares = (query[:, :, :40] @ key.mT / 8**0.5).softmax(-1)
    heads = Heads(module, lambda tokens: tokens)
    found, _, everything = wanted_tokens(heads, x, judges, range(100), 10, Band.of_all(x))
    torch.testing.assert_close(found, shares.sum(2).amax(1))
    torch.testing.assert_close(everything, torch.cat([shares @ value, torch.ones(2, 2, 40, 1)], dim=-1))


def test_each_token_is_stood_for_once_on_average():
    """Those that are worth most are there always, for themselves."""
    received = torch.rand(1, 60) ** 4
    received[0, 7] = 100.0
    stood_for, always = torch.zeros(60), torch.ones(60, dtype=torch.bool)
    for seed in range(1000):
        places, stands_for = drawn(received.clone(), 10, 20, str(seed), Band.of_all(received[..., None]))
        assert len(set(places[0].tolist())) == 20
        stood_for[places[0]] += stands_for[0] / 1000
        taken = torch.zeros(60, dtype=torch.bool)
        taken[places[0][stands_for[0] == 1]] = True
        always &= taken
    assert always[7] and always.sum() < 10
    torch.testing.assert_close(stood_for, torch.ones(60), rtol=0, atol=0.2)


def test_lots_are_spread_evenly_over_numbers_and_map():
    rows, columns = torch.arange(64)[:, None].expand(64, 96), torch.arange(96).expand(64, 96)
    one, other = (lots(rows, columns, seed) for seed in ("a", "b"))
    assert not torch.equal(one, other) and torch.equal(one, lots(rows, columns, "a"))
    assert ((one > 0) & (one < 1)).all()
    ordered = one.flatten().sort().values
    torch.testing.assert_close(ordered, torch.linspace(0, 1, 64 * 96), rtol=0, atol=0.002)
    drawn = one < 1 / 32
    in_cells = F.avg_pool2d(drawn[None, None].float(), 16) * 256
    assert in_cells.amin() >= 5 and in_cells.amax() <= 11  # 8 of each 256; by chance they would vary by 3


@pytest.mark.parametrize("runs", [10**6, 2 * 2 * 16 * 7], ids=["at once", "in runs"])
def test_judges_get_of_a_corrected_context_what_the_whole_map_gives(runs, monkeypatch):
    """All but for what a weight below zero would be needed for; of no other query this is asked."""
    monkeypatch.setattr(calibration, "SHARES", runs)
    monkeypatch.setattr(calibration, "RIDGE", 1e-9)
    monkeypatch.setattr(calibration, "STEPS", 100)
    module, x = attention().double(), 0.3 * torch.randn(2, 400, 16).double()
    context = Context(module, x, (20, 20), 128, "a")
    query, (_, key, value) = context.calibration.judges.queries, with_heads(module, x)
    expected = F.scaled_dot_product_attention(query, key, value, scale=1)
    chosen = (context.rows * 20 + context.columns)[:, None, :, None].expand(-1, 2, -1, 8)
    for tile in (Tile(0, 0, 5, 7), Tile(12, 3, 20, 20)):
        own = torch.arange(400).view(20, 20)[tile.rows, tile.columns].flatten()
        keys, values = (torch.cat([each[:, :, own], each.gather(2, chosen)], dim=2) for each in (key, value))
        results = [
            F.scaled_dot_product_attention(query, keys, each, attn_mask=log_weights[:, :, None], scale=1)
            for each, log_weights in (
                (values, F.pad(context.log_weights(tile), (len(own), 0))),
                context.corrected(tile, 0, keys, values),
            )
        ]
        plain, corrected = ((result - expected).abs().amax() for result in results)
        assert corrected < plain / 50


def test_where_judges_pay_nothing_to_a_context_nothing_is_corrected():
    """In the second head they pay it all to other tokens, by more than numbers tell apart."""
    query, keys, values = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    total = torch.stack([(query @ keys.mT).logsumexp(-1)[0, 0], torch.full((4,), 500.0)])[None, :, :, None]
    judges = calibration.Judges(query, total)
    everything = calibration.given(judges.shares(keys), values)
    everything[:, 1] = 1.0
    some = keys[:, :, ::2], values[:, :, ::2]
    found = calibration.Calibration.of(judges, everything, some, torch.full((1, 15), 2.0))
    more, log_weights = found.corrected((keys[:, :, :0], values[:, :, :0]), some[1], torch.full((1, 15), 2.0))
    assert more[:, 0].abs().amax() > 0.01 and not more[:, 1].any()
    torch.testing.assert_close(log_weights[:, 1], torch.full((1, 15), math.log(2)))


@pytest.mark.parametrize("scale", [0.3, 1, 3, 6, 30])
@pytest.mark.parametrize("smooth", [False, True], ids=["of noise", "smooth"])
def test_what_suits_the_judges_alone_is_not_asked_of_all(smooth, scale, monkeypatch):
    """However few tokens a query wants, and whatever it is like: corrected, a context is no worse."""
    module = attention()
    x = torch.randn(1, 16, 6, 6) if smooth else torch.randn(1, 16, 24, 24)
    x = scale * F.interpolate(x, size=(24, 24), mode="bilinear").flatten(2).transpose(1, 2)
    expected, errors = module(x), []
    for known in ((), tile_room.PROJECTS_PLAINLY):
        monkeypatch.setattr(tile_room, "PROJECTS_PLAINLY", known)
        with PatchStack() as stack:
            blocked(stack, module, 24, 24, Blocking("brick", 6, 6, full_tokens=1, context=64))
            errors.append((module(x) - expected).square().mean().sqrt().item())
    assert errors[1] <= 1.02 * errors[0]
    assert scale > 1 or errors[1] < errors[0] / 5


def test_autocast_does_not_make_a_correction_of_halves():
    module = attention()
    x = F.interpolate(torch.randn(1, 16, 6, 6), size=(24, 24), mode="bilinear").flatten(2).transpose(1, 2)
    expected, errors = module(x), []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), PatchStack() as stack:
            blocked(stack, module, 24, 24, Blocking("brick", 6, 6, full_tokens=1, context=144))
            result = module(x).float()
        errors.append((result - expected).square().mean().sqrt() / expected.std())
    assert errors[0] < 0.004 and errors[1] < 0.02  # as far as halves go


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
    """Dense attention under a mask over a map's tokens, after `text` others that everyone sees."""

    def __init__(self, mask, text=0):
        super().__init__()
        self.mask = F.pad(mask, (text, 0))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
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
def test_context_of_a_map_equals_dense_attention_under_its_weights(text, passing, monkeypatch):
    """With keys normalized as the whole map is, and nothing corrected. A map that was passed on is written over."""
    monkeypatch.setattr(tile_room, "PROJECTS_PLAINLY", ())
    blocking, module = Blocking("brick", 3, 4, full_tokens=3, context=20), map_attention(text=text)
    x = torch.randn(2, 16, 9, 8) + torch.linspace(-3, 3, 8)
    statistics = record(x, 4)

    def prepare(tokens):
        with GivenStatistics(statistics):
            return module.group_norm(tokens.transpose(1, 2)).transpose(1, 2)

    context = Context(module, x.flatten(2).transpose(1, 2), (9, 8), 20, "layer 0 step 1", prepare)
    prompt = {"encoder_hidden_states": torch.randn(2, 5, 12)} if text else {}
    with Masked(context_mask(context, 2, 9, 8, blocking.cover(9, 8, 1)), 5 if text else 0):
        expected = module(x, **prompt)
    with PatchStack() as stack:
        blocked_map(stack, module, blocking, step=1)
        result = module(StoredMap.of(x, passing=True) if passing else x, **prompt)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert (result.data_ptr() == x.data_ptr()) == passing


@pytest.mark.parametrize("text", [False, True])
def test_context_of_a_map_is_corrected(text, monkeypatch):
    """Text or not, and with keys normalized as the whole map is."""
    blocking, module = Blocking("brick", 5, 5, full_tokens=3, context=60), map_attention(text=text)
    x = F.interpolate(torch.randn(2, 16, 5, 4), size=(20, 16), mode="bilinear") + torch.linspace(-1, 1, 16)
    prompt = {"encoder_hidden_states": torch.randn(2, 5, 12)} if text else {}
    expected, errors = module(x, **prompt), []
    for known in ((), tile_room.PROJECTS_PLAINLY):
        monkeypatch.setattr(tile_room, "PROJECTS_PLAINLY", known)
        with PatchStack() as stack:
            blocked_map(stack, module, blocking)
            errors.append((module(x, **prompt) - expected).square().mean().item())
    assert errors[1] < errors[0] / 20


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


@pytest.mark.parametrize(
    ("processor", "keys"), [(AttnProcessor2_0(), [7] * 9 + [1] * 9), (SlicedAttnProcessor(1), [63] * 9)]
)
def test_keys_are_projected_once_for_all_chunks_where_they_can_be_given(monkeypatch, processor, keys):
    module, x, seen = map_attention(processor), torch.randn(1, 16, 9, 7), []
    module.to_k.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    with PatchStack() as stack:
        chunked_map(monkeypatch, stack, module)
        module(x)
    assert seen == keys


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
