"""The cells of a map as tokens, which are read and written tile by tile, in runs, or one by one. Exact.

`runs_of` and `picked` read plain tensors ``[B, N, C]`` and maps alike.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from math import ceil
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .hosts import HostRows
from .maps import JoinedMap, StoredMap, TurnedMap
from .pieces import assemble
from .planes import OPERATIONS, Map, whole
from .tilings import Run, Tile


class TokenMap(TurnedMap):
    """The cells of a map ``[B, C, H, W]``, row after row, as tokens ``[B, H * W, C]``.

    Where it lives follows from where that map does. With other tokens before it or after it is `JoinedTokens`; all else
    is done to the whole.
    """

    turned: StoredMap

    @classmethod
    def of(cls, plane: StoredMap) -> "TokenMap":  # type: ignore[override]
        batch, channels, height, width = plane.shape
        return cls((batch, height * width, channels), plane, plane)

    @property
    def passing(self) -> bool:  # type: ignore[override]
        return self.turned.passing

    @property
    def map_size(self) -> tuple[int, int]:
        """(height, width) of the map."""
        return self.turned.shape[2], self.turned.shape[3]

    @property
    def away(self) -> bool:
        return self.turned.away

    def whole(self) -> torch.Tensor:
        return self.turned.whole().flatten(2).transpose(1, 2)

    def copied(self) -> torch.Tensor:
        return self.turned.copied().flatten(2).transpose(1, 2)

    def claim(self) -> "TokenMap":
        return TokenMap.of(self.turned.claim())

    def tiles(self, tiles: Sequence[Tile]) -> Iterator[torch.Tensor]:
        """The tokens of tiles, ``[B, tile.area, C]``, in turn. See `Map.fetch`."""
        memory = self.turned.memory
        if isinstance(memory, HostRows):
            return memory.host.fetch(memory, tiles, _tokens)
        return (memory[:, :, tile.rows, tile.columns].flatten(2).transpose(1, 2) for tile in tiles)

    def fetch(self, runs: Sequence[Run]) -> Iterator[torch.Tensor]:
        """Runs of tokens, ``[B, n, C]``, in turn."""
        _, width = self.map_size
        rows = [Tile(start // width, 0, ceil(stop / width), width) for start, stop in runs]
        yield from map(partial(_cropped, width), runs, self.tiles(rows))

    def picked(self, places: torch.Tensor) -> torch.Tensor:
        """Single tokens, ``[B, S, C]``, of places ``[B, S]``; where the map is on the host it waits for them."""
        memory, (_, width) = self.turned.memory, self.map_size
        if not isinstance(memory, HostRows):
            return _gathered(self.whole(), places)
        there = places.to(memory.host.where)
        return memory.pick(there // width, there % width).to(self.device)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _joins(func, *args, **kwargs or {}):
            return JoinedTokens.of(args[0])
        return super().__torch_function__(func, types, args, kwargs)


class JoinedTokens(JoinedMap):
    """Tokens ``[B, N, C]`` of several `parts`, one after another, of which some are those of maps.

    Each is there as it was. All else is done to the whole.
    """

    @classmethod
    def of(cls, parts: Sequence[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        """Those that there are any of; a single part is itself."""
        parts = [each for part in parts for each in parts_of(part) if each.shape[1]]
        if len(parts) == 1:
            return parts[0]
        batch, _, channels = parts[0].shape
        return cls((batch, sum(part.shape[1] for part in parts), channels), parts[0], parts, 1)

    @property
    def passing(self) -> bool:  # type: ignore[override]
        return any(isinstance(part, Map) and part.passing for part in self.parts)

    def copied(self) -> torch.Tensor:
        return torch.cat([part.copied() if isinstance(part, Map) else part for part in self.parts], dim=1)

    def fetch(self, runs: Sequence[Run]) -> Iterator[torch.Tensor]:
        tokens = self.whole()
        return (tokens[:, start:stop] for start, stop in runs)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__getitem__ and (part := args[0]._part(args[1])) is not None:
            return part
        if _joins(func, *args, **kwargs or {}):
            return JoinedTokens.of(args[0])
        if func in OPERATIONS:  # they know maps
            args, kwargs = tree_map_only(JoinedTokens, whole, (args, kwargs or {}))
            return func(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def _part(self, index: Any) -> torch.Tensor | None:
        """``tokens[:, first:last]``, if that is a part."""
        match index:
            case (slice(start=None, stop=None, step=None), slice(step=None) as run, *others) if others in ([], [...]):
                asked = run.indices(self.shape[1])[:2]
                edges = list(accumulate((part.shape[1] for part in self.parts), initial=0))
                return next((part for part, run in zip(self.parts, pairwise(edges), strict=True) if run == asked), None)
        return None


def parts_of(tokens: torch.Tensor) -> list[torch.Tensor]:
    """What some tokens are made of, one after another."""
    return tokens.parts if isinstance(tokens, JoinedTokens) else [tokens]


def _joins(func: object, parts: Any = (), dim: Any = 0, *_: object, **__: object) -> bool:
    """Whether a call is one of ``torch.cat`` that puts tokens after others, as many samples of as many channels."""
    if func is not torch.cat or dim != 1:
        return False
    kinds = {(part.ndim, len(part), part.shape[-1], part.dtype) for part in parts}
    return len(kinds) == 1 and parts[0].ndim == 3


def _tokens(cells: torch.Tensor) -> torch.Tensor:
    """``[B, h * w, C]`` of cells as they come from the host."""
    return cells.transpose(0, 1).flatten(1, 2)


def _cropped(width: int, run: Run, rows: torch.Tensor) -> torch.Tensor:
    start, stop = run
    first = start % width
    return rows[:, first : first + stop - start]


def _gathered(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))


def runs_of(tokens: torch.Tensor, runs: Sequence[Run]) -> Iterator[torch.Tensor]:
    """Runs of tokens, ``[B, n, C]``, in turn, on the device."""
    return tokens.fetch(runs) if isinstance(tokens, TokenMap) else (tokens[:, start:stop] for start, stop in runs)


def picked(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The tokens ``[B, S, C]`` at places ``[B, S]``, on the device."""
    return tokens.picked(places) if isinstance(tokens, TokenMap) else _gathered(tokens, places)


def tile_by_tile(
    tokens: TokenMap, cover: Sequence[Tile], compute: Callable[[Tile, torch.Tensor], torch.Tensor], over: bool
) -> StoredMap:
    """The map ``[B, C, H, W]`` of what `compute` makes of the tokens ``[B, tile.area, C]`` of each tile.

    It is written `over` those, or else to other memory, on the same host.
    """
    plane = tokens.turned

    def computed(tile: Tile, cells: torch.Tensor) -> torch.Tensor:
        return as_map(compute(tile, cells), tile.size())

    return assemble(  # type: ignore[no-any-return]
        cover,
        computed,
        place=lambda tile: (slice(None), slice(None), tile.rows, tile.columns),
        make=lambda part: StoredMap.empty((*part.shape[:2], *tokens.map_size), part, plane.host, plane.passing),
        into=plane if over else None,
        read=tokens.tiles,
    )


def as_map(tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """``[B, C, h, w]`` of tokens ``[B, h * w, C]``."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *size)
