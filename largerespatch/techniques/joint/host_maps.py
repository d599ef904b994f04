"""Memory of the host for the tokens of maps, which come and go piece by piece. Exact."""

from collections.abc import Iterator, Sequence

import torch

from ...core.hosts import Host
from ...core.maps import StoredMap
from ...core.pieces import side_by_side
from ...core.tokens import TokenMap, as_map
from .tokens import Maps, Piece


class HostMaps:
    """Tokens ``[B, N, C]`` of maps, one after another, those of each in a plane ``[B, C, H, W]``."""

    def __init__(self, planes: Sequence[StoredMap]) -> None:
        self.planes = planes

    @classmethod
    def empty(cls, host: Host, maps: Maps, like: torch.Tensor, passing: bool = False) -> "HostMaps":
        """For as many channels of as many samples as `like` has."""
        batch, _, channels = like.shape
        return cls([StoredMap.empty((batch, channels, *size), like, host, passing) for size in maps])

    def __setitem__(self, piece: Piece, tokens: torch.Tensor) -> None:
        parts = tokens.split_with_sizes([tile.area for tile in piece.tiles], dim=1)
        for plane, tile, part in zip(self.planes, piece.tiles, parts, strict=True):
            if tile.area:
                plane.write(tile, as_map(part, tile.size()))

    @property
    def tokens(self) -> list[TokenMap]:
        """Of each map."""
        return [TokenMap.of(plane) for plane in self.planes]

    def of(self, pieces: Sequence[Piece]) -> Iterator[Sequence[torch.Tensor]]:
        """Of each map those of some pieces, ``[B, n, C]``, in turn."""
        tiles = zip(*(piece.tiles for piece in pieces), strict=True)
        return side_by_side(*(each.tiles(some) for each, some in zip(self.tokens, tiles, strict=True)))
