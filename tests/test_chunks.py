import pytest
import torch
from diffusers.hooks import HookRegistry
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from hypothesis import given
from hypothesis import strategies as st

from largerespatch.core.families import install
from largerespatch.core.patching import PatchStack
from largerespatch.techniques.chunks import ChunkedFeedForward, can_be_chunked, chunk_sites
from live import LiveBytes

# Matrix products of different heights may be summed in another order: a few units in the last place.
ROUNDING = {"rtol": 0, "atol": 1e-6}


def feed_forward(**options):
    torch.manual_seed(0)
    return FeedForward(8, **options)


@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 220))
def test_any_chunk_size_gives_the_whole_result(batch, tokens, chunk_size):
    module, x = feed_forward(dim_out=12), torch.randn(batch, tokens, 8)
    expected = module(x)
    with PatchStack() as stack:
        stack.wrap(module, "forward", ChunkedFeedForward(chunk_size), "ff.forward")
        torch.testing.assert_close(module(x), expected, **ROUNDING)


@pytest.mark.parametrize("activation", ["geglu", "gelu", "gelu-approximate", "geglu-approximate", "swiglu"])
def test_the_hidden_layer_never_holds_more_than_a_chunk(activation):
    module, x = feed_forward(activation_fn=activation), torch.randn(2, 25, 8)
    widths = []
    module.net[2].register_forward_hook(lambda _, args, __: widths.append(args[0].shape[:-1].numel()))
    expected = module(x)
    widths.clear()
    with PatchStack() as stack:
        stack.wrap(module, "forward", ChunkedFeedForward(16), "ff.forward")
        torch.testing.assert_close(module(x), expected, **ROUNDING)
        assert widths == [16, 16, 16, 2]
        widths.clear()
        module(x[:, :9])
        assert widths == [16, 2]


def test_tokens_within_one_chunk_go_through_untouched():
    module, x = feed_forward(), torch.randn(2, 8, 8)
    seen = []
    with PatchStack() as stack:
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        stack.wrap(module, "forward", ChunkedFeedForward(16), "ff.forward")
        module(x)
    assert seen[0] is x


def test_non_contiguous_and_four_dimensional_input():
    module, x = feed_forward(), torch.randn(2, 8, 5, 6).permute(0, 2, 3, 1)
    expected = module(x)
    with PatchStack() as stack:
        stack.wrap(module, "forward", ChunkedFeedForward(7), "ff.forward")
        result = module(x)
    assert result.shape == expected.shape
    torch.testing.assert_close(result, expected, **ROUNDING)


def test_gradients_are_the_unpatched_ones():
    with torch.enable_grad():
        module, x = feed_forward(), torch.randn(1, 20, 8, requires_grad=True)
        (expected,) = torch.autograd.grad(module(x).square().sum(), x)
        with PatchStack() as stack:
            stack.wrap(module, "forward", ChunkedFeedForward(6), "ff.forward")
            (gradient,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def transformer_block(**options):
    torch.manual_seed(0)
    return BasicTransformerBlock(16, 2, 8, **({"cross_attention_dim": 12} | options))


def in_chunks(stack, block, chunk_size):
    """Returns a list that the tokens of each feed-forward are noted in."""
    assert can_be_chunked(block)
    seen = []
    block.ff.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    install(stack, [site for site in chunk_sites(block, "block", chunk_size) if site.module is not block.ff])
    return seen


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 130), st.booleans(), st.booleans())
def test_a_block_in_chunks_gives_the_whole_result(batch, tokens, chunk_size, crosses, masked):
    block = transformer_block() if crosses else transformer_block(cross_attention_dim=None)
    x, arguments = torch.randn(batch, tokens, 16), {}
    if crosses:
        arguments["encoder_hidden_states"] = torch.randn(batch, 5, 12)
        mask = torch.tensor([0.0, 0, -10000, 0, -3]).expand(batch, 1, 5)
        arguments["encoder_attention_mask"] = mask if masked else None
    expected, given_x = block(x, **arguments), x.clone()
    with PatchStack() as stack:
        seen = in_chunks(stack, block, chunk_size)
        torch.testing.assert_close(block(x, **arguments), expected, rtol=1e-5, atol=2e-6)
    assert torch.equal(x, given_x)
    assert max(seen) <= max(chunk_size, batch)
    assert sum(seen) == batch * tokens


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0, lambda: SlicedAttnProcessor(1)])
def test_every_processor_crosses_in_chunks(processor):
    block, x, prompt = transformer_block(), torch.randn(2, 30, 16), torch.randn(2, 5, 12)
    for attention in (block.attn1, block.attn2):
        attention.set_processor(processor())
    expected = block(x, encoder_hidden_states=prompt)
    with PatchStack() as stack:
        seen = in_chunks(stack, block, 16)
        torch.testing.assert_close(block(x, encoder_hidden_states=prompt), expected, rtol=1e-5, atol=2e-6)
    assert seen == [16, 16, 16, 12]


def test_a_block_in_chunks_holds_two_maps_beside_its_input():
    block, x, prompt = transformer_block(), torch.randn(1, 4000, 16), torch.randn(1, 5, 12)
    with LiveBytes() as whole:
        block(x, encoder_hidden_states=prompt)
    with PatchStack() as stack:
        stack.wrap(block.attn1, "forward", lambda original, tokens: 2 * tokens, "attn1.forward")  # blocked elsewhere
        in_chunks(stack, block, 100)
        with LiveBytes() as chunked:
            block(x, encoder_hidden_states=prompt)
    assert chunked.peak["cpu"] < 2.2 * x.nbytes
    assert whole.peak["cpu"] > 5 * x.nbytes


def test_what_a_hook_keeps_of_self_attention_is_not_written_over():
    block, x, prompt, kept = transformer_block(), torch.randn(1, 30, 16), torch.randn(1, 5, 12), []
    block.attn1.register_forward_hook(lambda _, __, output: kept.append(output))
    expected = block(x, encoder_hidden_states=prompt)
    with PatchStack() as stack:
        in_chunks(stack, block, 16)
        torch.testing.assert_close(block(x, encoder_hidden_states=prompt), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(kept[1], kept[0])


def test_autocast_keeps_the_dtype_of_the_whole_result():
    block, x, prompt = transformer_block(), torch.randn(1, 30, 16), torch.randn(1, 5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        expected = block(x, encoder_hidden_states=prompt)
        with PatchStack() as stack:
            in_chunks(stack, block, 16)
            result = block(x, encoder_hidden_states=prompt)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


def swapping(attention, hidden_states, encoder_hidden_states=None, attention_mask=None):
    """A processor to which the place of a token matters."""
    return attention.to_out[0](attention.to_q(hidden_states)).flip(1)


WHOLE = {
    "a mask over tokens": lambda block: {"attention_mask": torch.zeros(1, 1, 30)},
    "a mask over queries": lambda block: {"encoder_attention_mask": torch.randn(1, 30, 5)},
    "a processor of one's own": lambda block: block.attn2.set_processor(swapping),
    "no text": lambda block: {"encoder_hidden_states": None},
    "diffusers' chunks": lambda block: block.set_chunk_feed_forward(15, dim=1),
    "a hook of diffusers": lambda block: HookRegistry.check_if_exists_or_initialize(block.attn2) and None,
    "gradients": lambda block: torch.set_grad_enabled(True) and None,
}


@pytest.mark.parametrize("case", WHOLE)
def test_calls_that_may_see_more_than_one_token_stay_whole(case):
    width = 16 if case == "no text" else 12
    block, x = transformer_block(cross_attention_dim=width), torch.randn(1, 30, 16)
    arguments = {"encoder_hidden_states": torch.randn(1, 5, width)} | (WHOLE[case](block) or {})
    expected = block(x, **arguments)
    with PatchStack() as stack:
        seen = in_chunks(stack, block, 8)
        assert torch.equal(block(x, **arguments), expected)
    assert min(seen) >= 15


def test_a_block_that_is_compiled_stays_whole(monkeypatch):
    block, x = transformer_block(), torch.randn(1, 30, 16)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with PatchStack() as stack:
        seen = in_chunks(stack, block, 8)
        block(x, encoder_hidden_states=torch.randn(1, 5, 12))
    assert seen == [30]


@pytest.mark.parametrize(
    "options",
    [
        {"double_self_attention": True},
        {"only_cross_attention": True},
        {"norm_type": "ada_norm", "num_embeds_ada_norm": 4},
        {"positional_embeddings": "sinusoidal", "num_positional_embeddings": 30},
    ],
)
def test_blocks_of_another_make_are_left_alone(options):
    block = transformer_block(**options)
    assert not can_be_chunked(block)
    assert {site.path for site in chunk_sites(block, "block", 8)} == {"block.ff"}
    block = transformer_block()
    assert can_be_chunked(block)
    assert {site.path for site in chunk_sites(block, "block", 8)} == {"block", "block.attn1", "block.ff"}
