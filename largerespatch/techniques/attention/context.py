"""The context of a block: tokens outside it that stand for the rest of the map.

Tokens are taken with the probability that what queries want of them makes worth while, and each stands for the inverse
of it, with the logarithm of that as its weight. So *heavy* tokens, those that most queries want, are always there and
stand for themselves; others are *sampled*. What that leaves of an error is made good for some of the queries, and so
for all, as far as they are like them: see `Calibration`. Approximate; with all tokens as context a block attends as
dense attention does.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from ...core.bands import Band
from ...core.pieces import assemble, collect
from ...core.tilings import Run, Runs, Tile, sampled_cells
from ...core.tokens import picked, runs_of
from .calibration import Calibration, Judges, given, in_full

# Queries that say what is wanted, one for so many tokens of context, at most so many; and keys that say how much
# attention there is to get.
JUDGED, JUDGES = 4, 256
CROWD = 2048

# Attention scores, tokens, and their keys and values, that are there together while judges look at all tokens: 128 MiB
# in float32.
SCORES = 2**25

# What looking at all tokens must know the inside of: how they become queries, keys and values, and these scores.
LEANS_ON = ("diffusers.models.attention_processor.AttnProcessor2_0.__call__",)

# Tokens whose lots are drawn together: 8 MiB a number.
LOTS = 2**20

Prepare = Callable[[torch.Tensor], torch.Tensor]


class Heads:
    """The queries, keys and values ``[B, heads, N, C]`` that an attention makes of tokens ``[B, N, C]``.

    In float32, for the scores of some checkpoints overflow halves. `prepare` is what it does to tokens first.
    """

    def __init__(self, attention: Attention, prepare: Prepare) -> None:
        self.attention: Any = attention
        self.prepare = prepare

    def queries(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scaled ones."""
        scale: float = self.attention.scale
        return scale * self._split(self.attention.to_q(self.prepare(tokens)), self.attention.norm_q)

    def keys(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._split(self.attention.to_k(self.prepare(tokens)), self.attention.norm_k)

    def keys_and_values(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attention, prepared = self.attention, self.prepare(tokens)
        jointly = getattr(attention, "to_others", None)
        key, value = jointly(prepared) if jointly else (attention.to_k(prepared), attention.to_v(prepared))
        return self._split(key, attention.norm_k), self._split(value)

    def _split(self, projected: torch.Tensor, norm: Prepare | None = None) -> torch.Tensor:
        heads = with_heads(projected, self.attention.heads)
        heads = heads if norm is None else norm(heads)
        return heads.to(torch.promote_types(heads.dtype, torch.float32))


def with_heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """``[B, heads, N, C]`` of tokens ``[B, N, heads * C]``."""
    return tokens if tokens.ndim == 4 else tokens.reshape(*tokens.shape[:2], heads, -1).transpose(1, 2)


def wanted_tokens(
    heads: Heads,
    tokens: torch.Tensor,
    judges: torch.Tensor,
    crowd: Sequence[int],
    width: int,
    band: Band,
) -> tuple[torch.Tensor, Judges, torch.Tensor]:
    """How much each of the `tokens` is wanted, ``[B, N]``; the judges that say so; and what these are given by all.

    Tokens are a tensor ``[B, N, C]``, or a map of so many on the host, which is read in runs; those of a `band`, if
    there is more than one, and places are those of the whole map all the same.
    Judges are the queries of tokens at places ``[J]``; a token counts by the head that wants it most. What all tokens
    together get is estimated from those of the `crowd`, a sample of them; `width` is that of the map that they are the
    cells of. Memory does not grow with N but for one number per token.
    """
    batch = len(tokens)
    query = heads.queries(band.picked(tokens, judges.expand(batch, -1)))
    near = uploaded(band.among(crowd), tokens.device)
    keys = heads.keys(picked(tokens, near.expand(batch, -1)))
    with in_full(keys):
        scores = query @ keys.transpose(-1, -2)
    looking = Judges(query, band.logsumexp(scores) + math.log(band.cells / len(crowd)))
    everything = query.new_zeros(())

    def look(_: Run, some: torch.Tensor) -> torch.Tensor:
        nonlocal everything
        keys, values = heads.keys_and_values(some)
        shares = looking.shares(keys)
        everything = everything + given(shares, values)
        return shares.sum(dim=-2).amax(dim=1)

    length = max(SCORES // (query[..., 0].numel() + 3 * batch * tokens.shape[2]), 1)
    if length > width:  # whole rows of a map: else of some runs one more has to be read
        length -= length % width
    received = assemble(
        Runs(tokens.shape[1], length),
        look,
        place=lambda run: (slice(None), slice(*run)),
        into=torch.zeros(tokens.shape[:2], dtype=query.dtype, device=tokens.device),
        read=partial(runs_of, tokens),
    )
    return received, looking, band.summed(everything, "context")


def uploaded(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """On CUDA from pinned memory: from any other the host would wait until all work before it is done."""
    kept = torch.tensor(numbers, dtype=torch.long)
    return (kept.pin_memory() if device.type == "cuda" else kept).to(device, non_blocking=True)


def lots(rows: torch.Tensor, columns: torch.Tensor, seed: str) -> torch.Tensor:
    """A number in (0, 1) for each cell of a map, by its row and column, and by the `seed`.

    They are spread evenly, over the numbers as over the map: of those below any bound none are near others. (A plane
    wave of irrational slope, folded; in whole numbers, so that all devices draw the same.)
    """
    first, whole = Random(seed).getrandbits(32), 2**32
    wave = (columns * round(0.7548776662466927 * whole) + rows * round(0.5698402909980532 * whole) + first) % whole
    return ((2 * wave - whole).abs() + 0.5) / (whole + 1)


def drawn(received: torch.Tensor, width: int, count: int, seed: str, band: Band) -> tuple[torch.Tensor, torch.Tensor]:
    """The places ``[B, count]`` of some of the tokens of a map, and how many of them each stands for.

    Each is worth what it received, ``[B, N]``, which is written over, and the mean of that. Taken are the largest of
    their worths by a number that is drawn for each: so its chance is in proportion to its worth, up to one (priority
    sampling, Duffield and others, 2007).
    """
    worth = received.add_(band.summed(received.sum(dim=1, keepdim=True), "context") / band.cells)
    first = band.run[0]

    def by_lot(run: Run) -> None:
        places = torch.arange(*run, device=received.device)
        worth[:, slice(*run)] /= lots(places // width + first, places % width, seed)

    collect(Runs(received.shape[1], LOTS), by_lot)
    most, places = band.topk(worth, count + 1)
    bound, most, places = most[:, count:], most[:, :count], places[:, :count]
    return places, (bound / (most * lots(places // width, places % width, seed))).clamp(min=1)


class Context:
    """The tokens of a map that each of its tiles attends to besides its own.

    Args:
        attention: whose attention it is for.
        tokens: of the map, ``[B, height * width, C]``, or of this process's `band` of it.
        size: ``(height, width)``.
        count: how many, which differ from sample to sample.
        seed: which tokens are sampled, and which ones judge, follows from it.
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
        band: Band | None = None,
    ) -> None:
        height, width = size
        band = band or Band.of_all(tokens)
        self.total = height * width
        self.calibration: Calibration | None = None
        if count >= self.total:
            places = torch.arange(self.total, device=tokens.device).expand(len(tokens), -1)
            self.stands_for = torch.ones(places.shape, device=tokens.device)
            self.tokens = band.picked(tokens, places)
        else:
            heads = Heads(attention, prepare)
            judges = uploaded(sampled_cells(height, width, _judges(count), f"{seed} judges"), tokens.device)
            crowd = sampled_cells(height, width, CROWD, f"{seed} crowd")
            with torch.no_grad():
                received, looking, everything = wanted_tokens(heads, tokens, judges, crowd, width, band)
                places, self.stands_for = drawn(received, width, count, seed, band)
            self.tokens = band.picked(tokens, places)
            with torch.no_grad():
                chosen = heads.keys_and_values(self.tokens)
                self.calibration = Calibration.of(looking, everything, chosen, self.stands_for)
        self.rows, self.columns = places // width, places % width

    def counts(self, tile: Tile) -> torch.Tensor:
        """How many tokens outside a tile each of the context's stands for, ``[B, S]``: those in it for none.

        Those that are there for certain stand for themselves, others together for all that the tile does not see.
        """
        rows, columns = self.rows, self.columns
        inside = (rows >= tile.top) & (rows < tile.bottom) & (columns >= tile.left) & (columns < tile.right)
        used = self.stands_for.masked_fill(inside, 0)
        heavy = (used == 1).to(used.dtype)
        sampled = used - heavy
        unseen = self.total - tile.area - heavy.sum(dim=1, keepdim=True)
        return heavy + sampled * (unseen / sampled.sum(dim=1, keepdim=True).clamp(min=1))

    def log_weights(self, tile: Tile) -> torch.Tensor:
        """What to add to the attention scores of the context's tokens in a tile, ``[B, 1, S]``."""
        return self.counts(tile).log()[:, None]

    def corrected(
        self, tile: Tile, first: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Values ``[B, heads, K, C]`` of a tile's attention, and the logarithms of their weights, ``[B, heads, K]``.

        Keys and values are those of the tile, from the `first` on, and then those of the context.
        """
        assert self.calibration is not None  # there is nothing to correct
        last = first + tile.area
        own = key[:, :, first:last], value[:, :, first:last]
        more, log_weights = self.calibration.corrected(own, value[:, :, last:], self.counts(tile))
        return value + F.pad(more.to(value.dtype), (0, 0, last, 0)), F.pad(log_weights, (last, 0))


def _judges(count: int) -> int:
    return min(max(count // JUDGED, 1), JUDGES)
