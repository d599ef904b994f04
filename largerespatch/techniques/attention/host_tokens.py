"""A transformer whose tokens are on the host, where its map is large: block by block, tile by tile.

Once it is known what context the tiles of a map share, all that a transformer block does to a tile's tokens depends on
that tile alone. So a tile comes to the device, goes through the whole block, and its result takes its place. Blocked
attention is as approximate as ever; that tokens are on the host changes nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from ...core.families import Order, Site
from ...core.maps import StoredMap
from ...core.modules import named_modules
from ...core.pieces import assemble, side_by_side
from ...core.planes import fetch
from ...core.statistics import GivenStatistics
from ...core.tilings import Tile
from ...core.tokens import TokenMap, as_map, tile_by_tile
from ..chunks import can_be_chunked, sees_single_tokens
from ..listening import listeners
from ..strips.cuts import rows_of
from ..strips.host_strips import HostStrips
from ..strips.strips import is_differentiated
from .blocked import BlockedAttention

# What tokens on the host must know the inside of: that a transformer makes tokens of its map by a group norm and what
# looks at cells one by one, passes them from block to block, and that what follows looks at them one by one.
LEANS_ON = (
    "diffusers.models.transformers.transformer_2d.Transformer2DModel.forward",
    "diffusers.models.transformers.transformer_2d.Transformer2DModel._operate_on_continuous_inputs",
    "diffusers.models.transformers.transformer_2d.Transformer2DModel._get_output_for_continuous_inputs",
    "diffusers.models.attention.BasicTransformerBlock.forward",
)


class HostInput:
    """Takes the place of what makes tokens of a transformer's map ``[B, C, H, W]``.

    Those of a large map are on the host; blocks may write over them where no hook of the user may keep them.
    """

    def __init__(self, transformer: Any, strips: HostStrips) -> None:
        self.transformer = transformer
        self.strips = strips

    def applies(self, hidden_states: torch.Tensor) -> bool:
        large = self.strips.host.takes(hidden_states, hidden_states.shape)
        return large and not is_differentiated(self.transformer, hidden_states)

    def __call__(self, original: Callable[..., Any], hidden_states: torch.Tensor) -> tuple[TokenMap, int]:
        strips = self.strips
        statistics = strips.statistics(hidden_states, self.transformer.norm)
        passing = not listeners(self.transformer)

        def compute(strip: Tile, rows: torch.Tensor) -> torch.Tensor:
            with GivenStatistics(statistics):
                tokens, _ = original(rows)
            return as_map(tokens, strip.size())

        def empty(part: torch.Tensor) -> StoredMap:
            shape = (*part.shape[:2], *hidden_states.shape[2:])
            return StoredMap.empty(shape, part, strips.host, passing)

        tokens = assemble(strips.cut(hidden_states), compute, rows_of, empty, read=_reading(hidden_states))
        return TokenMap.of(tokens), tokens.shape[1]


class HostOutput:
    """Takes the place of what makes a transformer's result of tokens and of the map that it was given."""

    def __init__(self, strips: HostStrips) -> None:
        self.strips = strips

    def applies(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> bool:
        return isinstance(hidden_states, TokenMap)

    def __call__(
        self, original: Callable[..., torch.Tensor], hidden_states: TokenMap, residual: torch.Tensor, **others: Any
    ) -> torch.Tensor:
        def compute(strip: Tile, given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            tokens, rows = given
            size = {"height": strip.height, "width": strip.width}
            return original(hidden_states=tokens, residual=rows, **others | size)

        def read(strips: Sequence[Tile]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            return side_by_side(hidden_states.tiles(strips), _reading(residual)(strips))

        return assemble(  # type: ignore[no-any-return]
            self.strips.cut(residual),
            compute,
            rows_of,
            make=lambda part: self.strips.empty(part, (*part.shape[:2], *residual.shape[2:])),
            read=read,
        )


class TiledBlock:
    """Takes the place of ``BasicTransformerBlock.forward`` for tokens that are on the host.

    What cannot be done tile by tile is done to all of them on the device: a map that is attended whole, and calls whose
    other arguments concern single tokens.
    """

    def __init__(self, block: BasicTransformerBlock, blocked: BlockedAttention) -> None:
        self.block: Any = block
        self.blocked = blocked

    def applies(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> bool:
        return isinstance(hidden_states, TokenMap)

    def __call__(self, original: Callable[..., torch.Tensor], tokens: TokenMap, *args: Any, **kwargs: Any) -> Any:
        height, width = tokens.map_size
        if args or not self.blocked.blocks(height, width) or not sees_single_tokens(self.block, kwargs):
            return original(tokens.whole(), *args, **kwargs)
        if tokens.passing:
            tokens = tokens.claim()
        norm, blocked = self.block.norm1, self.blocked
        context = blocked.context_of(tokens, tokens.map_size, norm)
        if context is not None:
            context.tokens = norm(context.tokens)  # a tile's own are normalized when attention gets them

        def compute(tile: Tile, cells: torch.Tensor) -> torch.Tensor:
            with blocked.seeing(tile, context):
                return original(cells, **kwargs)

        return TokenMap.of(tile_by_tile(tokens, blocked.cover(height, width), compute, over=tokens.passing))


def _reading(plane: torch.Tensor) -> Callable[[Sequence[Tile]], Iterator[torch.Tensor]]:
    return lambda strips: fetch(plane, [(strip.top, strip.bottom) for strip in strips])


def token_sites(
    model: nn.Module, name: str, strips: HostStrips, blocked: Mapping[nn.Module, BlockedAttention]
) -> Iterator[Site]:
    """The transformers of a U-Net that are given maps; `blocked` is what takes the place of their self-attentions."""
    for path, module in named_modules(model, name):
        if isinstance(module, BasicTransformerBlock) and can_be_chunked(module) and module.attn1 in blocked:
            yield Site(module, path, Order.IN_TILES, TiledBlock(module, blocked[module.attn1]))
        elif getattr(module, "is_input_continuous", False) and isinstance(module.norm, nn.GroupNorm):
            first, last = "_operate_on_continuous_inputs", "_get_output_for_continuous_inputs"
            yield Site(module, path, Order.IN_STRIPS, HostInput(module, strips), first)
            yield Site(module, path, Order.IN_STRIPS, HostOutput(strips), last)
