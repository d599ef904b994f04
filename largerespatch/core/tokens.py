"""The cells of a map as tokens, which are read and written tile by tile, in runs, or one by one. Exact.

`runs_of` and `picked` read plain tensors ``[B, N, C]`` and maps alike.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import ceil

import torch

from .hosts import HostRows
from .maps import StoredMap, TurnedMap
from .pieces import assemble
from .tilings import Run, Tile


class TokenMap(TurnedMap):
    """The cells of a map ``[B, C, H, W]``, row after row, as tokens ``[B, H * W, C]``. All else is done to the whole.

    Where it lives follows from where that map does.
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
