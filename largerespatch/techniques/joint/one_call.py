"""A call of a transformer block, made piece by piece: first for the keys of all, then for what the block gives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import nn

from ...core.bands import Band
from ...core.hosts import Host
from ...core.patching import PatchStack
from ...core.pieces import assemble, side_by_side
from ...core.planes import concatenated
from ...core.tokens import JoinedTokens, TokenMap, parts_of
from .host_maps import HostMaps
from .joining import Attending, Joining
from .tokens import Maps, Piece, Tokens

# How a piece attends, in each attention of a block, given its tokens of what the block changes.
Walk = Callable[[Piece, torch.Tensor], list[Attending]]

# Of some pieces what there is to read for each, in turn.
Read = Callable[[Sequence[Piece]], Iterator[Any]]


class Sources(Protocol):
    """Who does the attentions of a block. `asks` says whether it has to know all queries before any of them is done."""

    asks: bool

    @property
    def pieces(self) -> Sequence[Piece]:
        """What the block runs on, one after another."""

    def learn(self, walk: Walk, read: Read) -> None:
        """All that pieces tell of themselves; `read` gives what `walk` wants of each."""

    def of(self, pieces: Sequence[Piece]) -> Iterator[Any]:
        """What `attended` wants to be given of each piece, in turn."""

    def attended(self, i: int, attending: Attending, piece: Piece, given: Any, text_too: bool) -> torch.Tensor:
        """What the i-th attention gives for the tokens of a piece; for the text all that it attends to, or nothing."""


class NotMetError(Exception):
    """A block did not attend as it should, and in what."""


class _Left(Exception):  # noqa: N818  nothing is wrong
    """A block was left, once all of its keys and values were known."""


class OneCall:
    """A call of a block, which `called` makes with other arguments, for image tokens of `maps` and `texts` more.

    `host` is where what it gives for the image's tokens waits; None: on the device. Where the block is `free` to write
    over what it was given, the next one may write over that.
    """

    def __init__(
        self,
        called: Callable[[Mapping[str, Any]], Any],
        arguments: Mapping[str, Any],
        block: nn.Module,
        tokens: Tokens,
        maps: Maps,
        texts: int,
        host: Host | None = None,
        free: bool = False,
    ) -> None:
        self.called, self.arguments, self.tokens, self.texts = called, arguments, tokens, texts
        self.block, self.maps, self.free = block, maps, free
        self.attentions, self.copies = tokens.attentions(block, arguments), tokens.copies(block)
        self.host = host if tokens.ahead == 0 else None

    def run(self, source: Sources) -> Any:
        """What the block returns."""
        if len(source.pieces) > 1:
            idle = (*self.tokens.idle, *(() if source.asks else self.tokens.asking))
            with PatchStack() as stack:
                for path, module in self.block.named_modules():
                    if path in idle:  # beneath hooks, which see all calls
                        stack.wrap(module, "forward", _as_given, f"{path}.forward")
                source.learn(self._walk, self._read)
        kept: list[Any] = []  # what the first piece gave, whose text has seen all
        texts = self.texts if self.tokens.both() else 0
        start = self.tokens.ahead + (texts if self.tokens.text_first else 0)
        after = self.tokens.ahead + texts - start

        def compute(piece: Piece, read: tuple[torch.Tensor, Any]) -> torch.Tensor:
            own, given = read
            result = self._through(piece, own, lambda i, call: source.attended(i, call, piece, given, not kept))
            kept.extend([result] if not kept else [])
            return self.tokens.image_of(result).narrow(1, start, piece.area)

        output: _OnDevice | _OnHost = assemble(
            source.pieces,
            compute,
            place=lambda piece: piece,
            make=lambda image: self._output(image, start, after),
            read=lambda pieces: side_by_side(self._read(pieces), source.of(pieces)),
        )
        return self.tokens.with_image(kept[0], output.whole(self.tokens.image_of(kept[0])))

    def joined(self, result: Any, band: Band) -> Any:
        """What `run` returned, with the tokens of the whole image."""
        some = self.tokens.image_of(result)
        others = some.shape[1] - self.maps.area
        first = others if self.tokens.text_first else 0
        before, image, after = some.split_with_sizes([first, self.maps.area, others - first], dim=1)
        return self.tokens.with_image(result, torch.cat([before, band.all_tokens(image, "maps"), after], dim=1))

    def places(self, piece: Piece, others: int, ahead: int = 0) -> torch.Tensor:
        """Of a piece's tokens among those of the image and so many `others`, with some of another kind `ahead`."""
        start = others if self.tokens.text_first else 0
        image = self.maps.places(piece, self._stream.device) + ahead + start
        rest = torch.arange(ahead + others, device=self._stream.device)
        before, after = rest[: ahead + start], rest[ahead + start :] + self.maps.area
        return torch.cat([before, image, after])

    @property
    def _stream(self) -> torch.Tensor:
        """The tokens that the block changes."""
        stream: torch.Tensor = self.arguments[self.tokens.changes]
        return stream

    def _output(self, image: torch.Tensor, start: int, after: int) -> "_OnDevice | _OnHost":
        """Where tokens of the image go that are as `image`, with so many others before and after."""
        given, there = self._stream, self._there
        if self.host is not None:
            if self.free and there and there[0].shape[2] == image.shape[2]:
                return _OnHost(HostMaps([tokens.claim().turned for tokens in there]), start, after)
            return _OnHost(HostMaps.empty(self.host, self.maps, image, passing=self.free), start, after)
        shape = (len(image), start + self.maps.area + after, image.shape[2])
        free = self.free and (tuple(given.shape), given.dtype) == (shape, image.dtype)
        return _OnDevice(given if free else image.new_empty(shape), self.maps, start, after)

    def _places(self, piece: Piece) -> dict[str, torch.Tensor]:
        """By kind of rows."""
        ahead = self.tokens.ahead
        return {"image": self.places(piece, 0, ahead), "both": self.places(piece, self.texts, ahead)}

    def _read(self, pieces: Sequence[Piece]) -> Iterator[torch.Tensor]:
        """The tokens that the block changes of some pieces, in turn."""
        name, there = self.tokens.changes, self._there
        if not there:
            return (self.tokens.cut({name: self._stream}, self._places(piece))[name] for piece in pieces)
        parts = parts_of(self._stream)
        first = next(i for i, part in enumerate(parts) if part is there[0])
        around = parts[:first], parts[first + len(there) :]
        tiles = HostMaps([tokens.turned for tokens in there]).of(pieces)
        return map(lambda some: concatenated([*around[0], *some, *around[1]], dim=1), tiles)

    @property
    def _there(self) -> list[TokenMap]:
        """The image's tokens of what the block changes, map by map, if they are on the host."""
        found = [part for part in parts_of(self._stream) if isinstance(part, TokenMap)]
        return found if [each.map_size for each in found] == list(self.maps) else []

    def _through(self, piece: Piece, own: torch.Tensor, do: Callable[[int, Attending], torch.Tensor]) -> Any:
        """What the block makes of a piece's `own` tokens and the text, with its attentions done by `do`."""
        others = {name: value for name, value in self.arguments.items() if name != self.tokens.changes}
        given = self.tokens.cut(others, self._places(piece)) | {self.tokens.changes: own}
        beside = self.tokens.keys_beside(self.arguments)
        order = self.texts, self.tokens.text_first, self.tokens.keys_between, beside, self.copies
        with Joining(do, self.attentions, piece.area, *order) as joining:
            result = self.called(given)
        if joining.met < self.attentions:
            raise NotMetError("does not hand the keys of all tokens to scaled_dot_product_attention")
        if joining.met > self.attentions:
            raise NotMetError("attends to all tokens more often than is known of it")
        return result

    def _walk(self, piece: Piece, own: torch.Tensor) -> list[Attending]:
        """How a piece attends, in each attention of the block, which is left there."""
        met: list[Attending] = []

        def note(i: int, attending: Attending) -> torch.Tensor:
            met.append(attending)
            if i + 1 == self.attentions:
                raise _Left
            return attending.nothing()

        with suppress(_Left):
            self._through(piece, own, note)
        return met


class _OnDevice:
    """Memory of the device for tokens ``[B, N, C]``: so many others, the image's, and others after them."""

    def __init__(self, memory: torch.Tensor, maps: Maps, before: int, after: int) -> None:
        self.memory, self.maps, self.before, self.after = memory, maps, before, after

    def __setitem__(self, piece: Piece, image: torch.Tensor) -> None:
        self.memory[:, self.maps.places(piece, image.device) + self.before] = image

    def whole(self, first: torch.Tensor) -> torch.Tensor:
        """All of them, the others as the first piece has them."""
        last = self.before + self.maps.area
        self.memory[:, : self.before] = first[:, : self.before]
        self.memory[:, last:] = first[:, first.shape[1] - self.after :]
        return self.memory


class _OnHost:
    """Memory of the host for the image's tokens, and so many others, before and after them, on the device."""

    def __init__(self, image: HostMaps, before: int, after: int) -> None:
        self.image, self.before, self.after = image, before, after

    def __setitem__(self, piece: Piece, image: torch.Tensor) -> None:
        self.image[piece] = image

    def whole(self, first: torch.Tensor) -> torch.Tensor:
        """All of them, the others as the first piece has them."""
        before, after = first[:, : self.before], first[:, first.shape[1] - self.after :]
        return JoinedTokens.of([before, *self.image.tokens, after])


def _as_given(original: Callable[..., Any], hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return hidden_states
