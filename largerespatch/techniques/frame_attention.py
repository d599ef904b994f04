"""The attention of films' autoencoders, each frame to itself alone: of a single frame, in chunks or blocks.

It has one head, and a norm and projections of its own that act on single cells: so its original forward attends among
whatever cells it is given, as a map of one column. In chunks it is exact, in blocks approximate.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..core.pieces import assemble
from ..core.planes import whole
from ..core.tilings import Tile, Tiling, even_cuts
from .attention import QUERIES, BlockedAttention, Blocking, Forward
from .notes import StepNote

# What chunks and blocks must know the inside of: that it calls ``F.scaled_dot_product_attention`` once, on queries,
# keys and values ``[B * T, 1, N, C]``, and that all else acts on single cells.
LEANS_ON = (
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage.QwenImageAttentionBlock.forward",
    "diffusers.models.autoencoders.autoencoder_kl_wan.WanAttentionBlock.forward",
)


class _Projections:
    """What `BlockedAttention` and its `Context` ask of an attention, answered for one with a joint projection."""

    group_norm = added_kv_proj_dim = norm_q = norm_k = None
    heads = 1

    def __init__(self, block: Any) -> None:
        self.processor = self.block = block
        self.scale = block.dim**-0.5

    def to_q(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._projected(tokens)[0]

    def to_k(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._projected(tokens)[1]

    def _projected(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _tokens(self.block.to_qkv(_column(tokens))).chunk(3, dim=-1)


class FrameAttention(BlockedAttention):
    """Takes the place of the ``forward`` of such an attention, for a map ``[B, C, H, W]`` or ``[B, C, 1, H, W]``."""

    def __init__(self, block: nn.Module, blocking: Blocking, layer: int) -> None:
        projections: Any = _Projections(block)
        super().__init__(projections, blocking, StepNote(), layer)

    def applies(self, hidden_states: torch.Tensor, *others: Any, **named: Any) -> bool:
        if hidden_states.ndim == 4:
            return True
        return hidden_states.shape[2] == 1 and self._is_large(hidden_states[:, :, 0]) and not torch.is_grad_enabled()

    def __call__(self, original: Forward, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.ndim == 5:
            return self._attend(original, hidden_states[:, :, 0])[:, :, None]
        if not self._is_large(hidden_states):
            return original(whole(hidden_states)[:, :, None])[:, :, 0]
        return self._attend(original, hidden_states)

    def _attend(self, original: Forward, plane: torch.Tensor) -> torch.Tensor:
        def among(tokens: torch.Tensor) -> torch.Tensor:
            return _tokens(original(_column(tokens)[:, :, None])[:, :, 0])

        attended: torch.Tensor = super().__call__(among, plane)
        return attended

    def _prepared(self, tokens: torch.Tensor) -> torch.Tensor:
        return _tokens(self.attention.block.norm(_column(tokens)))


class ChunkedFrameAttention(FrameAttention):
    """Attention to the whole map in chunks of `QUERIES`: exact, to rounding.

    Keys and values are kept: they come with the queries, chunk by chunk.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block, Blocking("tile", 1, 1, QUERIES), 0)

    def _cut(self, height: int, width: int) -> Tiling:
        return Tiling(even_cuts(height, max(QUERIES // width, 1)), even_cuts(width, QUERIES))

    def _attending(
        self, original: Forward, cells: torch.Tensor, kwargs: dict[str, Any]
    ) -> Callable[[torch.Tensor, Tile], torch.Tensor]:
        batch, height, width, channels = cells.shape

        def seen(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
            with _SeenKeys() as keys:
                original(cells[:, tile.rows, tile.columns].flatten(1, 2))
            return tuple(each.unflatten(2, tile.size()) for each in keys.seen)

        kept = assemble(
            self._cut(height, width),
            seen,
            place=lambda tile: (slice(None), slice(None), tile.rows, tile.columns),
            make=lambda some: tuple(each.new_empty(batch, 1, height, width, channels) for each in some),
        )
        keys, values = (each.flatten(2, 3) for each in kept)

        def attend(block: torch.Tensor, tile: Tile) -> torch.Tensor:
            with _GivenKeys(keys, values):
                return original(block)

        return attend


class _SeenKeys(TorchFunctionMode):
    """Notes keys and values in place of attending to them."""

    seen: tuple[torch.Tensor, torch.Tensor]

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen = args[1:3]
            return args[2]
        return func(*args, **(kwargs or {}))


class _GivenKeys(TorchFunctionMode):
    """Attends to given keys and values."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.given = keys, values

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            args = args[0], *self.given, *args[3:]
        return func(*args, **(kwargs or {}))


def _column(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens ``[B, N, C]`` as a map ``[B, C, N, 1]``."""
    return tokens.transpose(1, 2)[..., None]


def _tokens(column: torch.Tensor) -> torch.Tensor:
    """The inverse."""
    return column.flatten(2).transpose(1, 2)
