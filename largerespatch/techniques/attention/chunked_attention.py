"""A VAE's attention to its whole map, in chunks of its queries: the exact case of blocks, where every tile sees all."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.overrides import TorchFunctionMode

from ...core.bands import ALONE, Band, Bands
from ...core.dealt_tiles import Compute, dealt_out
from ...core.maps import StoredMap
from ...core.pieces import assemble
from ...core.tilings import Tile, Tiling, even_cuts
from ...core.tokens import TokenMap
from ..notes import StepNote
from .blocked import BlockedAttention, Blocking
from .context import with_heads
from .key_runs import KeysInRuns
from .tile_attention import Forward

# Queries of a chunk: enough to keep a device busy, and to make the projection of the keys for each chunk a small part.
# An H200 takes 1.6 microseconds a query of 512 channels in chunks of 2^12, 0.96 in those of 2^13, 1.0 to 1.1 in larger.
QUERIES = 2**13


class ChunkedAttention(BlockedAttention):
    """Attention to a whole map in chunks of `QUERIES`: exact, to rounding. In the mid blocks of VAEs.

    Keys and values are the same for all chunks. They come chunk by chunk as well, once, and are kept; where the
    processor cannot be given them they are projected anew for each chunk. Of a map that is on the host, and stays
    there, keys come in runs. Smaller maps and calls that are differentiated or that bring something else along go
    through the original.
    """

    sees_tiles = False

    def __init__(self, attention: Attention, bands: Bands = ALONE) -> None:
        super().__init__(attention, Blocking("tile", 1, 1, QUERIES), StepNote(), 0, bands=bands)

    def applies(self, hidden_states: torch.Tensor, *others: Any, **named: Any) -> bool:
        alone = all(value is None for value in (*others, *named.values()))
        return alone and self._is_large(hidden_states) and not torch.is_grad_enabled()

    def blocks(self, height: int, width: int) -> bool:
        return self.of_tile.takes_other_keys and super().blocks(height, width)

    def _cut(self, height: int, width: int) -> Tiling:
        return Tiling(even_cuts(height, max(QUERIES // width, 1)), even_cuts(width, QUERIES))

    def _visit(self, band: Band, cells: torch.Tensor, attended: Compute, make: Forward) -> torch.Tensor:
        return dealt_out(ALONE.sized(*cells.shape[1:3]), cells, self._cut(*cells.shape[1:3]), attended, make)

    @property
    def _takes_keys(self) -> bool:
        """Whether keys that are projected can be given to the processor; others compute their scores themselves."""
        return type(self.attention.processor) is AttnProcessor2_0

    def _comes_in_tiles(self, plane: StoredMap) -> bool:
        return super()._comes_in_tiles(plane) and self._takes_keys

    def _attending(
        self, original: Forward, tokens: torch.Tensor, band: Band, kwargs: dict[str, Any]
    ) -> Callable[[torch.Tensor, Tile], torch.Tensor]:
        if isinstance(tokens, TokenMap):
            return partial(self._attend_in_runs, original, tokens)
        if not self._takes_keys or self.attention.norm_k is not None:
            prepared = band.all_tokens(self.of_tile.prepared(tokens)).contiguous()
            return lambda block, tile: original(block, encoder_hidden_states=prepared)
        cells = tokens.reshape(len(tokens), -1, band.rows.width, tokens.shape[2])

        def projected(tile: Tile) -> tuple[torch.Tensor, ...]:
            block = self.of_tile.prepared(cells[:, tile.rows, tile.columns].flatten(1, 2))
            return tuple(each.reshape(len(each), *tile.size(), -1) for each in self._projected(block))

        kept = assemble(
            self._cut(*cells.shape[1:3]),
            projected,
            place=lambda tile: (slice(None), tile.rows, tile.columns),
            make=lambda some: tuple(each.new_empty(*cells.shape[:3], each.shape[-1]) for each in some),
        )
        others = [band.all_tokens(each.flatten(1, 2)) for each in kept]
        return lambda block, tile: self._attend(original, block, others)

    def _projected(self, tokens: torch.Tensor) -> Sequence[torch.Tensor]:
        """Keys and values of normalized tokens ``[B, N, C]``."""
        return self.attention.to_k(tokens), self.attention.to_v(tokens)

    def _attend(self, original: Forward, tokens: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
        with OtherKeys(*others):
            return original(tokens, encoder_hidden_states=tokens[:, :1])  # which the others take the place of

    def _attend_in_runs(self, original: Forward, tokens: TokenMap, block: torch.Tensor, tile: Tile) -> torch.Tensor:
        with KeysInRuns(tokens, self._keys_and_values):
            return original(block)

    def _keys_and_values(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of tokens ``[B, n, C]``, as ``[B, heads, n, C]``."""
        key, value = (with_heads(each, self.attention.heads) for each in self._projected(self.of_tile.prepared(tokens)))
        norm = self.attention.norm_k
        return key if norm is None else norm(key), value


class OtherKeys(TorchFunctionMode):
    """Gives ``F.scaled_dot_product_attention`` other keys and values ``[B, N, C]``, and heads if need be.

    torch's kernels want heads. Where queries ``[B, N, C]`` come without they get one, and without other keys, too.
    """

    def __init__(self, *others: torch.Tensor) -> None:
        super().__init__()
        self.others = others

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, *given = args
        heads = query.shape[1] if query.ndim == 4 else 1
        result = func(*(with_heads(each, heads) for each in (query, *(self.others or given))), **(kwargs or {}))
        return result if query.ndim == 4 else result[:, 0]


def in_blocks_or_chunks(
    attention: Any, blocking: Blocking | None, layer: int, bands: Bands = ALONE
) -> BlockedAttention:
    """For an attention to a map, the `layer`-th of its model: in chunks where it is not said how it is blocked."""
    if blocking is None:
        return ChunkedAttention(attention, bands)
    return BlockedAttention(attention, blocking, StepNote(), layer, bands=bands)
