"""Blocked self-attention: each tile of a feature map attends to itself, in tilings that change from step to step.

Approximate: equal to dense attention under a block mask, to rounding, because projections act on single tokens.
What one step separates another one joins (see `largerespatch.tilings`), so information crosses the whole map.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from .groupnorm import GivenStatistics, record
from .patching import PatchStack
from .tilings import PHASES, Tile, bricks, tiles

COVERS: dict[str, Callable[[int, int, int, int, int], list[Tile]]] = {"brick": bricks, "tile": tiles}


@dataclass(frozen=True)
class Blocking:
    """How self-attention is blocked: `shape` is a key of `COVERS`, slices and `full_tokens` count tokens."""

    shape: str
    slice_y: int
    slice_x: int
    full_tokens: int

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


class BlockedAttention:
    """Takes the place of ``Attention.forward``; every tile goes through the original.

    A call is blocked when it is self-attention without a mask over the noted map and that map is larger than
    `Blocking.full_tokens`; any other call is passed on as it is. The phase depends on the layer's place among the
    attentions of its model and on the denoising step alone.
    """

    def __init__(self, blocking: Blocking, map_note: MapNote, step_note: StepNote, layer: int) -> None:
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
        output = None
        for tile in self.blocking.cover(height, width, (self.layer + self.step_note.step) % PHASES):
            block = plane[:, tile.rows, tile.columns].reshape(batch, tile.area, channels)
            result = original(block, **kwargs)
            if output is None:
                output = result.new_empty(batch, height, width, result.shape[-1])
            output[:, tile.rows, tile.columns] = result.view(batch, tile.height, tile.width, -1)
        assert output is not None  # a tiling has at least one tile
        return output.view(batch, tokens, -1)


class BlockedMapAttention:
    """Takes the place of the ``forward`` of an attention that is given a map ``[B, C, H, W]`` (Kandinsky's U-Net).

    Such an attention normalizes the map by groups first; its tiles get the statistics of the whole map. Text that it
    attends to beside the map is seen by every tile. What is blocked, and in which phase, is as for `BlockedAttention`.
    """

    def __init__(self, blocking: Blocking, attention: Attention, step_note: StepNote, layer: int) -> None:
        self.blocking = blocking
        self.attention: Any = attention
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
        kwargs["encoder_hidden_states"] = encoder_hidden_states
        attends_itself = encoder_hidden_states is None or self.attention.added_kv_proj_dim is not None
        large = hidden_states.ndim == 4 and hidden_states.shape[-2:].numel() > self.blocking.full_tokens
        if attends_itself and attention_mask is None and large:
            return self._blocked(original, hidden_states, **kwargs)
        return original(hidden_states, attention_mask=attention_mask, **kwargs)

    def _blocked(
        self, original: Callable[..., torch.Tensor], hidden_states: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        norm = self.attention.group_norm
        height, width = hidden_states.shape[-2:]
        statistics = record(hidden_states, norm.num_groups)

        def normalize(original: Callable[..., torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
            with GivenStatistics(statistics):
                return original(tokens)

        output = torch.empty_like(hidden_states)
        with PatchStack() as stack:
            stack.wrap(norm, "forward", normalize, "group_norm.forward")
            for tile in self.blocking.cover(height, width, (self.layer + self.step_note.step) % PHASES):
                block = hidden_states[:, :, tile.rows, tile.columns].contiguous()
                output[:, :, tile.rows, tile.columns] = original(block, **kwargs)
        return output
