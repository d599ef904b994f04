"""Blocked self-attention: each tile of a feature map attends to itself and to a small context of the rest.

Approximate. Without context it equals dense attention under a block mask, to rounding, because projections act on
single tokens. What one step separates another one joins (see `largerespatch.core.tilings`), so information crosses the
whole map. The context makes up for most of what a block cannot see.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from ...core.bands import ALONE, Band, Bands, at
from ...core.dealt_tiles import Compute, dealt_out
from ...core.maps import StoredMap, taken
from ...core.statistics import record_by_rows, sharing_statistics
from ...core.tilings import COVERS, PHASES, Tile, Tiling
from ...core.tokens import TokenMap, as_map, tile_by_tile
from ..notes import MapNote, StepNote
from .context import Context
from .tile_attention import Forward, TileAttention

# Tokens of context where nothing else is asked for.
CONTEXT = 512


@dataclass(frozen=True)
class Blocking:
    """How self-attention is blocked: `shape` is a key of `COVERS`, all else counts tokens.

    `context` is the number of tokens outside a tile that it attends to as well.
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
        bands: of several processes each has a band of the map, one of these; then keys of a map that is attended whole
            come from all. The tiles and the context are those of one process.
        path: of the attention, for messages, where nothing around it has said so.
    """

    sees_tiles = True  # once its context is known, it sees no token of the map but those of the tile

    def __init__(
        self,
        attention: Attention,
        blocking: Blocking,
        step_note: StepNote,
        layer: int,
        map_note: MapNote | None = None,
        bands: Bands = ALONE,
        path: str = "",
    ) -> None:
        self.attention: Any = attention
        self.blocking = blocking
        self.step_note = step_note
        self.layer = layer
        self.map_note = map_note
        self.bands = bands
        self.path = path
        self.of_tile = TileAttention(attention, blocking.warned)
        self.tile: tuple[Tile, Context | None] | None = None

    @contextmanager
    def seeing(self, tile: Tile, context: Context | None) -> Iterator[None]:
        """Inside, hidden states are the tokens of that tile alone, which attends to that context as well."""
        self.tile = tile, context
        try:
            yield
        finally:
            self.tile = None

    def applies(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> bool:
        """To self-attention, text beside it or not, without a mask, on a large map."""
        attends_itself = encoder_hidden_states is None or self.attention.added_kv_proj_dim is not None
        large = self.tile is not None or self._is_large(hidden_states)
        return attends_itself and attention_mask is None and large

    def _is_large(self, hidden_states: torch.Tensor) -> bool:
        size = self._size(hidden_states)
        if size is None:
            return False
        band = self.bands.sized(*size)
        return self.blocks(*band.size) or not band.alone

    def blocks(self, height: int, width: int) -> bool:
        """Whether a map of so many tokens is attended in blocks."""
        return height * width > self.blocking.full_tokens

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
        if self.tile is not None:
            return self.of_tile(original, hidden_states, *self.tile, kwargs)
        if isinstance(hidden_states, StoredMap) and self._comes_in_tiles(hidden_states):
            return self._tile_by_tile(original, hidden_states, kwargs)
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

        band = self.bands.sized(*size)
        with at(self.path), self._normalizing(cells.permute(0, 3, 1, 2), band):
            if not self.blocks(*band.size):
                return self._attended_whole(original, plane, cells.flatten(1, 2), band, kwargs)
            attend = self._attending(original, cells.flatten(1, 2), band, kwargs)

            def attended(tile: Tile, block: torch.Tensor) -> torch.Tensor:
                return attend(block.flatten(1, 2), tile).reshape(len(cells), *tile.size(), -1)

            result = self._visit(band, cells, attended, output)
        return result.permute(0, 3, 1, 2) if plane.ndim == 4 else result.flatten(1, 2)

    def _visit(self, band: Band, cells: torch.Tensor, attended: Compute, make: Forward) -> torch.Tensor:
        return dealt_out(band, cells, self._cut(*band.size), attended, make)

    def _attended_whole(
        self, original: Forward, plane: torch.Tensor, tokens: torch.Tensor, band: Band, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """A band's attention to all of its map: of `plane` as it was given, whose `tokens` are these."""
        everything = band.all_tokens(tokens)
        if "encoder_hidden_states" not in kwargs and self.of_tile.takes_other_keys:
            return original(plane, encoder_hidden_states=self.of_tile.prepared(everything), **kwargs)
        # What takes no other keys does all of it, in every process.
        result = band.own_tokens(self.of_tile.among_themselves(original, everything, kwargs))
        return result if plane.ndim == 3 else as_map(result, (plane.shape[2], plane.shape[3]))

    def _normalizing(self, plane: torch.Tensor, band: Band) -> AbstractContextManager[None]:
        """Inside, whatever part of the map the attention sees is normalized as all of it is."""
        norm = self.attention.group_norm
        if norm is None:
            return nullcontext()
        return sharing_statistics(norm, band.pooled(record_by_rows(plane, norm.num_groups)))

    def _comes_in_tiles(self, plane: StoredMap) -> bool:
        """Whether a map is on the host and stays there."""
        away = plane.away and plane.host is not None and plane.host.is_large(plane)
        return away and not torch.is_grad_enabled()

    def _tile_by_tile(self, original: Forward, plane: StoredMap, kwargs: dict[str, Any]) -> torch.Tensor:
        plane = plane.claim() if plane.passing else plane
        tokens = TokenMap.of(plane)
        band = self.bands.of(plane)
        with self._normalizing(plane, band):
            attend = self._attending(original, tokens, band, kwargs)
            over = plane.passing and self.sees_tiles
            return tile_by_tile(tokens, self._cut(*tokens.map_size), lambda tile, block: attend(block, tile), over)

    def _size(self, hidden_states: torch.Tensor) -> tuple[int, int] | None:
        """(height, width) of the map that hidden states are, or are the cells of; None where they are neither."""
        if self.map_note is None:
            return (hidden_states.shape[2], hidden_states.shape[3]) if hidden_states.ndim == 4 else None
        size = self.map_note.size
        return size if size and hidden_states.ndim == 3 and hidden_states.shape[1] == size[0] * size[1] else None

    def cover(self, height: int, width: int) -> Tiling:
        """The tiles of a map of so many tokens, at this step."""
        return self._cut(height, width)

    def _cut(self, height: int, width: int) -> Tiling:
        return self.blocking.cover(height, width, (self.layer + self.step_note.step) % PHASES)

    def _attending(
        self, original: Forward, tokens: torch.Tensor, band: Band, kwargs: dict[str, Any]
    ) -> Callable[[torch.Tensor, Tile], torch.Tensor]:
        """What gives the attention of the tokens of a tile, ``[B, tile.area, C]``, to those of the map."""
        context = self.context_of(tokens, band.size, self.of_tile.prepared, band)
        return lambda block, tile: self.of_tile(original, block, tile, context, kwargs)

    def context_of(
        self,
        tokens: torch.Tensor,
        size: Sequence[int],
        prepare: Callable[[torch.Tensor], torch.Tensor],
        band: Band | None = None,
    ) -> Context | None:
        """The context that each tile of a map's tokens ``[B, N, C]`` attends to; for the rest see `Context`."""
        if not self.blocking.context:
            return None
        height, width = size
        seed = f"layer {self.layer} step {self.step_note.step}"
        return Context(self.attention, tokens, (height, width), self.blocking.context, seed, prepare, band)


def blocking_of(options: Any, context: int = CONTEXT) -> Blocking:
    """As the ``attn_`` options say, with so much `context` where they do not."""
    context = context if options.attn_context is None else options.attn_context
    return Blocking(options.attn_shape, options.attn_slice_y, options.attn_slice_x, options.attn_full_tokens, context)
