"""Blocked self-attention: each tile of a feature map attends to itself and to a small context, the same for all tiles.

Approximate. Without context it equals dense attention under a block mask, to rounding, because projections act on
single tokens. What one step separates another one joins (see `largerespatch.tilings`), so information crosses the
whole map. The context makes up for most of what a block cannot see: *heavy* tokens, which every query wants, and a
*sampled* few that stand for all the others, each with the log of how many it stands for.

A VAE's attention to its whole map runs in chunks of its queries, which is exact.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import nn
from torch.overrides import TorchFunctionMode

from .groupnorm import GivenStatistics, record_in_bands
from .patching import PatchStack
from .rehearsal import pieces
from .tilings import PHASES, Tile, bricks, sampled_cells, tiles

COVERS: dict[str, Callable[[int, int, int, int, int], list[Tile]]] = {"brick": bricks, "tile": tiles}


@dataclass(frozen=True)
class Blocking:
    """How self-attention is blocked: `shape` is a key of `COVERS`, all else counts tokens.

    `context` is the number of tokens outside a tile that it attends to as well, half heavy and half sampled.
    """

    shape: str
    slice_y: int
    slice_x: int
    full_tokens: int
    context: int = 0

    def cover(self, height: int, width: int, phase: int) -> list[Tile]:
        return COVERS[self.shape](height, width, phase, self.slice_y, self.slice_x)


@dataclass
class MapNote:
    """(height, width), in tokens, of the feature map that a transformer was last given."""

    size: tuple[int, int] | None = None


@dataclass
class StepNote:
    """Which denoising step a model was last called for."""

    step: int = 0


class MapNoting:
    """Takes the place of ``Transformer2DModel.forward`` and notes the map's size for the attentions inside it.

    They receive ``[B, height * width, C]`` and could not tell the shape. The note is kept after the call, so that
    blocks recomputed by gradient checkpointing still find it.
    """

    def __init__(self, note: MapNote, patch_size: int) -> None:
        self.note = note
        self.patch_size = patch_size

    def __call__(
        self, original: Callable[..., Any], hidden_states: torch.Tensor, *args: object, **kwargs: object
    ) -> Any:
        height, width = hidden_states.shape[-2:]
        self.note.size = (height // self.patch_size, width // self.patch_size)
        return original(hidden_states, *args, **kwargs)


# Queries that say which tokens are heavy, and keys that say how much attention there is to get.
JUDGES = 128
CROWD = 2048

# Queries of a chunk: enough to keep a device busy, and to make the projection of the keys for each chunk a small part.
QUERIES = 2**14

# Attention scores that are looked at together while heavy tokens are searched: 32 MiB in float32.
SCORES = 2**23

# Processors that take the keys of self-attention from ``encoder_hidden_states`` too, where these are given. Others
# (fused projections, perturbed-attention guidance, what users write) need not.
TAKES_OTHER_KEYS = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)


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
    received = torch.zeros(tokens.shape[:2], device=tokens.device)
    length = max(SCORES // query[..., 0].numel(), 1)
    for start in pieces(range(0, tokens.shape[1], length)):
        run = slice(start, start + length)
        received[:, run] = scores(tokens[:, run]).sub_(total).clamp_(max=0).exp_().sum(dim=-2).amax(dim=1)
    return received.topk(count).indices


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
        height, self.width = size
        batch, self.total, channels = tokens.shape
        self.heavy = min(heavy, self.total)

        def cells(count: int, purpose: str) -> torch.Tensor:
            return torch.tensor(sampled_cells(height, self.width, count, f"{seed} {purpose}"), device=tokens.device)

        judges, crowd, some = cells(JUDGES, "judges"), cells(CROWD, "crowd"), cells(sampled, "sampled")
        some = some.expand(batch, -1)
        wanted = heavy_tokens(attention, tokens, self.heavy, judges, crowd, prepare)
        # A sampled token that is heavy as well must not count twice.
        fresh = ~(some[:, :, None] == wanted[:, None, :]).any(dim=-1)
        self.counts = torch.cat([torch.ones_like(wanted, dtype=torch.bool), fresh], dim=1)
        self.places = torch.cat([wanted, some], dim=1)
        self.tokens = tokens.gather(1, self.places[:, :, None].expand(-1, -1, channels))

    def log_weights(self, tile: Tile) -> torch.Tensor:
        """What to add to the attention scores of the context's tokens in a tile, ``[B, 1, S]``.

        Heavy tokens stand for themselves, the sampled ones together for all that the tile does not see.
        """
        rows, columns = self.places // self.width, self.places % self.width
        inside = (rows >= tile.top) & (rows < tile.bottom) & (columns >= tile.left) & (columns < tile.right)
        used = self.counts & ~inside
        heavy, sampled = used[:, : self.heavy], used[:, self.heavy :]
        unseen = self.total - tile.area - heavy.sum(dim=1, keepdim=True)
        stands_for = (unseen / sampled.sum(dim=1, keepdim=True).clamp(min=1)).log()
        weights = torch.cat([torch.zeros_like(heavy, dtype=torch.float32), stands_for.expand_as(sampled)], dim=1)
        return weights.masked_fill(~used, -torch.inf)[:, None]


def _context(
    blocking: Blocking,
    attention: Attention,
    tokens: torch.Tensor,
    size: tuple[int, int],
    seed: str,
    prepare: Prepare = lambda tokens: tokens,
) -> Context | None:
    heavy = blocking.context // 2
    sampled = blocking.context - heavy
    return Context(attention, tokens, size, heavy, sampled, seed, prepare) if sampled else None


class WeightedKeys(TorchFunctionMode):
    """Adds log-weights ``[B, 1, K]`` to the scores of ``F.scaled_dot_product_attention`` calls over K keys.

    For processors that pass no mask on, or pass it for a part of the batch (which then is its first part).
    """

    def __init__(self, log_weights: torch.Tensor) -> None:
        super().__init__()
        self.log_weights = log_weights
        self.met = False

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            query, key = args[:2]
            if query.ndim == 4 and key.shape[-2] == self.log_weights.shape[-1]:
                self.met = True
                return func(*args, **kwargs | {"attn_mask": self.log_weights[: len(query), None]})
        return func(*args, **kwargs)


class BlockedAttention:
    """Takes the place of ``Attention.forward``; every tile goes through the original.

    A call is blocked when it is self-attention without a mask over the noted map and that map is larger than
    `Blocking.full_tokens`; any other call is passed on as it is. The phase depends on the layer's place among the
    attentions of its model and on the denoising step alone.
    """

    def __init__(
        self, attention: Attention, blocking: Blocking, map_note: MapNote, step_note: StepNote, layer: int
    ) -> None:
        self.attention = attention
        self.blocking = blocking
        self.map_note = map_note
        self.step_note = step_note
        self.layer = layer

    def __call__(
        self,
        original: Callable[..., torch.Tensor],
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        if encoder_hidden_states is None and attention_mask is None and self._is_large_map(hidden_states):
            return self._blocked(original, hidden_states, **kwargs)
        return original(
            hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **kwargs
        )

    def _is_large_map(self, hidden_states: torch.Tensor) -> bool:
        if self.map_note.size is None or hidden_states.ndim != 3:
            return False
        height, width = self.map_note.size
        tokens = hidden_states.shape[1]
        return tokens == height * width and tokens > self.blocking.full_tokens

    def _blocked(
        self, original: Callable[..., torch.Tensor], hidden_states: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        assert self.map_note.size is not None  # _is_large_map
        height, width = self.map_note.size
        batch, tokens, channels = hidden_states.shape
        plane = hidden_states.reshape(batch, height, width, channels)
        context = self._context(hidden_states)
        output = None
        cover = self.blocking.cover(height, width, (self.layer + self.step_note.step) % PHASES)
        for tile in pieces(cover, Tile.size):
            block = plane[:, tile.rows, tile.columns].reshape(batch, tile.area, channels)
            result = self._attend(original, block, tile, context, **kwargs)
            if output is None:
                output = result.new_empty(batch, height, width, result.shape[-1])
            output[:, tile.rows, tile.columns] = result.view(batch, tile.height, tile.width, -1)
        assert output is not None  # a tiling has at least one tile
        return output.view(batch, tokens, -1)

    def _context(self, hidden_states: torch.Tensor) -> Context | None:
        assert self.map_note.size is not None  # _is_large_map
        seed = f"layer {self.layer} step {self.step_note.step}"
        return _context(self.blocking, self.attention, hidden_states, self.map_note.size, seed)

    def _attend(
        self,
        original: Callable[..., torch.Tensor],
        block: torch.Tensor,
        tile: Tile,
        context: Context | None,
        **kwargs: object,
    ) -> torch.Tensor:
        """The attention of the tokens of a tile, ``[B, tile.area, C]``."""
        if context is None:
            return original(block, **kwargs)
        keys = torch.cat([block, context.tokens], dim=1)
        log_weights = F.pad(context.log_weights(tile), (tile.area, 0)).to(block.dtype)
        if type(self.attention.processor) in TAKES_OTHER_KEYS:
            return original(block, encoder_hidden_states=keys, attention_mask=log_weights, **kwargs)
        with WeightedKeys(log_weights) as weighted:
            result = original(keys, **kwargs)[:, : tile.area]
        # An attention that computes its scores in its own way cannot be told the weights.
        return result if weighted.met else original(block, **kwargs)


@contextmanager
def _statistics_of(plane: torch.Tensor, norm: nn.GroupNorm) -> Iterator[None]:
    """Inside, `norm` gives whatever part of a map it sees the statistics of the whole `plane`."""
    statistics = record_in_bands(plane, norm.num_groups)

    def normalize(original: Callable[..., torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        with GivenStatistics(statistics):
            return original(tokens)

    with PatchStack() as stack:
        stack.wrap(norm, "forward", normalize, "group_norm.forward")
        yield


def _normalized(attention: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What an attention with a group norm makes of tokens ``[B, N, C]`` before it projects them."""
    normalized: torch.Tensor = attention.group_norm(tokens.transpose(1, 2))
    return normalized.transpose(1, 2)


class ChunkedMapAttention:
    """Takes the place of the ``forward`` of a self-attention that is given a map ``[B, C, H, W]``: exact, to rounding.

    In the mid blocks of VAEs. Chunks of `QUERIES` attend to the whole map, and the result takes its memory. Keys and
    values are projected anew for each chunk rather than kept; that is little work beside the attention to them.
    Smaller maps and calls that are differentiated or that bring something else along go through the original.
    """

    def __init__(self, attention: Attention) -> None:
        self.attention: Any = attention

    def __call__(
        self, original: Callable[..., torch.Tensor], hidden_states: torch.Tensor, *args: object, **kwargs: object
    ) -> torch.Tensor:
        cells = hidden_states.shape[2:].numel()
        alone = not any(each is not None for each in (*args, *kwargs.values()))
        known = type(self.attention.processor) in TAKES_OTHER_KEYS
        if hidden_states.ndim != 4 or cells <= QUERIES or not alone or not known or torch.is_grad_enabled():
            return original(hidden_states, *args, **kwargs)
        plane = hidden_states.flatten(2)
        with _statistics_of(hidden_states, self.attention.group_norm):
            keys = _normalized(self.attention, plane.transpose(1, 2)).contiguous()
            for start in pieces(range(0, cells, QUERIES)):
                chunk = slice(start, start + QUERIES)
                result = original(plane[:, :, chunk].transpose(1, 2), encoder_hidden_states=keys)
                plane[:, :, chunk] = result.transpose(1, 2)
        return plane.view(hidden_states.shape)


class BlockedMapAttention:
    """Takes the place of the ``forward`` of an attention that is given a map ``[B, C, H, W]``.

    In Kandinsky's U-Net and in the mid blocks of VAEs. Such an attention normalizes the map by groups first; its tiles
    get the statistics of the whole map. Text that it attends to beside the map is seen by every tile. What is blocked,
    with which context and in which phase, is as for `BlockedAttention`.

    Args:
        in_place: whether the map's memory may become that of the result, where there are no gradients.
    """

    def __init__(
        self, attention: Attention, blocking: Blocking, step_note: StepNote, layer: int, in_place: bool = False
    ) -> None:
        self.blocking = blocking
        self.attention: Any = attention
        self.step_note = step_note
        self.layer = layer
        self.in_place = in_place

    def __call__(
        self,
        original: Callable[..., torch.Tensor],
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        kwargs["encoder_hidden_states"] = encoder_hidden_states
        attends_itself = encoder_hidden_states is None or self.attention.added_kv_proj_dim is not None
        large = hidden_states.ndim == 4 and hidden_states.shape[-2:].numel() > self.blocking.full_tokens
        if attends_itself and attention_mask is None and large:
            return self._blocked(original, hidden_states, **kwargs)
        return original(hidden_states, attention_mask=attention_mask, **kwargs)

    def _blocked(
        self, original: Callable[..., torch.Tensor], hidden_states: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        height, width = hidden_states.shape[-2:]
        output = hidden_states
        if torch.is_grad_enabled() or not self.in_place:
            output = torch.empty_like(hidden_states)
        with _statistics_of(hidden_states, self.attention.group_norm):
            context = _context(
                self.blocking,
                self.attention,
                hidden_states.flatten(2).transpose(1, 2),
                (height, width),
                f"layer {self.layer} step {self.step_note.step}",
                partial(_normalized, self.attention),
            )
            cover = self.blocking.cover(height, width, (self.layer + self.step_note.step) % PHASES)
            for tile in pieces(cover, Tile.size):
                block = hidden_states[:, :, tile.rows, tile.columns].contiguous()
                result = self._attend(original, block, tile, context, **kwargs)
                output[:, :, tile.rows, tile.columns] = result
        return output

    def _attend(
        self,
        original: Callable[..., torch.Tensor],
        block: torch.Tensor,
        tile: Tile,
        context: Context | None,
        encoder_hidden_states: torch.Tensor | None,
        **kwargs: object,
    ) -> torch.Tensor:
        """The attention of the cells of a tile, ``[B, C, tile.height, tile.width]``."""
        if context is None:
            return original(block, encoder_hidden_states=encoder_hidden_states, **kwargs)
        cells = block.flatten(2)
        if encoder_hidden_states is None and type(self.attention.processor) in TAKES_OTHER_KEYS:
            tokens = cells.transpose(1, 2)
            keys = _normalized(self.attention, torch.cat([tokens, context.tokens], dim=1))
            mask = F.pad(context.log_weights(tile), (tile.area, 0)).to(block.dtype)
            result = original(tokens, encoder_hidden_states=keys, attention_mask=mask, **kwargs)
            return result.transpose(1, 2).reshape(block.shape)
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        mask = F.pad(context.log_weights(tile), (text + tile.area, 0)).to(block.dtype)
        with WeightedKeys(mask) as weighted:
            both = torch.cat([cells, context.tokens.transpose(1, 2)], dim=2)[..., None]
            result = original(both, encoder_hidden_states=encoder_hidden_states, **kwargs)
        if weighted.met:
            return result[:, :, : tile.area].reshape(block.shape)
        return original(block, encoder_hidden_states=encoder_hidden_states, **kwargs)
