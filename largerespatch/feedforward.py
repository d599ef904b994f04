"""Chunked feed-forward: exact, with memory that does not grow with the map."""

from collections.abc import Callable

import torch

from .rehearsal import pieces


class ChunkedFeedForward:
    """Runs a feed-forward over runs of tokens. Exact, since a feed-forward sees one token at a time.

    Takes the place of ``FeedForward.forward`` as ``around(original, hidden_states, ...)`` for hidden states
    ``[..., C]``. Tokens of all samples are counted together, so the hidden layer (4 to 8 times as wide as the
    input) never holds more than `chunk_size` of them. The output is allocated once.
    """

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def __call__(
        self, original: Callable[..., torch.Tensor], hidden_states: torch.Tensor, *args: object, **kwargs: object
    ) -> torch.Tensor:
        tokens = hidden_states.shape[:-1].numel()
        if tokens <= self.chunk_size:
            return original(hidden_states, *args, **kwargs)
        # Three dimensions, as every feed-forward and every adapter around one expects.
        rows = hidden_states.reshape(1, tokens, hidden_states.shape[-1])
        output = None
        for start in pieces(range(0, tokens, self.chunk_size)):
            chunk = slice(start, start + self.chunk_size)
            result = original(rows[:, chunk], *args, **kwargs)
            if output is None:
                output = result.new_empty(1, tokens, result.shape[-1])
            output[:, chunk] = result
        assert output is not None  # there is at least one chunk
        return output.view(*hidden_states.shape[:-1], -1)
