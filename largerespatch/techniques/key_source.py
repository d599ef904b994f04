"""What the parts of a tile attend to in joint attention: the tile, the text, and each a context of its own."""

import math

import torch

from ..core.pieces import assemble
from ..core.tilings import sampled_cells
from .context import uploaded
from .joining import Attending
from .joint_tokens import Maps, Piece
from .pooled import Keys, PooledMap

# How often a tile is cut in two for its context, since queries that lie together look for the same, and the fewest that
# are worth a context of their own.
HALVINGS, FEWEST = 3, 64

# Keys of a tile that say how much it attends to itself, and queries of a part that say what it attends to.
JUDGED, JUDGES = 256, 32


class KeySource:
    """Keys and values ``[B, heads, tokens, C]`` of all tokens, for one of a block's attentions.

    Those of the cells of `maps` come after `first` others. `context` is the number of keys that stand for each map.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, maps: Maps, first: int, context: int) -> None:
        self.keys, self.values = keys, values
        sizes = zip(maps, maps.runs(), strict=True) if context else ()
        self.pooled = [PooledMap(keys, values, size, context, first + run.start) for size, run in sizes]

    def attended(self, attending: Attending, piece: Piece, text_too: bool) -> torch.Tensor:
        """The attention of a piece's tokens to the piece, the text and their context; that of the text to all, or none.

        Each part of the piece has a context of its own.
        """
        device = attending.given["query"].device
        result = attending.nothing()
        if text_too and attending.others:
            result[:, :, attending.text] = attending.among(self.keys, self.values)
        seen = attending.part("key", attending.image_keys)[:, :, uploaded(_spread(piece, JUDGED), device)]

        def places(part: Piece) -> torch.Tensor:
            there: torch.Tensor = piece.places(part, device) + attending.image.start
            return there

        def joined(part: Piece) -> torch.Tensor:
            there = places(part)
            return attending.joined(there, self._context(attending, piece, part, there, seen))

        halvings = min(HALVINGS, (piece.area // FEWEST).bit_length() - 1)
        parts = piece.parts(max(halvings, 0) if self.pooled else 0)
        assemble(parts, joined, place=lambda part: (slice(None), slice(None), places(part)), into=result)
        return result

    def _context(
        self, attending: Attending, piece: Piece, part: Piece, places: torch.Tensor, seen: torch.Tensor
    ) -> list[Keys]:
        """Of a part of a piece, whose queries are at `places`. Some keys of the piece are `seen`, for all of them."""
        if not self.pooled:
            return []
        judging = places[uploaded(_spread(part, JUDGES), places.device)]
        judges = attending.grouped(attending.part("query", judging))
        total = (judges @ seen.float().transpose(-1, -2)).logsumexp(dim=-1, keepdim=True)
        total = total + math.log(piece.area / seen.shape[2])
        pairs = zip(self.pooled, piece.tiles, strict=True)
        return [pooled.chosen(tile, judges, total) for pooled, tile in pairs]


def _spread(piece: Piece, count: int) -> list[int]:
    """Places of about so many tokens among a piece's, spread evenly."""
    places: list[int] = []
    start = 0
    for tile in piece.tiles:
        if tile.area:
            places += [
                start + cell for cell in sampled_cells(*tile.size(), max(count // len(piece.tiles), 1), "judges")
            ]
        start += tile.area
    return places
