"""Joint attention of a map that several processes have bands of: each does some heads of it, for all tokens.

All else that a transformer block does it does token by token, so in bands. What a head does, for which tile and with
which context, is what it does in one process. Exact, as far as that is.
"""

from collections.abc import Iterator, Sequence

import torch

from ...core.band_rows import rounds
from ...core.bands import Band
from ...core.dealt_heads import DealtAttention
from ...core.pieces import Putting, assemble
from ...core.tilings import Each, Run, Tile
from .joining import Attending
from .key_source import by_tiles
from .one_call import Read, Walk
from .tokens import Maps, Piece

# How all tokens of the heads that are done here attend, and which heads these are.
_Known = tuple[DealtAttention, Attending]

# By process, several tensors of the tokens that it has.
_Parts = list[list[torch.Tensor]]


class SharedSources:
    """The attentions of a block that runs on the rows of a `band`, piece by piece; see `KeySources`.

    The whole map is attended in the tiles of `cover`, or at once where that is none or one. Pieces are as large as a
    tile, the whole band where it is attended at once; every process has as many.
    """

    asks = True

    def __init__(self, band: Band, cover: Sequence[Tile], context: int) -> None:
        self.band, self.cover, self.context = band, cover, context
        self.maps = Maps([band.size])
        (first, _), width = band.run, band.rows.width
        longest = max(cover[0].area // width, 1) if len(cover) > 1 else band.rows.tallest()
        self.runs = {
            Piece((Tile(each[band.bands.rank][0] - first, 0, each[band.bands.rank][1] - first, width),)): each
            for each in rounds(band.rows, longest)
        }
        self.pieces = list(self.runs)
        self.known: list[_Known] = []
        self.made: list[Sequence[torch.Tensor]] = []

    def learn(self, walk: Walk, read: Read) -> None:
        first: list[Attending] = []

        def compute(piece: Piece, tokens: torch.Tensor) -> list[_Parts]:
            met = walk(piece, tokens)
            first.extend(met if not self.known else ())
            return [self._received(attending, piece) for attending in met]

        def put(piece: Piece, received: Sequence[_Parts]) -> None:
            if not self.known:
                self.known.extend(map(self._room, first))
                first.clear()
            for known, parts in zip(self.known, received, strict=True):
                self._put(known, piece, parts)

        assemble(self.pieces, compute, place=lambda piece: piece, into=Putting(put), read=read)
        while self.known:
            self.made.append(self._given_back(*self._done(self.known.pop(0))))

    def of(self, pieces: Sequence[Piece]) -> Iterator[None]:
        return (None for _ in pieces)

    def attended(self, i: int, attending: Attending, piece: Piece, given: None, text_too: bool) -> torch.Tensor:
        if i == len(self.made):  # of a single piece nothing was learned before
            self.known.append(self._room(attending))
            self._put(self.known[0], piece, self._received(attending, piece))
            self.made.append(self._given_back(*self._done(self.known.pop())))
        text, image = self.made[i]
        result = attending.nothing()
        result[:, :, attending.image] = image[:, :, piece.tiles[0].top * self.band.rows.width :][:, :, : piece.area]
        if text_too:
            result[:, :, attending.text] = text
        return result

    def _tokens(self, run: Run) -> slice:
        """Of rows of the map."""
        return slice(run[0] * self.band.rows.width, run[1] * self.band.rows.width)

    def _received(self, attending: Attending, piece: Piece) -> _Parts:
        """By process, queries, keys and values of the tokens that it has of a piece, of heads that are done here."""
        dealt = DealtAttention(self.band, attending.given["key"].shape[1])
        counts = [(stop - start) * self.band.rows.width for start, stop in self.runs[piece]]
        return dealt.to_heads([attending.part(name, rows) for name, rows in attending.shares()], counts)

    def _room(self, attending: Attending) -> _Known:
        """The same call for all tokens of the map, of this process's heads: those of the image are not there yet."""
        dealt = DealtAttention(self.band, attending.given["key"].shape[1])
        for name, _ in attending.shares():
            dealt.count_sent(attending.given[name], (self.band.run[1] - self.band.run[0]) * self.band.rows.width)
        own, count = attending.of_heads(*dealt.shares[self.band.bands.rank]), self.maps.area
        return dealt, own.holding((own.with_room(name, count) for name, _ in own.shares()), count)

    def _put(self, known: _Known, piece: Piece, received: _Parts) -> None:
        _, everything = known
        for run, parts in zip(self.runs[piece], received, strict=True):
            for (name, rows), part in zip(everything.shares(), parts, strict=True):
                everything.part(name, rows)[:, :, self._tokens(run)] = part

    def _done(self, known: _Known) -> tuple[DealtAttention, torch.Tensor, torch.Tensor]:
        """What the heads that are done here give for the text, and for the image. Nobody needs their keys any more."""
        dealt, everything = known
        result = self._by_tiles(everything) if len(self.cover) > 1 else self._at_once(everything)
        return dealt, result[:, :, everything.text], result[:, :, everything.image]

    def _given_back(self, dealt: DealtAttention, text: torch.Tensor, image: torch.Tensor) -> Sequence[torch.Tensor]:
        """What all heads give for the text, and for this process's tokens of the image."""
        runs = (self._tokens(self.band.rows.run(i)) for i in range(self.band.bands.count))
        return dealt.to_bands([(text, image[:, :, run]) for run in runs])

    def _at_once(self, everything: Attending) -> torch.Tensor:
        return everything.attend(**everything.given | {"attn_mask": everything.mask_of(self.maps.area)})

    def _by_tiles(self, everything: Attending) -> torch.Tensor:
        """Where queries were, if results are as large."""
        query, key, value = (everything.given[name] for name, _ in everything.shares())
        result: torch.Tensor = query if query.shape[3] == value.shape[3] else everything.nothing()

        def rows(piece: Piece) -> torch.Tensor:
            places: torch.Tensor = self.maps.places(piece, key.device) + everything.image.start
            return places

        result[:, :, everything.text] = by_tiles(
            everything,
            key,
            value,
            self.maps,
            self.context,
            Each(self.maps.piece, self.cover),
            read=lambda pieces: (everything.part("query", rows(piece)) for piece in pieces),
            place=lambda piece: (slice(None), slice(None), rows(piece)),
            into=result,
        )
        return result
