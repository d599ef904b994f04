"""Blocked self-attention: each tile of a feature map attends to itself and to a small context of the rest.

Approximate. Without context it equals dense attention under a block mask, to rounding, because projections act on
single tokens. What one step separates another one joins (see `largerespatch.core.tilings`), so information crosses the
whole map. The context makes up for most of what a block cannot see.

A VAE's attention to its whole map runs in chunks of its queries: the exact case, where every tile sees all.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import nn

from ..core.families import Order, Site
from ..core.maps import taken
from ..core.pieces import assemble, rehearsing
from ..core.statistics import sharing_statistics
from ..core.tilings import COVERS, PHASES, Tile, Tiling, even_cuts
from .context import Context
from .log_weights import WeightedKeys
from .notes import MapNote, MapNoting, StepNote

# Queries of a chunk: enough to keep a device busy, and to make the projection of the keys for each chunk a small part.
# An H200 takes 1.6 microseconds a query of 512 channels in chunks of 2^12, 0.96 in those of 2^13, 1.0 to 1.1 in larger.
QUERIES = 2**13

# Tokens of context where nothing else is asked for. Of U-Nets twice as many gain little.
CONTEXT = 512

# Processors that take the keys of self-attention from ``encoder_hidden_states`` too, where these are given. Others
# (fused projections, perturbed-attention guidance, what users write) need not.
TAKES_OTHER_KEYS = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)

# What blocks must know the inside of: ``forward`` hands everything to the processor, which takes keys from
# ``encoder_hidden_states`` and adds a mask ``[B, 1, K]`` to their scores; the one for text beside a map wants a map.
LEANS_ON = (
    "diffusers.models.attention_processor.Attention.forward",
    "diffusers.models.attention_processor.Attention.prepare_attention_mask",
    *(f"diffusers.models.attention_processor.{processor.__name__}.__call__" for processor in TAKES_OTHER_KEYS),
    "diffusers.models.attention_processor.AttnAddedKVProcessor2_0.__call__",
)

Forward = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Blocking:
    """How self-attention is blocked: `shape` is a key of `COVERS`, all else counts tokens.

    `context` is the number of tokens outside a tile that it attends to as well, at most half heavy, the rest sampled.
    `warned` are the processors of which it has been said that they cannot be told the context's weights.
    """

    shape: str
    slice_y: int
    slice_x: int
    full_tokens: int
    context: int = 0
    warned: set[str] = field(default_factory=set, compare=False)

    def cover(self, height: int, width: int, phase: int) -> Tiling:
        return COVERS[self.shape](height, width, phase, self.slice_y, self.slice_x)

    def __str__(self) -> str:
        x, y = self.slice_x, self.slice_y
        sizes = f"bricks of {2 * x}x{y} and {x}x{2 * y}" if self.shape == "brick" else f"tiles of {x}x{y}"
        context = f" with {self.context} of context" if self.context else ""
        return f"{sizes} tokens{context} on maps of over {self.full_tokens}"


class BlockedAttention:
    """Takes the place of ``Attention.forward`` for tokens ``[B, N, C]`` or a map ``[B, C, H, W]``.

    Every tile goes through the original. An attention that is given a map may normalize it by groups first; its tiles
    get the statistics of the whole map. Text that it attends to beside the map is seen by every tile. The phase depends
    on the layer's place among the attentions of its model and on the denoising step alone.

    Args:
        map_note: says the size of the map that tokens are the cells of; None for an attention that is given maps. What
            is not so is attended whole.
    """

    def __init__(
        self, attention: Attention, blocking: Blocking, step_note: StepNote, layer: int, map_note: MapNote | None = None
    ) -> None:
        self.attention: Any = attention
        self.blocking = blocking
        self.step_note = step_note
        self.layer = layer
        self.map_note = map_note

    def applies(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> bool:
        """To self-attention, text beside it or not, without a mask, on a large map."""
        attends_itself = encoder_hidden_states is None or self.attention.added_kv_proj_dim is not None
        return attends_itself and attention_mask is None and self._is_large(hidden_states)

    def _is_large(self, hidden_states: torch.Tensor) -> bool:
        size = self._size(hidden_states)
        return size is not None and size[0] * size[1] > self.blocking.full_tokens

    # A graph would write every tile out, and which tokens are sampled is for Python to say.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self,
        original: Forward,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
        **others: Any,
    ) -> torch.Tensor:
        others["encoder_hidden_states"] = encoder_hidden_states
        kwargs = {name: value for name, value in others.items() if value is not None}
        plane, overwritable = taken(hidden_states)
        size = self._size(plane)
        assert size is not None  # since it applies
        cells = plane.permute(0, 2, 3, 1) if plane.ndim == 4 else plane.reshape(len(plane), *size, -1)

        def output(result: torch.Tensor) -> torch.Tensor:
            if overwritable and not torch.is_grad_enabled():
                return cells
            if plane.ndim == 4:
                return torch.empty_like(plane).permute(0, 2, 3, 1)
            return result.new_empty(*cells.shape[:3], result.shape[-1])

        norm = self.attention.group_norm
        with sharing_statistics(norm, cells.permute(0, 3, 1, 2)) if norm is not None else nullcontext():
            attend = self._attending(original, cells, kwargs)

            def attended(tile: Tile) -> torch.Tensor:
                block = cells[:, tile.rows, tile.columns].flatten(1, 2)
                return attend(block, tile).reshape(len(cells), *tile.size(), -1)

            result = assemble(
                self._cut(*size), attended, place=lambda tile: (slice(None), tile.rows, tile.columns), make=output
            )
        return result.permute(0, 3, 1, 2) if plane.ndim == 4 else result.flatten(1, 2)  # type: ignore[no-any-return]

    def _size(self, hidden_states: torch.Tensor) -> tuple[int, int] | None:
        """(height, width) of the map that hidden states are, or are the cells of; None where they are neither."""
        if self.map_note is None:
            return (hidden_states.shape[2], hidden_states.shape[3]) if hidden_states.ndim == 4 else None
        size = self.map_note.size
        return size if size and hidden_states.ndim == 3 and hidden_states.shape[1] == size[0] * size[1] else None

    def _cut(self, height: int, width: int) -> Tiling:
        return self.blocking.cover(height, width, (self.layer + self.step_note.step) % PHASES)

    def _attending(
        self, original: Forward, cells: torch.Tensor, kwargs: dict[str, Any]
    ) -> Callable[[torch.Tensor, Tile], torch.Tensor]:
        """What gives the attention of the tokens of a tile, ``[B, tile.area, C]``."""
        if not self.blocking.context:
            return lambda block, tile: self._among_themselves(original, block, kwargs)
        seed = f"layer {self.layer} step {self.step_note.step}"
        heavy = self.blocking.context // 2
        sampled = self.blocking.context - heavy
        size = (cells.shape[1], cells.shape[2])
        context = Context(self.attention, cells.flatten(1, 2), size, heavy, sampled, seed, self._prepared)
        return lambda block, tile: self._with_context(original, block, tile, context, kwargs)

    def _prepared(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the attention makes of tokens ``[B, N, C]`` before it projects them."""
        if self.attention.group_norm is None:
            return tokens
        normalized: torch.Tensor = self.attention.group_norm(tokens.transpose(1, 2))
        return normalized.transpose(1, 2)

    def _among_themselves(self, original: Forward, tokens: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        if self.attention.added_kv_proj_dim is None:
            return original(tokens, **kwargs)
        # Processors that add text to the keys take maps alone.
        return original(tokens.transpose(1, 2)[..., None], **kwargs).flatten(2).transpose(1, 2)

    def _with_context(
        self, original: Forward, block: torch.Tensor, tile: Tile, context: Context, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        both = torch.cat([block, context.tokens], dim=1)
        text = kwargs.get("encoder_hidden_states")
        before = tile.area if text is None else text.shape[1] + tile.area
        log_weights = F.pad(context.log_weights(tile), (before, 0))
        processor = type(self.attention.processor)
        if text is None and processor is AttnProcessor2_0:
            with WeightedKeys(log_weights):
                return original(block, **kwargs, encoder_hidden_states=self._prepared(both))
        if text is None and processor in TAKES_OTHER_KEYS:
            mask = log_weights.to(block.dtype)
            return original(block, **kwargs, encoder_hidden_states=self._prepared(both), attention_mask=mask)
        with WeightedKeys(log_weights) as weighted:
            result = self._among_themselves(original, both, kwargs)
        if weighted.met:
            return result[:, : tile.area]
        # An attention that computes its scores in its own way cannot be told the weights.
        self._warn(processor.__name__)
        return self._among_themselves(original, block, kwargs)

    def _warn(self, processor: str) -> None:
        if processor not in self.blocking.warned and not rehearsing():
            self.blocking.warned.add(processor)
            warnings.warn(
                f"attn_context: {processor} does not call scaled_dot_product_attention and cannot be told the weights "
                "of a context, so its blocks attend to themselves alone",
                RuntimeWarning,
                stacklevel=2,
            )


class ChunkedAttention(BlockedAttention):
    """Attention to a whole map in chunks of `QUERIES`: exact, to rounding. In the mid blocks of VAEs.

    Keys are the same for all chunks; they are projected anew for each chunk rather than kept, which is little work
    beside the attention to them. Smaller maps and calls that are differentiated or that bring something else along go
    through the original.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__(attention, Blocking("tile", 1, 1, QUERIES), StepNote(), 0)

    def applies(self, hidden_states: torch.Tensor, *others: Any, **named: Any) -> bool:
        alone = all(value is None for value in (*others, *named.values()))
        known = type(self.attention.processor) in TAKES_OTHER_KEYS
        return alone and known and self._is_large(hidden_states) and not torch.is_grad_enabled()

    def _cut(self, height: int, width: int) -> Tiling:
        return Tiling(even_cuts(height, max(QUERIES // width, 1)), even_cuts(width, QUERIES))

    def _attending(
        self, original: Forward, cells: torch.Tensor, kwargs: dict[str, Any]
    ) -> Callable[[torch.Tensor, Tile], torch.Tensor]:
        keys = self._prepared(cells.flatten(1, 2)).contiguous()
        return lambda block, tile: original(block, encoder_hidden_states=keys)


def in_blocks_or_chunks(attention: Any, blocking: Blocking | None, layer: int) -> BlockedAttention:
    """For an attention to a map, the `layer`-th of its model: in chunks where it is not said how it is blocked."""
    if blocking is None:
        return ChunkedAttention(attention)
    return BlockedAttention(attention, blocking, StepNote(), layer)


def blocking_of(options: Any, context: int = CONTEXT) -> Blocking:
    """As the ``attn_`` options say, with so much `context` where they do not."""
    context = context if options.attn_context is None else options.attn_context
    return Blocking(options.attn_shape, options.attn_slice_y, options.attn_slice_x, options.attn_full_tokens, context)


def attends_cells(module: nn.Module) -> bool:
    """Whether a module is a transformer whose tokens are the cells of a map that it is given.

    Those have a patch size in their config (None for 1). Temporal ones, whose tokens are frames, and priors have none.
    """
    blocks = getattr(module, "transformer_blocks", None)
    return (
        isinstance(blocks, nn.ModuleList)
        and any(isinstance(block, BasicTransformerBlock) for block in blocks)
        and "patch_size" in getattr(module, "config", ())
        and not getattr(module, "is_input_vectorized", False)
    )


def attends_map(module: nn.Module) -> bool:
    """Whether a module is a self-attention that is given a map rather than tokens: one that normalizes it by groups."""
    return isinstance(module, Attention) and module.group_norm is not None and not module.only_cross_attention


def attention_sites(model: nn.Module, name: str, options: Any, step_note: StepNote) -> Iterator[Site]:
    """All self-attentions of `model` to the cells of maps, and the transformers that note the size of these."""
    blocking = blocking_of(options)
    says = f"{{count}} self-attentions in {blocking}"
    layer = 0
    for place, transformer in model.named_modules(prefix=name):
        if attends_cells(transformer):
            note = MapNote()
            noting = MapNoting(note, getattr(transformer.config, "patch_size", None) or 1)
            yield Site(transformer, place, Order.MAP_NOTED, noting)
            for path, module in transformer.named_modules(prefix=place):
                if isinstance(module, Attention) and not module.is_cross_attention:
                    blocked = BlockedAttention(module, blocking, step_note, layer, note)
                    yield Site(module, path, Order.IN_BLOCKS, blocked, says=says)
                    layer += 1
    for path, module in model.named_modules(prefix=name):
        if attends_map(module):
            yield Site(module, path, Order.IN_BLOCKS, BlockedAttention(module, blocking, step_note, layer), says=says)
            layer += 1
