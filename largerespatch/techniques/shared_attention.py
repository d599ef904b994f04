"""Joint attention of a map that several processes have bands of: each does some heads of it, for all tokens.

All else that a transformer block does it does token by token, so in bands. What a head does, for which tile and with
which context, is what it does in one process. Exact, as far as that is.
"""

from collections.abc import Callable, Sequence

import torch

from ..core.band_rows import rounds
from ..core.bands import Band
from ..core.dealt_heads import DealtAttention
from ..core.pieces import assemble, collect
from ..core.tilings import Each, Run, Tile
from .joining import Attending
from .joint_tokens import Maps, Piece
from .key_source import KeySource


class SharedAttention:
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
        self.known: dict[int, tuple[DealtAttention, Attending]] = {}
        self.made: dict[int, Sequence[torch.Tensor]] = {}

    def learn(self, walk: Callable[[Piece], Sequence[Attending]]) -> None:
        """Of all pieces; `walk` tells how a piece attends."""

        def deal(piece: Piece) -> None:
            for i, attending in enumerate(walk(piece)):
                self._deal(i, attending, piece)

        collect(self.pieces, deal)

    def attended(self, i: int, attending: Attending, piece: Piece, text_too: bool) -> torch.Tensor:
        """What the i-th attention gives for the tokens of a piece; for the text all that it attends to, or nothing."""
        if i not in self.made:
            if i not in self.known:  # there was no walk before, since there is one piece alone
                self._deal(i, attending, piece)
            self.made[i] = self._made(*self.known.pop(i))
        text, image = self.made[i]
        result = attending.nothing()
        result[:, :, attending.image] = image[:, :, piece.tiles[0].top * self.band.rows.width :][:, :, : piece.area]
        if text_too:
            result[:, :, attending.text] = text
        return result

    def _tokens(self, run: Run) -> slice:
        """Of rows of the map."""
        return slice(run[0] * self.band.rows.width, run[1] * self.band.rows.width)

    def _deal(self, i: int, attending: Attending, piece: Piece) -> None:
        """Queries, keys and values of the tokens that each process has of a piece go to those that do their heads."""
        if i not in self.known:
            dealt = DealtAttention(self.band, attending.given["key"].shape[1])
            self.known[i] = dealt, self._room(dealt, attending)
        dealt, everything = self.known[i]
        runs = [self._tokens(run) for run in self.runs[piece]]
        image, image_keys = attending.image, attending.image_keys
        parts = [attending.part("query", image), *(attending.part(name, image_keys) for name in ("key", "value"))]
        found = dealt.to_heads(parts, [run.stop - run.start for run in runs])
        for run, received in zip(runs, found, strict=True):
            for name, rows, part in zip(_NAMES, (image, image_keys, image_keys), received, strict=True):
                everything.given[name][:, :, rows.start :][:, :, run] = part

    def _room(self, dealt: DealtAttention, attending: Attending) -> Attending:
        """The same call for all tokens of the map, of this process's heads: those of the image are not there yet."""
        made: list[torch.Tensor] = []
        for name, rows in zip(_NAMES, (attending.image, attending.image_keys, attending.image_keys), strict=True):
            own = dealt.own(attending.given[name])
            before, after = own[:, :, : rows.start], own[:, :, rows.stop :]
            count = before.shape[2] + self.maps.area + after.shape[2]
            made.append(own.new_empty(*own.shape[:2], count, own.shape[3]))
            made[-1][:, :, : rows.start] = before
            made[-1][:, :, rows.start + self.maps.area :] = after
        return attending.of_tokens(self.maps.area, *made)

    def _made(self, dealt: DealtAttention, everything: Attending) -> Sequence[torch.Tensor]:
        """What all heads give for the text, and for this process's tokens of the image."""
        result = self._by_tiles(everything) if len(self.cover) > 1 else everything.attend(**everything.given)
        text, image = result[:, :, everything.text], result[:, :, everything.image]
        runs = (self._tokens(self.band.rows.run(i)) for i in range(self.band.bands.count))
        return dealt.to_bands([(text, image[:, :, run]) for run in runs])

    def _by_tiles(self, everything: Attending) -> torch.Tensor:
        """Where queries were, if results are as large."""
        query, key, value = (everything.given[name] for name in _NAMES)
        source = KeySource(key, value, self.maps, everything.image_keys.start, self.context)
        texts: list[torch.Tensor] = []

        def compute(piece: Piece) -> torch.Tensor:
            attending = everything.narrowed(self.maps.places(piece, key.device))
            result = source.attended(attending, piece, text_too=not texts)
            texts.extend([result[:, :, attending.text]] if not texts else [])
            return result[:, :, attending.image]

        result: torch.Tensor = assemble(
            Each(self.maps.piece, self.cover),
            compute,
            place=lambda piece: (
                slice(None),
                slice(None),
                self.maps.places(piece, key.device) + everything.image.start,
            ),
            into=query if query.shape[3] == value.shape[3] else everything.nothing(),
        )
        result[:, :, everything.text] = texts[0]
        return result


_NAMES = ("query", "key", "value")
