"""Attention of the tokens of one tile, by the attention's original forward: to themselves, and to a context."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)

from ...core.pieces import rehearsing
from ...core.tilings import Tile
from .context import Context
from .log_weights import WeightedKeys

# Processors that take the keys of self-attention from ``encoder_hidden_states`` too, where these are given. Others
# (fused projections, perturbed-attention guidance, what users write) need not.
TAKES_OTHER_KEYS = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)

# Processors whose calls of ``scaled_dot_product_attention`` get what ``to_q``, ``to_k`` and ``to_v`` make of tokens and
# no more than that: what a context lacks is known for these alone.
PROJECTS_PLAINLY = (AttnProcessor2_0, AttnAddedKVProcessor2_0, FusedAttnProcessor2_0)

# What tiles must know the inside of: ``forward`` hands everything to the processor, which takes keys from
# ``encoder_hidden_states`` and adds a mask ``[B, 1, K]`` to their scores; the one for text beside a map wants a map.
LEANS_ON = (
    "diffusers.models.attention_processor.Attention.forward",
    "diffusers.models.attention_processor.Attention.prepare_attention_mask",
    *(
        f"diffusers.models.attention_processor.{processor.__name__}.__call__"
        for processor in (*TAKES_OTHER_KEYS, *PROJECTS_PLAINLY[1:])
    ),
)

Forward = Callable[..., torch.Tensor]


class TileAttention:
    """How the tokens ``[B, tile.area, C]`` of a tile attend.

    Args:
        attention: whose it is.
        warned: the processors of which it has been said that they cannot be told the context's weights.
    """

    def __init__(self, attention: Attention, warned: set[str]) -> None:
        self.attention: Any = attention
        self.warned = warned

    @property
    def takes_other_keys(self) -> bool:
        """Whether keys may be given beside the queries."""
        return type(self.attention.processor) in TAKES_OTHER_KEYS

    def __call__(
        self, original: Forward, block: torch.Tensor, tile: Tile, context: Context | None, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        if context is None:
            return self.among_themselves(original, block, kwargs)
        both = torch.cat([block, context.tokens], dim=1)
        text = kwargs.get("encoder_hidden_states")
        before = tile.area if text is None else text.shape[1] + tile.area
        log_weights = F.pad(context.log_weights(tile), (before, 0))
        processor = type(self.attention.processor)
        known = context.calibration is not None and processor in PROJECTS_PLAINLY
        corrected = partial(context.corrected, tile, before - tile.area) if known else None
        if text is None and processor is AttnProcessor2_0:
            with WeightedKeys(log_weights, corrected):
                return original(block, **kwargs, encoder_hidden_states=self.prepared(both))
        if text is None and self.takes_other_keys:
            mask = log_weights.to(block.dtype)
            return original(block, **kwargs, encoder_hidden_states=self.prepared(both), attention_mask=mask)
        with WeightedKeys(log_weights, corrected) as weighted:
            result = self.among_themselves(original, both, kwargs)
        if weighted.met:
            return result[:, : tile.area]
        # An attention that computes its scores in its own way cannot be told the weights.
        self._warn(processor.__name__)
        return self.among_themselves(original, block, kwargs)

    def among_themselves(self, original: Forward, tokens: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Attention of tokens ``[B, N, C]`` to each other."""
        if self.attention.added_kv_proj_dim is None:
            return original(tokens, **kwargs)
        # Processors that add text to the keys take maps alone.
        return original(tokens.transpose(1, 2)[..., None], **kwargs).flatten(2).transpose(1, 2)

    def prepared(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the attention makes of tokens ``[B, N, C]`` before it projects them."""
        if self.attention.group_norm is None:
            return tokens
        normalized: torch.Tensor = self.attention.group_norm(tokens.transpose(1, 2))
        return normalized.transpose(1, 2)

    def _warn(self, processor: str) -> None:
        if processor not in self.warned and not rehearsing():
            self.warned.add(processor)
            warnings.warn(
                f"attn_context: {processor} does not call scaled_dot_product_attention and cannot be told the weights "
                "of a context, so its blocks attend to themselves alone",
                RuntimeWarning,
                stacklevel=2,
            )
