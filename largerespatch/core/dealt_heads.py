"""The heads of an attention dealt out among processes that have bands of the map which it attends to. Exact.

Heads know nothing of one another. So a process that has some heads of all tokens does to these what one process alone
would do, whatever that is; what travels is each token's queries, keys and values, once, and what comes of them.
"""

from collections.abc import Sequence

import torch

from .bands import Band
from .tilings import Run


class DealtAttention:
    """Which heads of an attention each process does: of so many `heads` of keys, and those of queries that share them.

    Tensors are ``[B, heads, N, C]``, of as many heads or a multiple.

    Raises:
        ValueError: some process would have none.
    """

    def __init__(self, band: Band, heads: int) -> None:
        self.band, self.heads = band, heads
        count = band.bands.count
        if heads < count:
            raise ValueError(f"process_group must have at most {heads} processes to deal {heads} heads to; got {count}")
        self.shares: list[Run] = [(heads * i // count, heads * (i + 1) // count) for i in range(count)]

    def of(self, rank: int, tokens: torch.Tensor) -> torch.Tensor:
        """Those heads of some `tokens` that a process does."""
        first, last = (edge * tokens.shape[1] // self.heads for edge in self.shares[rank])
        return tokens[:, first:last]

    def own(self, tokens: torch.Tensor) -> torch.Tensor:
        """Those that this one does."""
        return self.of(self.band.bands.rank, tokens)

    def to_heads(self, parts: Sequence[torch.Tensor], counts: Sequence[int]) -> list[list[torch.Tensor]]:
        """Of what each process has of some tokens, all heads, in several `parts`, the heads that this one does.

        By process, each of which has so many tokens, as `counts` says. Not counted as sent: see `count_sent`.
        """
        rank, processes = self.band.bands.rank, range(len(counts))
        own = [self.own(part) for part in parts]
        give = [[self.of(i, part) for part in parts] if i != rank else [] for i in processes]
        take = [
            [(*part.shape[:2], count, part.shape[3]) for part in own] if i != rank else []
            for i, count in enumerate(counts)
        ]
        found = self.band.bands.exchange(parts[0], give, take, "")()
        found[rank] = own
        return found

    def count_sent(self, tokens: torch.Tensor, number: int) -> None:
        """What `to_heads` sends for so many tokens like these, in however many turns: a rehearsal leaves some out."""
        size = tokens[:, :, :1].numel() * tokens.element_size() * number
        self.band.bands.count_sent("heads", size - size * self.own(tokens).shape[1] // tokens.shape[1])

    def to_bands(self, parts: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """Of what this process made of its heads, for each process in several `parts`, all heads of its own tokens."""
        rank, own = self.band.bands.rank, self.shares[self.band.bands.rank]
        give = [list(each) if i != rank else [] for i, each in enumerate(parts)]
        take = [
            [(len(part), part.shape[1] * (last - first) // (own[1] - own[0]), *part.shape[2:]) for part in parts[rank]]
            if i != rank
            else []
            for i, (first, last) in enumerate(self.shares)
        ]
        found = self.band.bands.exchange(parts[rank][0], give, take, "heads")()
        found[rank] = list(parts[rank])
        return [torch.cat(heads, dim=1) for heads in zip(*found, strict=True)]
