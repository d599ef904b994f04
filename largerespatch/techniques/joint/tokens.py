"""Where text and image tokens are in what transformer blocks take and give, and how a part of them is cut out.

A model's image tokens are the cells of maps, row by row: first those of the image, then those of each reference.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ...core.bands import Band
from ...core.tilings import Tile, halved
from .passing import Passing

Size = tuple[int, int]


class Rows(NamedTuple):
    """Which tokens a tensor has rows of, ``"text"``, ``"image"`` or ``"both"``, and along which of its dimensions."""

    of: str
    dims: tuple[int, ...] = (1,)

    def along(self, *dims: int) -> "Rows":
        return Rows(self.of, dims)


TEXT, IMAGE, BOTH = Rows("text"), Rows("image"), Rows("both")


class Piece(NamedTuple):
    """The tiles of the image and of each reference that go through a block at once."""

    tiles: tuple[Tile, ...]

    def size(self) -> tuple[int, ...]:
        return tuple(side for tile in self.tiles for side in tile.size())

    @property
    def area(self) -> int:
        return sum(tile.area for tile in self.tiles)

    def parts(self, halvings: int) -> list["Piece"]:
        """This piece cut up so many times, in parts that lie together; those without tokens are left out."""
        parts = map(Piece, zip(*(halved(tile, halvings) for tile in self.tiles), strict=True))
        return [part for part in parts if part.area]

    def places(self, part: "Piece", device: torch.device) -> torch.Tensor:
        """Where the tokens of a part are among those of this piece."""
        moved = (
            Tile(top - whole.top, left - whole.left, bottom - whole.top, right - whole.left)
            for (top, left, bottom, right), whole in zip(part.tiles, self.tiles, strict=True)
        )
        return Maps(tile.size() for tile in self.tiles).places(Piece(tuple(moved)), device)


class Maps(tuple[Size, ...]):
    """The (height, width) of maps whose cells are tokens, one after another: the image, then each reference."""

    @property
    def areas(self) -> list[int]:
        return [height * width for height, width in self]

    @property
    def area(self) -> int:
        return sum(self.areas)

    def runs(self) -> Iterator[slice]:
        """Where each map's tokens are."""
        start = 0
        for height, width in self:
            yield slice(start, start + height * width)
            start += height * width

    def piece(self, tile: Tile) -> Piece:
        """A tile of the image and the parts of the references at the same relative place."""
        height, width = self[0]
        scales = [(Fraction(tall, height), Fraction(wide, width)) for tall, wide in self]
        return Piece(
            tuple(
                Tile(int(tile.top * tall), int(tile.left * wide), int(tile.bottom * tall), int(tile.right * wide))
                for tall, wide in scales
            )
        )

    def places(self, piece: Piece, device: torch.device) -> torch.Tensor:
        """Where the tokens of a piece are among all, in the order in which the piece has them."""
        parts = []
        for tile, run, (_, width) in zip(piece.tiles, self.runs(), self, strict=True):
            down = torch.arange(tile.top, tile.bottom, device=device)[:, None] * width
            parts.append((down + torch.arange(tile.left, tile.right, device=device)).flatten() + run.start)
        return torch.cat(parts)


class MapsNote:
    """The maps that a model's tokens are the cells of: the image, then references. None where that is not known.

    `passing` says what its blocks may write over; None where the model keeps what they give.
    """

    def __init__(self, passing: Passing | None = None) -> None:
        self.maps = Maps()
        self.passing = passing


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of a kind of block are.

    Args:
        takes: for each argument with tokens which rows it has: `TEXT`, `IMAGE` or `BOTH`, along what dimensions. All
            tensors in an argument have the same; for one that is a tuple of others a tuple of these, None for none.
            The first is what the block changes.
        gives: likewise for what the block returns. A result of text may be None.
        text_first: whether text comes before the image in what has rows of both, attention's keys among it.
        attentions: how many attentions to all of the image there are in a block, given the arguments of a call, one
            after another. What a later one is given must not depend on what an earlier one gave.
        idle: paths of modules in a block that no queries, keys and values depend on and whose results may be what they
            are given, for all that follows. Where these alone are wanted they do not run.
        asking: likewise of modules that queries depend on, but no keys and values.
        ahead: tokens that come before the image's in what has rows of these, and go with every tile as text does. They
            ask nothing in those attentions.
        keys_between: keys, in these attentions, between those of the text and those of the image.
        keys_beside: how many keys there are after those of the image in attentions of the image alone, if in any.
        references: whether the tokens of references are there, too.
        copies: to how many heads side by side a block gives the same keys, where it gives each head its own.
    """

    takes: Mapping[str, Any]
    gives: Any
    text_first: bool
    attentions: Callable[[nn.Module, Mapping[str, Any]], int] = lambda block, arguments: 1
    idle: Sequence[str] = ()
    asking: Sequence[str] = ()
    ahead: int = 0
    keys_between: int = 0
    keys_beside: Callable[[Mapping[str, Any]], int] = lambda arguments: 0
    references: bool = True
    copies: Callable[[nn.Module], int] = lambda block: 1

    @property
    def changes(self) -> str:
        """The argument that the block changes."""
        return next(iter(self.takes))

    def texts(self, arguments: Mapping[str, Any], image: int) -> int | None:
        """How many text tokens there are beside those of the `image`; None where the arguments are not as they say."""
        image += self.ahead
        found: dict[str, set[int]] = {"text": set(), "image": {image}, "both": set()}
        for name, rows in self.takes.items():
            _each(rows, arguments.get(name), lambda rows, each: found[rows.of].update(each.shape[i] for i in rows.dims))
        texts = found["text"] | {count - image for count in found["both"]} or {0}
        return texts.pop() if len(texts) == 1 and min(texts) >= 0 and len(found["image"]) == 1 else None

    def texts_beside(self, arguments: Mapping[str, Any], image: int) -> int:
        """How many text tokens there are beside so many of the image in what the block changes."""
        if self.takes[self.changes].of == "both":
            return int(arguments[self.changes].shape[1]) - image - self.ahead
        return next((arguments[name].shape[1] for name, rows in self.takes.items() if rows == TEXT), 0)

    def cut(self, arguments: Mapping[str, Any], places: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The arguments with a part of their tokens: those in `places` of each kind of rows, and all rows of text."""

        def part(rows: Rows, each: torch.Tensor) -> torch.Tensor:
            for dim in rows.dims if rows.of in places else ():
                each = each.index_select(dim, places[rows.of])
            return each

        return {name: _each(rows, arguments.get(name), part) for name, rows in self.takes.items() if name in arguments}

    def image_of(self, result: Any) -> torch.Tensor:
        """That of a block's results which has rows of the image."""
        found: list[torch.Tensor] = [each for rows, each in self._results(result) if rows.of != "text"]
        return found[0]

    def both(self) -> bool:
        """Whether that has rows of the text, too."""
        return any(rows.of == "both" for rows, _ in self._results(None))

    def with_image(self, result: Any, image: torch.Tensor) -> Any:
        """A block's results with another in the place of that one."""
        results = [each if rows.of == "text" else image for rows, each in self._results(result)]
        return results[0] if isinstance(self.gives, Rows) else tuple(results)

    def _results(self, result: Any) -> list[tuple[Rows, Any]]:
        if isinstance(self.gives, Rows):
            return [(self.gives, result)]
        return list(zip(self.gives, result or [None] * len(self.gives), strict=True))


# Where the tokens of a kind of block are, or how that is told from the arguments of a call.
Kind = Tokens | Callable[[Mapping[str, Any]], Tokens]


def own_rows(
    takes: Mapping[str, Any],
    arguments: Mapping[str, Any],
    band: Band,
    texts: int | None = None,
    text_first: bool = True,
    seen: Callable[[torch.Tensor], torch.Tensor] = lambda whole: whole,
) -> dict[str, Any]:
    """The arguments with this process's tokens of the image, where they have those of the whole map.

    Rows of both are those of so many `texts`, or of any number if that is None, before the image's or after them.
    `seen` makes of what is cut what all processes see in its place.
    """

    def own(rows: Rows, each: torch.Tensor) -> torch.Tensor:
        for dim in () if band.alone or rows.of == "text" else rows.dims:
            others = each.shape[dim] - band.cells
            if others == 0 if rows.of == "image" else others >= 0 and texts in (None, others):
                first = others if text_first else 0
                before, image, after = seen(each).split_with_sizes([first, band.cells, others - first], dim=dim)
                own = band.own_tokens(image, dim)
                each = torch.cat([before, own, after], dim=dim) if others else own
        return each

    return {name: _each(rows, arguments[name], own) for name, rows in takes.items() if name in arguments}


def _each(rows: Any, value: Any, change: Callable[[Rows, torch.Tensor], Any]) -> Any:
    """A value with `change` made to all tensors in it that have rows."""
    if isinstance(rows, Rows):
        return tree_map_only(torch.Tensor, lambda each: change(rows, each), value)
    if rows is None or value is None:
        return value
    return tuple(_each(*pair, change) for pair in zip(rows, value, strict=True))
