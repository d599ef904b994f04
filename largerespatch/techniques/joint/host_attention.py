"""Joint attention of maps whose queries, keys and values are on the host, and come to the device by a few heads.

Heads know nothing of one another. So some of them attend, for all tokens, with contexts as ever, and make room for the
next ones: of their keys and values as much is on the device as is told here, whatever the image's size, or what one
head needs. Queries come tile by tile, and what a tile is given goes where its queries were. Exact, as far as contexts
are.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from ...core.hosts import BAND_BYTES, Host
from ...core.pieces import Putting, assemble, side_by_side
from ...core.planes import concatenated
from ...core.tilings import Run, Runs
from ...core.tokens import TokenMap
from .host_maps import HostMaps
from .joining import Attending
from .key_source import by_tiles
from .one_call import Read, Walk
from .tokens import Maps, Piece

# Bytes of keys and values that are on the device at once. With fewer there would be more heads that come alone, and
# more small steps for an accelerator to wait for.
HELD = 2**28


class HostHeads:
    """Memory of the host for what some heads have of all image tokens, ``[B, heads, N, C]``, as `like` has of some."""

    def __init__(self, host: Host, maps: Maps, like: torch.Tensor) -> None:
        self.shape = like.shape
        self.maps = HostMaps.empty(host, maps, like.transpose(1, 2).flatten(2))

    def __setitem__(self, piece: Piece, tokens: torch.Tensor) -> None:
        self.maps[piece] = tokens.transpose(1, 2).flatten(2)

    def of(self, pieces: Sequence[Piece]) -> Iterator[torch.Tensor]:
        """Of some pieces, in turn, ``[B, heads, n, C]``."""
        return map(lambda parts: self._by_heads(concatenated(parts, dim=1)), self.maps.of(pieces))

    def onto(self, rows: torch.Tensor) -> None:
        """Copies all of it to ``[B, heads, N, C]`` on the device."""
        areas = [tokens.shape[1] for tokens in self.maps.tokens]
        for part, tokens in zip(rows.split_with_sizes(areas, dim=2), self.maps.tokens, strict=True):
            self._onto(part, tokens)

    def _onto(self, rows: torch.Tensor, tokens: TokenMap) -> None:
        size = tokens.shape[0] * tokens.shape[2] * tokens.element_size()
        assemble(
            Runs(tokens.shape[1], max(BAND_BYTES // size, 1)),
            lambda run, part: self._by_heads(part),
            place=lambda run: (slice(None), slice(None), slice(*run)),
            into=rows,
            read=tokens.fetch,
        )

    def _by_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.view(*tokens.shape[:2], self.shape[1], self.shape[3]).transpose(1, 2)


class _Turn:
    """What heads that attend together have on the host, and how: `call` is theirs, of a single token of the image.

    In the end `result` has what attention gives.
    """

    def __init__(self, call: Attending, host: Host, maps: Maps) -> None:
        self.call, self.maps = call, maps
        self.kept = {name: HostHeads(host, maps, call.given[name]) for name, _ in call.shares()}
        alike = call.given["query"].shape[3] == call.given["value"].shape[3]
        self.result = self.kept["query"] if alike else HostHeads(host, maps, call.nothing())

    def learn(self, piece: Piece, parts: Sequence[torch.Tensor]) -> None:
        """Queries, keys and values of a piece."""
        for kept, part in zip(self.kept.values(), parts, strict=True):
            kept[piece] = part

    def attend(self, pieces: Sequence[Piece], context: int) -> torch.Tensor:
        """What the text gets."""
        keys, values = self._arrived("key"), self._arrived("value")
        read = self.kept["query"].of
        return by_tiles(
            self.call, keys, values, self.maps, context, pieces, read, place=lambda piece: piece, into=self.result
        )

    def _arrived(self, name: str) -> torch.Tensor:
        """Keys or values of all tokens, on the device."""
        first, whole = self.call.image_keys.start, self.call.with_room(name, self.maps.area)
        self.kept[name].onto(whole[:, :, first : first + self.maps.area])
        return whole


class HostSources:
    """The attentions of a block that runs on `pieces`, one after another; see `KeySources`."""

    asks = True

    def __init__(self, host: Host, pieces: Sequence[Piece], maps: Maps, context: int) -> None:
        self.host, self.pieces, self.maps, self.context = host, pieces, maps, context
        self.made: list[tuple[torch.Tensor, list[HostHeads]]] = []

    def learn(self, walk: Walk, read: Read) -> None:
        calls: list[Attending] = []  # of a single token of the image
        known: list[dict[Run, _Turn]] = []

        def compute(piece: Piece, tokens: torch.Tensor) -> list[list[list[torch.Tensor]]]:
            met = walk(piece, tokens)
            if not calls:
                calls.extend(each.narrowed(tokens.new_zeros(1, dtype=torch.long)) for each in met)
            return [[_of_image(each.of_heads(*run)) for run in self._runs(each)] for each in met]

        def put(piece: Piece, parts: Sequence[Sequence[Sequence[torch.Tensor]]]) -> None:
            if not known:
                known.extend(map(self._turns, calls))
            for turns, of_turns in zip(known, parts, strict=True):
                for turn, some in zip(turns.values(), of_turns, strict=True):
                    turn.learn(piece, some)

        assemble(self.pieces, compute, place=lambda piece: piece, into=Putting(put), read=read)
        for call, turns in zip(calls, known, strict=True):
            self.made.append((self._attended(call, turns), [turn.result for turn in turns.values()]))

    def _runs(self, attending: Attending) -> Runs:
        """Heads of keys that attend together."""
        key, value = attending.given["key"], attending.given["value"]
        batch, heads = key.shape[:2]
        needed = batch * self.maps.area * (key.shape[3] + value.shape[3]) * key.element_size()
        return Runs(heads, max(HELD // needed, 1))

    def _turns(self, call: Attending) -> dict[Run, _Turn]:
        return {run: _Turn(call.of_heads(*run), self.host, self.maps) for run in self._runs(call)}

    def _attended(self, call: Attending, turns: Mapping[Run, _Turn]) -> torch.Tensor:
        """What the text gets of all heads; turns have what the image does."""
        shared = call.given["query"].shape[1] // call.given["key"].shape[1]
        text: torch.Tensor = assemble(
            self._runs(call),
            lambda run: turns[run].attend(self.pieces, self.context),
            place=lambda run: (slice(None), slice(run[0] * shared, run[1] * shared)),
            into=call.nothing()[:, :, call.text],
        )
        return text

    def of(self, pieces: Sequence[Piece]) -> Iterator[list[torch.Tensor]]:
        """What each attention gave for the image's tokens, ``[B, heads, n, C]``."""
        every = [side_by_side(*(heads.of(pieces) for heads in made)) for _, made in self.made]
        return map(lambda each: [concatenated(heads, dim=1) for heads in each], side_by_side(*every))

    def attended(
        self, i: int, attending: Attending, piece: Piece, given: Sequence[torch.Tensor], text_too: bool
    ) -> torch.Tensor:
        result = attending.nothing()
        result[:, :, attending.image] = given[i]
        if text_too:
            result[:, :, attending.text] = self.made[i][0]
        return result


def _of_image(attending: Attending) -> list[torch.Tensor]:
    """Queries, keys and values of the image."""
    return [attending.part(name, rows) for name, rows in attending.shares()]
