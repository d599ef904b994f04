"""Transformer blocks in which text and image tokens attend to one another, tile by tile.

A block's own forward runs on the text's tokens and those of one tile, with every argument that has a row for each token
cut alike: all that it does is bounded by the tile, and whatever others have put in it works. What a tile sees of the
others joins inside its attention (see `largerespatch.techniques.joint.joining`), for each part of the tile what its
queries look for: keys and values of all tokens come from a first walk over the tiles, which leaves the block there.
Text attends to all of them. Approximate, but for the text; exact, to rounding, with as many tokens of context as there
are. Of a map with many times the tokens of its context means over cells of 2x2 are kept instead, and the text attends
to these.
"""

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ...core.band_rows import BandRows
from ...core.bands import ALONE, Band, Bands, at
from ...core.families import Order, Site
from ...core.hosts import Host
from ...core.pieces import rehearsing
from ...core.tilings import PHASES, Each, Tile
from ..attention.blocked import Blocking, blocking_of
from ..notes import StepNote
from ..shared_maps import bands_of
from ..strips.strips import is_differentiated
from .ends import End, HostEnd
from .host_attention import HostSources
from .inside import listening, looking, passed_on
from .joining import native_kernels
from .key_source import KeySources
from .one_call import NotMetError, OneCall, Sources
from .passing import Passing
from .shared_attention import SharedSources
from .shared_tokens import TokensInBands
from .tokens import Kind, Maps, MapsNote, Tokens, own_rows

# Tokens of context where nothing else is asked for: with rotary positions attention is sharp, and wants them fine.
CONTEXT = 3072


class MapsNoting:
    """Takes the place of a transformer's ``forward`` and notes its maps for the blocks inside it.

    `maps` tells them from the arguments of the call, by name.
    """

    def __init__(self, note: MapsNote, maps: Callable[[Mapping[str, Any]], Sequence[tuple[int, int]]]) -> None:
        self.note = note
        self.maps = maps

    def __call__(self, original: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        self._note(original, inspect.signature(original).bind_partial(*args, **kwargs).arguments)
        return original(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # values are for Python to see
    def _note(self, original: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        self.note.maps = Maps(self.maps(arguments))
        if self.note.passing is not None:
            self.note.passing.begin(original, arguments)


class Edges(NamedTuple):
    """Whether a block is the first one that has tokens in bands, which it `cuts`, and the last one, which `joins`."""

    cuts: bool = False
    joins: bool = False


INSIDE = Edges()


class JointBlock:
    """Takes the place of the ``forward`` of a transformer block, whose tokens are as `kind` says.

    The phase depends on the block's place in its model and on the denoising step alone. What is given other tokens than
    noted runs whole; so does, with a warning, what does not attend as it should.
    """

    def __init__(
        self,
        block: nn.Module,
        kind: Kind,
        blocking: Blocking,
        note: MapsNote,
        step_note: StepNote,
        layer: int,
        bands: Bands = ALONE,
        edges: Edges = INSIDE,
        path: str = "block",
        host: Host | None = None,
    ) -> None:
        self.block, self.kind, self.blocking = block, kind, blocking
        self.note, self.step_note, self.layer = note, step_note, layer
        self.bands, self.edges, self.path, self.host = bands, edges, path, host

    def applies(self, *args: object, **kwargs: object) -> bool:
        """Whether there may be anything to cut up, whatever the step: most calls of most models are small."""
        return not self.bands.alone or self._is_large(self.note.maps)

    # A graph would write every tile out.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        maps, bound = self.note.maps, inspect.signature(original).bind(*args, **kwargs)
        tokens = self.kind if isinstance(self.kind, Tokens) else self.kind(bound.arguments)
        maps = maps if tokens.references else Maps(maps[:1])
        cover, band = self._cover(maps), self._band(maps)
        if len(cover) < 2 and band.alone:
            return original(*args, **kwargs)
        here = maps if band.alone else Maps([(band.run[1] - band.run[0], band.rows.width)])
        beside = tokens.texts_beside(bound.arguments, (maps if self.edges.cuts else here).area)
        bound.arguments.update(own_rows(tokens.takes, bound.arguments, band, beside, tokens.text_first))
        if self.edges.cuts:  # a copy, so that tokens of the whole map need not stay
            bound.arguments[tokens.changes] = bound.arguments[tokens.changes].clone()
        texts = tokens.texts(bound.arguments, here.area)
        if texts is None:
            self._check_whole(band, " was given other tokens than those of one image")
            return original(*args, **kwargs)

        def called(changed: Mapping[str, Any]) -> Any:
            given = inspect.BoundArguments(bound.signature, OrderedDict({**bound.arguments, **changed}))
            return original(*given.args, **given.kwargs)

        if obstacle := self._obstacle(bound.arguments, maps.area, texts):
            self._check_whole(band, obstacle)
            self._warn_of_whole(obstacle)
            return original(*args, **kwargs)
        self._warn_of_hooks()
        try:
            with native_kernels(self.block), at(self.path):
                given = bound.arguments[tokens.changes]
                host, free = self._host(given), self._is_free(given)
                call = OneCall(called, bound.arguments, self.block, tokens, here, texts, host, free)
                result = call.run(self._source(call, band, cover, host))
                return call.joined(result, band) if self.edges.joins else result
        except NotMetError as error:
            processors = {type(each.processor).__name__ for each in self.block.modules() if hasattr(each, "processor")}
            named = ", ".join(sorted(processors)) or "attention of its own"
            why = f" with {named} {error}"
            self._check_whole(band, why)
            self._warn_of_whole(why)
        return original(*args, **kwargs)

    def _band(self, maps: Maps) -> Band:
        """This process's of the image; all of what is not cut."""
        return self.bands.of_whole(*maps[0]) if maps else Band(ALONE, BandRows(0, 0))

    def _host(self, given: torch.Tensor) -> Host | None:
        """Where queries, keys, values and results wait, if they are many and nobody follows what is done to them."""
        host = self.host
        waits = host is not None and host.takes(given, given.shape) and not is_differentiated(self.block, given)
        return host if waits else None

    def _source(self, call: OneCall, band: Band, cover: Sequence[Tile], host: Host | None) -> Sources:
        """Who does the attentions of a call."""
        if not band.alone:
            return SharedSources(band, cover, self.blocking.context)
        pieces = Each(call.maps.piece, cover)
        if host is not None:
            return HostSources(host, pieces, call.maps, self.blocking.context)
        return KeySources(pieces, call.maps, self.blocking.context)

    def _check_whole(self, band: Band, why: str) -> None:
        """Sees that a block that cannot run in pieces has all tokens."""
        if not band.alone:
            raise ValueError(f"process_group: {type(self.block).__name__}{why}, so it cannot run in bands")

    def _is_free(self, given: torch.Tensor) -> bool:
        """Whether the block may write over the tokens that it changes."""
        return self.note.passing is not None and self.note.passing.is_free(given)

    def _is_large(self, maps: Maps) -> bool:
        return bool(maps) and maps.areas[0] > self.blocking.full_tokens

    def _cover(self, maps: Maps) -> Sequence[Tile]:
        if not self._is_large(maps):
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


def joint_sites(
    model: Any,
    name: str,
    options: Any,
    step_note: StepNote,
    kinds: Mapping[str, Kind],
    maps: Callable[[Mapping[str, Any]], Sequence[tuple[int, int]]],
    passes_on: bool = False,
    takes: Mapping[str, Any] | None = None,
    joined: bool = True,
    host: Host | None = None,
    ends: Sequence[str] = (),
) -> Iterator[Site]:
    """The blocks of `model`, in the lists of them that `kinds` names, and the model that notes their maps.

    `passes_on` says whether it keeps nothing of what they are given and give. For `takes` and `joined`, where several
    processes share its tokens, see `TokensInBands`. Large maps wait on `host`, if there is one; `ends` are the paths of
    what looks at their tokens one by one, before all blocks and after them.
    """
    blocking, note, layer = blocking_of(options, CONTEXT), MapsNote(Passing(model) if passes_on else None), 0
    bands = replace(bands_of(options), others=None)  # who have other samples
    sample, takes = list(inspect.signature(type(model).forward).parameters)[1], takes or {}
    cut = options.process_group is None or sample in takes  # before they come to blocks
    yield Site(model, name, Order.MAP_NOTED, MapsNoting(note, maps))
    if options.process_group is not None:
        sharing = TokensInBands(model, name, bands, note, takes, sample, joined and cut)
        yield Site(model, name, Order.IN_BANDS, sharing, says=f"maps in {bands}")
    for path in ends:
        module: nn.Module = model.get_submodule(path)
        last = path == ends[-1]
        end = End(module, note, blocking.full_tokens) if host is None else HostEnd(module, note, host, delivers=last)
        yield Site(module, f"{name}.{path}", Order.IN_CHUNKS, end)
    says = f"{{count}} transformer blocks in {blocking}"
    if host is not None:
        says += f", with maps of at least {host.least / 2**20:g} MiB on the host"
    for path, kind in kinds.items():
        blocks: Any = model.get_submodule(path)
        for i, block in enumerate(blocks):
            own, edges = f"{name}.{path}.{i}", Edges(not cut and i == 0, not cut and i == len(blocks) - 1)
            technique = JointBlock(block, kind, blocking, note, step_note, layer, bands, edges, own, host)
            yield Site(block, own, Order.IN_BLOCKS, technique, says=says)
            layer += 1
