"""The context of a block: tokens outside it that stand for the rest of the map.

*Heavy* tokens are those that most queries want; a *sampled* few stand for all the others, each with the log of how many
it stands for. Approximate; with all tokens as context a block attends as dense attention does.
"""

import math
from collections.abc import Callable, Sequence

import torch
from diffusers.models.attention_processor import Attention

from ..core.pieces import assemble
from ..core.tilings import Runs, Tile, sampled_cells

# Queries that say which tokens are heavy, and keys that say how much attention there is to get.
JUDGES = 128
CROWD = 2048

# Attention scores that are looked at together while heavy tokens are searched: 128 MiB in float32.
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
    crowd: torch.Tensor,
    prepare: Prepare = lambda tokens: tokens,
) -> torch.Tensor:
    """Indices ``[B, count]`` of those of the `tokens` ``[B, N, C]`` that get the most attention.

    Measured for the queries of the tokens `judges`; a token counts by the head that wants it most. What all tokens
    together get is estimated from those of the `crowd`, a sample of them. `prepare` is what the attention does to
    tokens first. Memory does not grow with N but for one number per token.
    """

    def heads(projected: torch.Tensor, norm: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
        split = projected.view(len(tokens), -1, attention.heads, projected.shape[-1] // attention.heads).transpose(1, 2)
        return (split if norm is None else norm(split)).float()  # the scores of some checkpoints overflow halves

    query = heads(attention.to_q(prepare(tokens[:, judges])), attention.norm_q) * attention.scale

    def scores(some: torch.Tensor) -> torch.Tensor:
        return torch.matmul(query, heads(attention.to_k(prepare(some)), attention.norm_k).transpose(-1, -2))

    total = scores(tokens[:, crowd]).logsumexp(dim=-1, keepdim=True) + math.log(tokens.shape[1] / len(crowd))
    length = max(SCORES // query[..., 0].numel(), 1)
    received = assemble(
        Runs(tokens.shape[1], length),
        lambda run: scores(tokens[:, slice(*run)]).sub_(total).clamp_(max=0).exp_().sum(dim=-2).amax(dim=1),
        place=lambda run: (slice(None), slice(*run)),
        into=torch.zeros(tokens.shape[:2], device=tokens.device),
    )
    return received.topk(count).indices  # type: ignore[no-any-return]


def _uploaded(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """On CUDA from pinned memory: from any other the host would wait until all work before it is done."""
    kept = torch.tensor(numbers)
    return (kept.pin_memory() if device.type == "cuda" else kept).to(device, non_blocking=True)


class Context:
    """The tokens of a map that each of its tiles attends to besides its own.

    Args:
        attention: whose attention it is for.
        tokens: of the map, ``[B, height * width, C]``.
        size: ``(height, width)``.
        heavy: number of heavy tokens, which differ from sample to sample.
        sampled: number of sampled ones, the same for all samples.
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
    ) -> None:
        height, width = size
        batch, self.total, channels = tokens.shape
        self.heavy = min(heavy, self.total)

        def cells(count: int, purpose: str) -> torch.Tensor:
            return _uploaded(sampled_cells(height, width, count, f"{seed} {purpose}"), tokens.device)

        judges, crowd, some = cells(JUDGES, "judges"), cells(CROWD, "crowd"), cells(sampled, "sampled")
        some = some.expand(batch, -1)
        wanted = heavy_tokens(attention, tokens, self.heavy, judges, crowd, prepare)
        # A sampled token that is heavy as well must not count twice.
        fresh = ~(some[:, :, None] == wanted[:, None, :]).any(dim=-1)
        self.counts = torch.cat([torch.ones_like(wanted, dtype=torch.bool), fresh], dim=1)
        places = torch.cat([wanted, some], dim=1)
        self.rows, self.columns = places // width, places % width
        self.tokens = tokens.gather(1, places[:, :, None].expand(-1, -1, channels))

    def log_weights(self, tile: Tile) -> torch.Tensor:
        """What to add to the attention scores of the context's tokens in a tile, ``[B, 1, S]``.

        Heavy tokens stand for themselves, the sampled ones together for all that the tile does not see.
        """
        rows, columns = self.rows, self.columns
        inside = (rows >= tile.top) & (rows < tile.bottom) & (columns >= tile.left) & (columns < tile.right)
        used = self.counts & ~inside
        heavy, sampled = used[:, : self.heavy], used[:, self.heavy :]
        unseen = self.total - tile.area - heavy.sum(dim=1, keepdim=True)
        stands_for = (unseen / sampled.sum(dim=1, keepdim=True).clamp(min=1)).log()
        weights = torch.cat([torch.zeros_like(heavy, dtype=torch.float32), stands_for.expand_as(sampled)], dim=1)
        return weights.masked_fill(~used, -torch.inf)[:, None]
