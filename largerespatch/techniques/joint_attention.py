"""Transformer blocks in which text and image tokens attend to one another, tile by tile.

A block's own forward runs on the text's tokens and those of one tile, with every argument that has a row for each token
cut alike: all that it does is bounded by the tile, and whatever others have put in it works. What a tile sees of the
others joins inside its attention (see `largerespatch.techniques.joining`): keys and values of all tokens come from a
first walk over the tiles, which leaves the block there. Text attends to all of them. Approximate, but for the text;
exact, to rounding, with as many tokens of context as there are.
"""

import inspect
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from ..core.families import Order, Site
from ..core.pieces import assemble, rehearsing
from ..core.tilings import PHASES, Each, Tile, sampled_cells
from .attention import Blocking, blocking_of
from .context import uploaded
from .inside import listening, looking, passed_on
from .joining import Attending, Joining, native_kernels
from .notes import StepNote
from .pooled import Keys, PooledMap
from .tokens import Maps, Piece, Tokens

# Queries of a tile that say what it attends to.
JUDGES = 256


class MapsNote:
    """The maps that a model's tokens are the cells of: the image, then references. None where that is not known."""

    maps: Maps = Maps()


class MapsNoting:
    """Takes the place of a transformer's ``forward`` and notes its maps for the blocks inside it.

    `maps` tells them from the arguments of the call, by name.
    """

    def __init__(self, note: MapsNote, maps: Callable[[Mapping[str, Any]], Sequence[tuple[int, int]]]) -> None:
        self.note = note
        self.maps = maps

    def __call__(self, original: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        self._note(inspect.signature(original).bind_partial(*args, **kwargs).arguments)
        return original(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # values are for Python to see
    def _note(self, arguments: Mapping[str, Any]) -> None:
        self.note.maps = Maps(self.maps(arguments))


class JointBlock:
    """Takes the place of the ``forward`` of a transformer block, whose tokens are as `tokens` says.

    The phase depends on the block's place in its model and on the denoising step alone. What is given other tokens than
    noted runs whole; so does, with a warning, what does not attend as it should.
    """

    def __init__(
        self, block: nn.Module, tokens: Tokens, blocking: Blocking, note: MapsNote, step_note: StepNote, layer: int
    ) -> None:
        self.block, self.tokens, self.blocking = block, tokens, blocking
        self.note, self.step_note, self.layer = note, step_note, layer

    # A graph would write every tile out.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        maps, bound = self.note.maps, inspect.signature(original).bind(*args, **kwargs)
        cover = self._cover(maps)
        texts = self.tokens.texts(bound.arguments, maps.area) if len(cover) > 1 else None
        if texts is None:
            return original(*args, **kwargs)

        def called(changed: Mapping[str, Any]) -> Any:
            given = inspect.BoundArguments(bound.signature, OrderedDict({**bound.arguments, **changed}))
            return original(*given.args, **given.kwargs)

        if obstacle := self._obstacle(bound.arguments, maps.area, texts):
            self._warn_of_whole(obstacle)
            return original(*args, **kwargs)
        self._warn_of_hooks()
        try:
            with native_kernels(self.block):
                return _Call(called, bound.arguments, self, texts).run(Each(maps.piece, cover))
        except _NotMetError:
            processors = {type(each.processor).__name__ for each in self.block.modules() if hasattr(each, "processor")}
            named = ", ".join(sorted(processors)) or "attention of its own"
            self._warn_of_whole(f" with {named} does not hand the keys of all tokens to scaled_dot_product_attention")
        return original(*args, **kwargs)

    def _cover(self, maps: Maps) -> Sequence[Tile]:
        if not maps or maps[0][0] * maps[0][1] <= self.blocking.full_tokens:
            return ()
        return self.blocking.cover(*maps[0], (self.layer + self.step_note.step) % PHASES)

    def _obstacle(self, arguments: Mapping[str, Any], image: int, text: int) -> str:
        """Why the block cannot run tile by tile; empty if it can."""
        if hooks := looking(self.block):
            return f": {', '.join(hooks)} inside it may look at more than one tile"
        if masks := passed_on(arguments, image, text):
            return f": it passes on to its attention what has rows of tokens ({', '.join(masks)})"
        return ""

    def _warn_of_whole(self, why: str) -> None:
        kind = type(self.block).__name__
        self._warn(f"{kind}{why}: it runs on all tokens at once, in as much memory as without this patch", why)

    def _warn_of_hooks(self) -> None:
        if paths := list(listening(self.block)):
            named = ", ".join(path or "those on all modules there are" for path in paths[:3])
            self._warn(
                f"{type(self.block).__name__} runs tile by tile: forward hooks inside it ({named}"
                f"{', ...' if len(paths) > 3 else ''}) see the text and one tile at a time, and what comes before "
                "attention twice; those on the block itself see all",
                "hooks",
            )

    def _warn(self, message: str, about: str) -> None:
        """Once for all blocks of the model."""
        if about not in self.blocking.warned and not rehearsing():
            self.blocking.warned.add(about)
            warnings.warn(message, RuntimeWarning, stacklevel=4)


class _Left(Exception):  # noqa: N818  nothing is wrong
    """A block was left, once all of its keys and values were known."""


class _NotMetError(Exception):
    """A block did not attend as it should."""


class _Call:
    """A call of a block, which `called` makes with other arguments. `texts` is the number of its text tokens."""

    def __init__(
        self, called: Callable[[Mapping[str, Any]], Any], arguments: Mapping[str, Any], of: JointBlock, texts: int
    ) -> None:
        self.called, self.arguments, self.texts = called, arguments, texts
        self.tokens, self.maps, self.context = of.tokens, of.note.maps, of.blocking.context
        self.attentions = of.tokens.attentions(of.block)
        self.first = texts if of.tokens.text_first else 0  # of the image's tokens, in what has rows of both

    def run(self, pieces: Sequence[Piece]) -> Any:
        known = assemble(
            pieces,
            self._keys_and_values,
            place=lambda piece: (slice(None), slice(None), self._places(piece)["both"]),
            make=lambda parts: tuple(part.new_empty(*part.shape[:2], self.total, part.shape[3]) for part in parts),
        )
        sources = [_Source(*each, self) for each in zip(known[0::2], known[1::2], strict=True)]
        kept: list[Any] = []  # what the first piece gave, whose text has seen all
        both = self.tokens.both()

        def compute(piece: Piece) -> torch.Tensor:
            def attended(i: int, attending: Attending) -> torch.Tensor:
                return sources[i].attended(attending, piece, text_too=not kept)

            result = self._through(piece, attended)
            kept.extend([result] if not kept else [])
            return self.tokens.image_of(result).narrow(1, self.first if both else 0, piece.area)

        output = assemble(
            pieces,
            compute,
            place=lambda piece: (slice(None), self._places(piece)["image"] + (self.first if both else 0)),
            make=lambda image: image.new_empty(len(image), self.total if both else self.maps.area, image.shape[2]),
        )
        if both and self.texts:
            text = slice(None, self.first) if self.first else slice(-self.texts, None)
            output[:, text] = self.tokens.image_of(kept[0])[:, text]
        return self.tokens.with_image(kept[0], output)

    @property
    def total(self) -> int:
        return self.texts + self.maps.area

    def _places(self, piece: Piece) -> dict[str, torch.Tensor]:
        """Of a piece's tokens in what has rows of the image, and of them and the text in what has rows of both."""
        device = next(each.device for each in tree_leaves(self.arguments) if isinstance(each, torch.Tensor))
        image = self.maps.places(piece, device)
        text = torch.arange(self.texts, device=device)
        both = [text, image + self.texts] if self.first else [image, text + self.maps.area]
        return {"image": image, "both": torch.cat(both)}

    def _through(self, piece: Piece, do: Callable[[int, Attending], torch.Tensor]) -> Any:
        """What the block makes of a piece and the text, with its attentions done by `do`."""
        given = self.tokens.cut(self.arguments, self._places(piece))
        with Joining(do, self.attentions, piece.area, self.texts, self.tokens.text_first) as joining:
            result = self.called(given)
        if joining.met < self.attentions:
            raise _NotMetError
        return result

    def _keys_and_values(self, piece: Piece) -> tuple[torch.Tensor, ...]:
        """Of each attention, one after another, ``[B, heads, tokens, C]``."""
        known: list[torch.Tensor] = []

        def note(i: int, attending: Attending) -> torch.Tensor:
            room = (0, 0) if attending.texts else (self.texts, 0) if self.first else (0, self.texts)
            known.extend(F.pad(attending.given[name], (0, 0, *room)) for name in ("key", "value"))
            if i + 1 == self.attentions:
                raise _Left
            return attending.nothing()

        with suppress(_Left):
            self._through(piece, note)
        return tuple(known)


class _Source:
    """Keys and values ``[B, heads, tokens, C]`` of all tokens, for one of a block's attentions."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, call: _Call) -> None:
        self.keys, self.values, self.context = keys, values, call.context
        image = slice(call.first, call.first + call.maps.area)
        self.pooled = [
            PooledMap(keys[:, :, image][:, :, run], values[:, :, image][:, :, run], size, self.context)
            for size, run in zip(call.maps, call.maps.runs(), strict=True)
            if self.context
        ]

    def attended(self, attending: Attending, piece: Piece, text_too: bool) -> torch.Tensor:
        """The attention of a piece's tokens to themselves, the text and their context; that of the text to all, or
        as that of the others.
        """
        context = self._context(attending, piece)
        if not text_too or not attending.texts:
            return attending.joined(slice(None), context)
        text, image = attending.among(self.keys, self.values), attending.joined(attending.image, context)
        return torch.cat([text, image] if attending.image.start else [image, text], dim=2)

    def _context(self, attending: Attending, piece: Piece) -> list[Keys]:
        if not self.pooled:
            return []
        places = uploaded(_judges(piece), attending.given["query"].device)
        judges = attending.grouped(attending.part("query", attending.image)[:, :, places])
        own = attending.part("key", attending.image)[:, :, places].float()
        total = (judges @ own.transpose(-1, -2)).logsumexp(dim=-1, keepdim=True) + math.log(piece.area / len(places))
        pairs = zip(self.pooled, piece.tiles, strict=True)
        return [pooled.chosen(tile, judges, total) for pooled, tile in pairs]


def _judges(piece: Piece) -> list[int]:
    """Places, among a piece's tokens, of those whose queries say what all of them want."""
    places: list[int] = []
    start = 0
    for tile in piece.tiles:
        if tile.area:
            cells = sampled_cells(*tile.size(), JUDGES // len(piece.tiles), "judges")
            places += [start + cell for cell in cells]
        start += tile.area
    return places


def joint_sites(
    model: Any,
    name: str,
    options: Any,
    step_note: StepNote,
    kinds: Mapping[str, Tokens],
    maps: Callable[[Mapping[str, Any]], Sequence[tuple[int, int]]],
) -> Iterator[Site]:
    """The blocks of `model`, in the lists of them that `kinds` names, and the model that notes their maps."""
    blocking, note, layer = blocking_of(options), MapsNote(), 0
    yield Site(model, name, Order.MAP_NOTED, MapsNoting(note, maps))
    says = f"{{count}} transformer blocks in {blocking}"
    for path, tokens in kinds.items():
        for i, block in enumerate(getattr(model, path)):
            technique = JointBlock(block, tokens, blocking, note, step_note, layer)
            yield Site(block, f"{name}.{path}.{i}", Order.IN_BLOCKS, technique, says=says)
            layer += 1
