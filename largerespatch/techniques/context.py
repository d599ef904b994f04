"""The context of a block: the tokens of the rest of the map, *pooled* into few.

Tokens whose keys are alike are asked for alike. So the map is divided into as many cells of like keys as the context
has tokens, wherever they lie, and each cell is one token: the mean of its members, with the log of how many lie outside
the block. Members count by the attention they get, and the weight is such that a few queries of the map give the cell
what they give its members. Approximate; with all tokens as context a block attends as dense attention does.
"""

import math
from collections.abc import Callable, Sequence

import torch
from diffusers.models.attention_processor import Attention

from ..core.pieces import assemble
from ..core.tilings import Runs, Tile, sampled_cells

# Queries that say how much attention tokens get, and keys that say how much there is to get.
JUDGES = 128
CROWD = 2048

# How the attention that a token gets, of what it would get if all got the same, makes its part in the mean: the power
# was tried on the demo model (1, 1.5 and 2 differ by less than a decibel, 0 is 2 to 3 worse).
POWER, LEAST = 1.5, 0.01

# Numbers that are looked at together, of judges and of cells for each token: 128 MiB in float32.
SCORES = 2**25

# Far below any share of attention that matters: a cell that gets none is not corrected.
NOTHING = 1e-30

# What pooling must know the inside of: how queries and keys become scores.
LEANS_ON = ("diffusers.models.attention_processor.AttnProcessor2_0.__call__",)

Prepare = Callable[[torch.Tensor], torch.Tensor]


class Judges:
    """A few queries of a map, which say how much of their attention tokens get.

    Args:
        attention: whose queries and keys these are.
        tokens: of the map, ``[B, N, C]``.
        judges, crowd: indices of tokens. What all tokens get together is estimated from the crowd, a sample of them.
        prepare: what the attention does to tokens before it projects them.
    """

    def __init__(
        self,
        attention: Attention,
        tokens: torch.Tensor,
        judges: torch.Tensor,
        crowd: torch.Tensor,
        prepare: Prepare = lambda tokens: tokens,
    ) -> None:
        self.attention = attention
        self.prepare = prepare
        query = self._heads(attention.to_q(prepare(tokens[:, judges])), attention.norm_q) * attention.scale
        scores = query @ self.keys(tokens[:, crowd]).mT
        self.query = query
        self.all = scores.logsumexp(dim=-1, keepdim=True) + math.log(tokens.shape[1] / len(crowd))

    def keys(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of tokens ``[B, n, C]``, ``[B, heads, n, K]``."""
        return self._heads(self.attention.to_k(self.prepare(tokens)), self.attention.norm_k)

    def shares(self, keys: torch.Tensor) -> torch.Tensor:
        """Of all attention there is, what each of the keys gets, ``[B, n]``: the mean over judges and heads."""
        shares: torch.Tensor = (self.query @ keys.mT).sub_(self.all).clamp_(max=0).exp_()
        return shares.mean(dim=(1, 2))

    def _heads(self, projected: torch.Tensor, norm: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
        heads = self.attention.heads
        split = projected.view(*projected.shape[:2], heads, projected.shape[-1] // heads).transpose(1, 2)
        return (split if norm is None else norm(split)).float()  # the scores of some checkpoints overflow halves


def _uploaded(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """On CUDA from pinned memory: from any other the host would wait until all work before it is done."""
    kept = torch.tensor(numbers)
    return (kept.pin_memory() if device.type == "cuda" else kept).to(device, non_blocking=True)


class Context:
    """What each tile of a map attends to besides itself. Memory grows with the map by one number for each token.

    `tokens` are those of the cells, ``[B, S, C]``, the same for all tiles.

    Args:
        attention: whose attention it is for.
        tokens: of the map, ``[B, height * width, C]``.
        size: ``(height, width)``.
        count: of the context's tokens, at most.
        seed: which tokens judge, and around which ones cells form, follows from it.
        prepare: what the attention does to tokens before it projects them.
    """

    def __init__(
        self,
        attention: Attention,
        tokens: torch.Tensor,
        size: tuple[int, int],
        count: int,
        seed: str,
        prepare: Prepare = lambda tokens: tokens,
    ) -> None:
        batch, self.total, channels = tokens.shape
        self.size = size

        def cells(count: int, purpose: str) -> torch.Tensor:
            return _uploaded(sampled_cells(*size, count, f"{seed} {purpose}"), tokens.device)

        with torch.no_grad():
            self.judges = Judges(attention, tokens, cells(JUDGES, "judges"), cells(CROWD, "crowd"), prepare)
            self.centers = self.judges.keys(tokens[:, cells(count, "centers")]).transpose(1, 2).flatten(2)
        self._sums = torch.zeros(*self.centers.shape[:2], channels + 3, device=tokens.device)
        across = max(self.centers.shape[1], self.judges.query[0, ..., 0].numel())
        self.cells = assemble(
            Runs(self.total, max(SCORES // (batch * across), 1)),
            lambda run: self._join(tokens[:, slice(*run)]),
            place=lambda run: (slice(None), slice(*run)),
            into=torch.empty(batch, self.total, dtype=torch.int32, device=tokens.device),
        )
        weighted, weights, share, counts = self._sums.split_with_sizes([channels, 1, 1, 1], dim=-1)
        self.tokens = (weighted / weights.clamp(min=NOTHING)).to(tokens.dtype)
        self.counts = counts.detach().squeeze(-1)
        with torch.no_grad():
            alone = self.judges.shares(self.judges.keys(self.tokens))
            self.correction = ((share.squeeze(-1) + NOTHING) / (self.counts * alone + NOTHING)).log()

    def _join(self, tokens: torch.Tensor) -> torch.Tensor:
        """Adds some tokens to the cells whose centers their keys are nearest to, and says which these are."""
        with torch.no_grad():
            keys = self.judges.keys(tokens)
            near = keys.transpose(1, 2).flatten(2) @ self.centers.mT - self.centers.square().sum(dim=-1)[:, None] / 2
            cells: torch.Tensor = near.argmax(dim=-1)
            share = self.judges.shares(keys)[..., None]
            weights = (share * self.total).clamp(min=LEAST) ** POWER
            # As a product of matrices, which adds in the same order each time.
            members = (cells[..., None] == torch.arange(near.shape[-1], device=cells.device)).float()
        told = torch.cat([tokens.float() * weights, weights, share, torch.ones_like(share)], dim=-1)
        self._sums = self._sums + members.mT @ told
        return cells

    def log_weights(self, tile: Tile) -> torch.Tensor:
        """What to add to the attention scores of the context's tokens in a tile, ``[B, 1, S]``."""
        inside = self.cells.view(-1, *self.size)[:, tile.rows, tile.columns].flatten(1).long()
        there = torch.zeros_like(self.counts).scatter_add_(1, inside, torch.ones_like(inside, dtype=torch.float32))
        return ((self.counts - there).log() + self.correction)[:, None]
