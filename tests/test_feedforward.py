import pytest
import torch
from diffusers.models.attention import FeedForward
from hypothesis import given
from hypothesis import strategies as st

from largerespatch.feedforward import ChunkedFeedForward
from largerespatch.patching import PatchStack

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
