"""The context of a block: tokens outside it that stand for the rest of the map.

*Heavy* tokens are those that most queries want; a *sampled* few stand for all the others, each with the log of how many
it stands for. Up to half are heavy, as many as there are: a token that is called heavy and is not does harm.
Approximate; with all tokens as context a block attends as dense attention does.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from ...core.bands import Band
from ...core.pieces import assemble
from ...core.tilings import Runs, Tile, sampled_cells
from ...core.tokens import picked, runs_of

# Queries that say which tokens are heavy, and keys that say how much attention there is to get.
JUDGES = 128
CROWD = 2048

# A heavy token gets more than so many times what a token gets on average.
HEAVY = 4

# Attention scores, or values of tokens if these are more, that are looked at together while heavy tokens are searched:
# 128 MiB in float32.
SCORES = 2**25

# What the search for heavy tokens must know the inside of: how queries and keys become scores.
LEANS_ON = ("diffusers.models.attention_processor.AttnProcessor2_0.__call__",)

Prepare = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def heavy_tokens(
    attention: Attention,
    tokens: torch.Tensor,
    count: int,
    judges: torch.Tensor,
    crowd: Sequence[int],
    prepare: Prepare = lambda tokens: tokens,
    width: int = 1,
    band: Band | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices ``[B, count]`` of those of the `tokens` that get the most attention, and which are heavy.

    Tokens are a tensor ``[B, N, C]``, or a map of so many on the host, which is read in runs; those of a `band`, if
    there is more than one, and places are those of the whole map all the same.
    Measured for the queries of the tokens `judges`; a token counts by the head that wants it most. What all tokens
    together get is estimated from those of the `crowd`, a sample of them. `prepare` is what the attention does to
    tokens first, `width` that of the map that they are the cells of. Memory does not grow with N but for one number per
    token.
    """

    def heads(projected: torch.Tensor, norm: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
        split = projected.view(len(tokens), -1, attention.heads, projected.shape[-1] // attention.heads).transpose(1, 2)
        return (split if norm is None else norm(split)).float()  # the scores of some checkpoints overflow halves

    band = band or Band.of_all(tokens)
    query = heads(attention.to_q(prepare(band.picked(tokens, judges.expand(len(tokens), -1)))), attention.norm_q)
    query = query * attention.scale

    def scores(keys: torch.Tensor) -> torch.Tensor:
        return torch.matmul(query, heads(attention.to_k(prepare(keys)), attention.norm_k).transpose(-1, -2))

    near = uploaded(band.among(crowd), tokens.device)
    total = band.logsumexp(scores(picked(tokens, near.expand(len(tokens), -1)))) + math.log(band.cells / len(crowd))
    length = max(SCORES // max(query[..., 0].numel(), len(tokens) * tokens.shape[2]), 1)
    if length > width:  # whole rows of a map: else of some runs one more has to be read
        length -= length % width
    received = assemble(
        Runs(tokens.shape[1], length),
        lambda run, keys: scores(keys).sub_(total).clamp_(max=0).exp_().sum(dim=-2).amax(dim=1),
        place=lambda run: (slice(None), slice(*run)),
        into=torch.zeros(tokens.shape[:2], device=tokens.device),
        read=partial(runs_of, tokens),
    )
    most, places = band.topk(received, count)
    return places, most > HEAVY * len(judges) / band.cells


def uploaded(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """On CUDA from pinned memory: from any other the host would wait until all work before it is done."""
    kept = torch.tensor(numbers, dtype=torch.long)
    return (kept.pin_memory() if device.type == "cuda" else kept).to(device, non_blocking=True)


class Context:
    """The tokens of a map that each of its tiles attends to besides its own.

    Args:
        attention: whose attention it is for.
        tokens: of the map, ``[B, height * width, C]``, or of this process's `band` of it.
        size: ``(height, width)``.
        heavy: at most so many heavy tokens, which differ from sample to sample; sampled ones take the place of others.
        sampled: number of sampled ones besides, the same for all samples.
        seed: which tokens are sampled, and which ones judge, follows from it.
        prepare: what the attention does to tokens before it projects them.
    """

    def __init__(
        self,
        attention: Attention,
        tokens: torch.Tensor,
        size: tuple[int, int],
        heavy: int,
        sampled: int,
        seed: str,
        prepare: Prepare = lambda tokens: tokens,
        band: Band | None = None,
    ) -> None:
        height, width = size
        batch, self.total = len(tokens), height * width
        band = band or Band.of_all(tokens)
        most = min(heavy, self.total)

        def cells(count: int, purpose: str) -> torch.Tensor:
            return uploaded(sampled_cells(height, width, count, f"{seed} {purpose}"), tokens.device)

        judges, some = cells(JUDGES, "judges"), cells(sampled, "sampled")
        crowd = sampled_cells(height, width, CROWD, f"{seed} crowd")
        wanted, is_heavy = heavy_tokens(attention, tokens, most, judges, crowd, prepare, width, band)
        spare = cells(most, "instead of heavy") if most else some[:0]
        instead = F.pad(spare, (0, most - len(spare)), value=-1).expand(batch, -1)
        places = torch.cat([torch.where(is_heavy, wanted, instead), some.expand(batch, -1)], dim=1)
        self.is_heavy = F.pad(is_heavy, (0, len(some)))
        # No token counts twice: not one that is sampled and heavy, nor one that is sampled again.
        again = _among(places, torch.where(is_heavy, wanted, -1)) & ~self.is_heavy
        again[:, :most] |= _among(places[:, :most], some.expand(batch, -1)) & ~is_heavy
        self.counts = (places >= 0) & ~again
        places = places.clamp(min=0)
        self.rows, self.columns = places // width, places % width
        self.tokens = band.picked(tokens, places)

    def log_weights(self, tile: Tile) -> torch.Tensor:
        """What to add to the attention scores of the context's tokens in a tile, ``[B, 1, S]``.

        Heavy tokens stand for themselves, the sampled ones together for all that the tile does not see.
        """
        rows, columns = self.rows, self.columns
        inside = (rows >= tile.top) & (rows < tile.bottom) & (columns >= tile.left) & (columns < tile.right)
        used = self.counts & ~inside
        heavy, sampled = used & self.is_heavy, used & ~self.is_heavy
        unseen = self.total - tile.area - heavy.sum(dim=1, keepdim=True)
        stands_for = (unseen / sampled.sum(dim=1, keepdim=True).clamp(min=1)).log()
        weights = torch.where(sampled, stands_for, torch.zeros_like(stands_for))
        return weights.masked_fill(~used, -torch.inf)[:, None]


def _among(some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Which of the numbers ``[B, S]`` are among others ``[B, T]``."""
    return (some[:, :, None] == others[:, None, :]).any(dim=-1)
