"""What the parts of a tile attend to in joint attention: the tile, the text, and each a context of its own."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...core.pieces import Putting, assemble, collect
from ...core.tilings import sampled_cells
from ..attention.context import uploaded
from .joining import Attending
from .kept_keys import KeptMaps
from .one_call import Read, Walk
from .pooled import Keys, PooledMap
from .tokens import Maps, Piece

# How often a tile is cut in two for its context, since queries that lie together look for the same, and the fewest that
# are worth a context of their own.
HALVINGS, FEWEST = 3, 64

# Keys of a tile that say how much it attends to itself, and queries of a part that say what it attends to.
JUDGED, JUDGES = 256, 64

# Bytes of keys, in single precision, among which contexts are chosen at once: for one part after another an accelerator
# would wait for the many small steps of that. What else there is meanwhile takes about four times as much. A CPU waits
# for nothing but memory: more than its caches hold takes it several times as long.
LOOKED_THROUGH = 2**27
LOOKED_THROUGH_ON_CPU = 2**22


class KeySource:
    """Keys and values ``[B, heads, n, C]`` of all tokens, for one of a block's attentions, as far as they are `kept`.

    Those of the maps come after `first` others. `context` is the number of keys that stand for each map.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, kept: KeptMaps, first: int, context: int) -> None:
        self.keys, self.values, self.kept = keys, values, kept
        maps = zip(kept.maps, kept.sizes.runs(), kept.levels, strict=True) if context else ()
        self.pooled = [PooledMap(keys, values, size, context, first + run.start, level) for size, run, level in maps]

    def attended(self, attending: Attending, piece: Piece, text_too: bool) -> torch.Tensor:
        """The attention of a piece's tokens to the piece, the text and their context; that of the text to all, or none.

        Each part of the piece has a context of its own.
        """
        device = attending.given["query"].device
        result = attending.nothing()
        if text_too and attending.texts:
            result[:, :, attending.text] = self._of_text(attending)
        halvings = min(HALVINGS, (piece.area // FEWEST).bit_length() - 1)
        parts = piece.parts(max(halvings, 0) if self.pooled else 0)
        places = {part: piece.places(part, device) + attending.image.start for part in parts}

        def attend(some: Sequence[Piece]) -> None:
            contexts = self._contexts(attending, piece, {part: places[part] for part in some})
            assemble(
                some,
                lambda part: attending.joined(places[part], contexts[part]),
                place=lambda part: (slice(None), slice(None), places[part]),
                into=result,
            )

        count = self._at_once(attending.given["key"])
        collect([parts[i : i + count] for i in range(0, len(parts), count)], attend)
        return result

    def _of_text(self, attending: Attending) -> torch.Tensor:
        """What the text gets. Log-weights may cost a copy of keys, so with these a head at a time."""
        log_counts = self.kept.log_counts(self.keys.device)
        if log_counts is None:
            return attending.among(self.keys, self.values)
        heads = [
            attending.of_heads(i, i + 1).among(self.keys[:, i : i + 1], self.values[:, i : i + 1], log_counts)
            for i in range(self.keys.shape[1])
        ]
        return torch.cat(heads, dim=1)

    def _at_once(self, key: torch.Tensor) -> int:
        """For how many parts contexts are looked for at once."""
        batch, heads, _, channels = key.shape
        most = max((pooled.count for pooled in self.pooled), default=1)
        looked_through = LOOKED_THROUGH_ON_CPU if key.device.type == "cpu" else LOOKED_THROUGH
        return max(looked_through // (4 * batch * heads * channels * most), 1)

    def _contexts(
        self, attending: Attending, piece: Piece, places: Mapping[Piece, torch.Tensor]
    ) -> dict[Piece, list[Keys]]:
        """Of some parts of a piece, whose queries are at these `places`."""
        if not self.pooled:
            return {part: [] for part in places}
        key = attending.part("key", attending.image_keys)
        seen = key[:, :, uploaded(_spread(piece, JUDGED), key.device)]
        queries = [
            attending.part("query", there[uploaded(judging, key.device)])
            for there, judging in zip(places.values(), _alike(places), strict=True)
        ]
        judges = attending.grouped(torch.cat(queries))  # parts after parts, of each all samples
        scores = judges.view(len(places), -1, *judges.shape[1:]) @ seen.float().transpose(-1, -2)
        total = scores.flatten(0, 1).logsumexp(dim=-1, keepdim=True) + math.log(piece.area / seen.shape[2])
        pairs = zip(self.pooled, piece.tiles, strict=True)
        cells = (each for pooled, tile in pairs for each in pooled.chosen(tile, judges, total))
        found = [each.chunk(len(places)) for each in cells]
        return dict(zip(places, map(list, zip(*found, strict=True)), strict=True))


def by_tiles(
    call: Attending,
    keys: torch.Tensor,
    values: torch.Tensor,
    maps: Maps,
    context: int,
    pieces: Sequence[Piece],
    read: Callable[[Sequence[Piece]], Iterator[torch.Tensor]],
    place: Callable[[Piece], Any],
    into: Any,
) -> torch.Tensor:
    """Puts what a call of attention gives for the tokens of each piece `into` its `place`; returns what for the text.

    `keys` and `values` are those of all tokens of `maps` and of the others, whichever of them `call` has; `read` gives
    queries of the pieces, in turn.
    """
    texts: list[torch.Tensor] = []
    first, kept = call.image_keys.start, KeptMaps(maps, context)
    source = KeySource(kept.of(keys, first), kept.of(values, first), kept, first, context)

    def compute(piece: Piece, queries: torch.Tensor) -> torch.Tensor:
        places = maps.places(piece, keys.device) + first
        attending = call.of_others(queries, keys[:, :, places], values[:, :, places])
        result = source.attended(attending, piece, text_too=not texts)
        texts.extend([result[:, :, attending.text]] if not texts else [])
        return result[:, :, attending.image]

    assemble(pieces, compute, place=place, into=into, read=read)
    return texts[0]


class KeySources:
    """The attentions of a block that runs on `pieces`, one after another, in a process that has all tokens."""

    asks = False  # what queries depend on need not run before all keys are known

    def __init__(self, pieces: Sequence[Piece], maps: Maps, context: int) -> None:
        self.pieces, self.kept, self.context = pieces, KeptMaps(maps, context), context
        self.sources: list[KeySource] = []

    def learn(self, walk: Walk, read: Read) -> None:
        firsts: list[int] = []  # of each attention, where the keys of the image begin
        memory: list[list[torch.Tensor]] = []  # of each its keys and values

        def compute(piece: Piece, own: torch.Tensor) -> list[list[torch.Tensor]]:
            met = walk(piece, own)
            firsts.extend([] if firsts else (attending.image_keys.start for attending in met))
            return [[attending.given["key"], attending.given["value"]] for attending in met]

        def put(piece: Piece, parts: Sequence[Sequence[torch.Tensor]]) -> None:
            if not memory:
                memory.extend([self.kept.empty(part, part.shape[2] - piece.area) for part in pair] for pair in parts)
            for first, kept, pair in zip(firsts, memory, parts, strict=True):
                for rows, part in zip(kept, pair, strict=True):
                    self._put(rows, piece, part, first)

        assemble(self.pieces, compute, place=lambda piece: piece, into=Putting(put), read=read)
        each = zip(memory, firsts, strict=True)
        self.sources = [KeySource(keys, values, self.kept, first, self.context) for (keys, values), first in each]

    def _put(self, kept: torch.Tensor, piece: Piece, part: torch.Tensor, first: int) -> None:
        """Keys or values of a piece, which come after so many others, and these, and what comes last."""
        area = self.kept.sizes.area
        self.kept.put(kept[:, :, first : first + area], piece, part[:, :, first : first + piece.area])
        kept[:, :, :first], kept[:, :, first + area :] = part[:, :, :first], part[:, :, first + piece.area :]

    def of(self, pieces: Sequence[Piece]) -> Iterator[None]:
        return (None for _ in pieces)

    def attended(self, i: int, attending: Attending, piece: Piece, given: None, text_too: bool) -> torch.Tensor:
        return self.sources[i].attended(attending, piece, text_too)


def _alike(parts: Iterable[Piece]) -> list[list[int]]:
    """Places of tokens that judge among those of each part, as many in all."""
    spread = [_spread(part, JUDGES) for part in parts]
    count = min(map(len, spread))
    return [[each[i * len(each) // count] for i in range(count)] for each in spread]


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
