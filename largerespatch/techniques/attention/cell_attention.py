"""Attention of a model's own class that is given maps, as autoencoders have it: in chunks, exact, or in blocks.

It has one head; its norm, its projections and all else act on single cells. So its original forward attends among
whatever cells it is given, as a map of one column.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from ...core.bands import ALONE, Bands
from ..notes import StepNote
from .blocked import BlockedAttention, Blocking
from .chunked_attention import ChunkedAttention, OtherKeys
from .tile_attention import Forward


@dataclass(frozen=True)
class Projections:
    """What blocked attention and its context ask of an attention, answered for one of another class.

    `query` is what it makes of maps, `others` are key and value; of maps that are normalized, if by a `group_norm`.
    """

    query: Callable[[torch.Tensor], torch.Tensor]
    others: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    scale: float
    group_norm: nn.Module | None = None
    added_kv_proj_dim = norm_q = norm_k = None
    heads = 1
    processor = AttnProcessor2_0()  # it can be given other keys, and their weights

    def to_q(self, tokens: torch.Tensor) -> torch.Tensor:
        return _tokens(self.query(_column(tokens)))

    def to_k(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.to_others(tokens)[0]

    def to_others(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        return list(map(_tokens, self.others(_column(tokens))))


class ChunkedCells(ChunkedAttention):
    """In chunks of queries. What is projected jointly would be large for a whole map."""

    def _projected(self, tokens: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.attention.to_others(tokens)  # type: ignore[no-any-return]

    def _attend(self, original: Forward, tokens: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
        return original(tokens, keys_and_values=others)


class CellAttention:
    """Takes the place of the ``forward`` of such an attention, for maps ``[B, C, H, W]``.

    torch's kernels for attention want heads. Where the original has none it holds the scores of all tokens for all
    others, so maps of over `least` cells get one head where they are attended whole.

    Args:
        projections: what it projects by.
        blocking: how it is blocked; None: in chunks.
        layer: its place among the attentions of its model.
        bands: of several processes each has a band of the map, one of these.
    """

    def __init__(
        self, projections: Projections, blocking: Blocking | None, layer: int, least: int, bands: Bands = ALONE
    ) -> None:
        self.projections = projections
        attention: Any = projections
        self.technique = (
            ChunkedCells(attention, bands)
            if blocking is None
            else BlockedAttention(attention, blocking, StepNote(), layer, bands=bands)
        )
        self.least = least

    def applies(self, hidden_states: torch.Tensor) -> bool:
        return hidden_states.shape[-2:].numel() > self.least or self.technique.applies(hidden_states)

    def __call__(self, original: Forward, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.technique.applies(hidden_states):
            result: torch.Tensor = self.technique(partial(self._attend, original), hidden_states)
            return result
        with OtherKeys():
            return original(hidden_states)

    def _attend(
        self,
        original: Forward,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        keys_and_values: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """What the original makes of a map or of tokens, with given keys and values, or those of other tokens,
        normalized."""
        if encoder_hidden_states is not None:
            # Else torch's kernels would not take them, and there would be scores of all for all.
            keys_and_values = [each.contiguous() for each in self.projections.to_others(encoder_hidden_states)]
        with OtherKeys(*keys_and_values):
            return original(hidden_states) if hidden_states.ndim == 4 else _tokens(original(_column(hidden_states)))


def _column(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens ``[B, N, C]`` as a map ``[B, C, N, 1]``."""
    return tokens.transpose(1, 2)[..., None]


def _tokens(plane: torch.Tensor) -> torch.Tensor:
    """The cells of a map ``[B, C, h, w]`` as tokens ``[B, h * w, C]``."""
    return plane.flatten(2).transpose(1, 2)
