"""What follows self-attention in a transformer block, in chunks of tokens: exact, since it sees one token at a time.

A feed-forward holds four to eight times its input, and a block, beside input and result, three maps that it needs no
more. In chunks neither grows with the map.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from torch import nn

from ..core.families import Order, Site
from ..core.modules import named_modules
from ..core.pieces import assemble
from ..core.tilings import Each, Runs

# What chunks must know the inside of: a block calls ``attn1(norm1(hidden_states))`` first, and all else, as all of a
# feed-forward, looks at tokens one by one.
LEANS_ON = (
    "diffusers.models.attention.BasicTransformerBlock.forward",
    "diffusers.models.attention.FeedForward.forward",
)


def _runs(tokens: int, length: int) -> Sequence[slice]:
    return Each(lambda run: slice(*run), Runs(tokens, length))


class ChunkedFeedForward:
    """Runs a feed-forward over runs of tokens. Exact, since a feed-forward sees one token at a time.

    Takes the place of ``FeedForward.forward`` as ``around(original, hidden_states, ...)`` for hidden states
    ``[..., C]``. Tokens of all samples are counted together, so the hidden layer (4 to 8 times as wide as the
    input) never holds more than `chunk_size` of them. The output is allocated once.
    """

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def applies(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> bool:
        return hidden_states.shape[:-1].numel() > self.chunk_size

    def __call__(
        self, original: Callable[..., torch.Tensor], hidden_states: torch.Tensor, *args: object, **kwargs: object
    ) -> torch.Tensor:
        tokens = hidden_states.shape[:-1].numel()
        # Three dimensions, as every feed-forward and every adapter around one expects.
        rows = hidden_states.reshape(1, tokens, hidden_states.shape[-1])
        output = assemble(
            _runs(tokens, self.chunk_size),
            lambda chunk: original(rows[:, chunk], *args, **kwargs),
            place=lambda chunk: (slice(None), chunk),
            make=lambda result: result.new_empty(1, tokens, result.shape[-1]),
        )
        return output.view(*hidden_states.shape[:-1], -1)  # type: ignore[no-any-return]


class Attended:
    """Takes the place of a self-attention's ``forward``, and gives `result` in its place while there is one."""

    result: torch.Tensor | None = None

    def applies(self, *args: object, **kwargs: object) -> bool:
        return self.result is not None

    def __call__(self, original: Callable[..., torch.Tensor], *args: object, **kwargs: object) -> torch.Tensor | None:
        return self.result


def can_be_chunked(block: BasicTransformerBlock) -> bool:
    """Whether a block is a layer norm and self-attention, followed by what looks at tokens one by one."""
    crosses = block.attn2 is None or block.attn2.is_cross_attention
    return block.norm_type == "layer_norm" and block.pos_embed is None and not block.only_cross_attention and crosses


def sees_single_tokens(block: Any, arguments: dict[str, Any]) -> bool:
    """Whether all that follows self-attention in a call of such a block, with these arguments, does."""
    mask = arguments.get("encoder_attention_mask")
    return (
        arguments.get("attention_mask") is None
        and (mask is None or (mask.ndim == 3 and mask.shape[1] == 1))
        and not {"gligen", "ip_adapter_masks"} & set(arguments.get("cross_attention_kwargs") or ())
        and (block.attn2 is None or arguments.get("encoder_hidden_states") is not None)
        and (block.attn2 is None or type(block.attn2.processor).__module__.startswith("diffusers.models."))
        and block._chunk_size is None
        and not any(hasattr(each, "_diffusers_hook") for each in (block, block.attn1, block.attn2))
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # which would write every chunk out
    )


class ChunkedBlock:
    """Takes the place of ``BasicTransformerBlock.forward`` for hidden states ``[B, N, C]``: exact, to rounding.

    Self-attention comes first, for all tokens. Then the original runs for a chunk of them at a time, where `attended`
    tells it the chunk's part of that; its result takes the same memory where nobody else may hold that. Passed on as
    they are: calls whose other arguments concern single tokens (masks, boxes of GLIGEN), calls to be differentiated or
    compiled, and all where a hook of diffusers or a processor that is not its own may count tokens or calls.
    """

    def __init__(self, block: BasicTransformerBlock, attended: Attended, chunk_size: int) -> None:
        self.block: Any = block
        self.attended = attended
        self.chunk_size = chunk_size

    def applies(self, hidden_states: torch.Tensor, *args: object, **kwargs: Any) -> bool:
        return (
            hidden_states.shape[1] > self._length(hidden_states) and not args and sees_single_tokens(self.block, kwargs)
        )

    def _length(self, hidden_states: torch.Tensor) -> int:
        """Tokens of each sample that make a chunk."""
        return max(self.chunk_size // len(hidden_states), 1)

    def __call__(
        self, original: Callable[..., torch.Tensor], hidden_states: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        attended: torch.Tensor = self.block.attn1(
            self.block.norm1(hidden_states), **(kwargs.get("cross_attention_kwargs") or {})
        )

        def rest(chunk: slice) -> torch.Tensor:
            self.attended.result = attended[:, chunk]
            try:
                return original(hidden_states[:, chunk], **kwargs)
            finally:
                self.attended.result = None

        def output(result: torch.Tensor) -> torch.Tensor:
            # Not where a user's hook may have kept that, or autocast has chosen another dtype for attention.
            if self.block.attn1._forward_hooks or result.dtype != attended.dtype:
                return torch.empty_like(attended, dtype=result.dtype)
            return attended

        return assemble(  # type: ignore[no-any-return]
            _runs(hidden_states.shape[1], self._length(hidden_states)),
            rest,
            place=lambda chunk: (slice(None), chunk),
            make=output,
        )


def chunk_sites(model: nn.Module, name: str, chunk_size: int) -> Iterator[Site]:
    """All feed-forwards, and the transformer blocks that can be chunked."""
    says = f"{{count}} feed-forwards in chunks of {chunk_size} tokens"
    for path, module in named_modules(model, name):
        if isinstance(module, FeedForward):
            yield Site(module, path, Order.IN_CHUNKS, ChunkedFeedForward(chunk_size), says=says)
        elif isinstance(module, BasicTransformerBlock) and can_be_chunked(module):
            attended = Attended()
            yield Site(module.attn1, f"{path}.attn1", Order.IN_CHUNKS, attended)
            yield Site(module, path, Order.IN_CHUNKS, ChunkedBlock(module, attended, chunk_size))
