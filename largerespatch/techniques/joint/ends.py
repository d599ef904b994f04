"""What a transformer does to tokens one by one, before its blocks and after them: some at once, or to and from a host.

With a host the tokens of a large map are never all on the device, from where they are made of what the model is given
to where they are made to what it gives. Exact.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...core.hosts import Host
from ...core.maps import StoredMap
from ...core.pieces import assemble
from ...core.planes import Map, whole
from ...core.tilings import Run, Runs
from ...core.tokens import JoinedTokens, TokenMap, as_map, parts_of, runs_of
from ..strips.strips import is_differentiated
from .tokens import MapsNote, Size

Work = Callable[[torch.Tensor], torch.Tensor]

# Tokens that pass at once: as many as blocks have at once by default.
ENOUGH = 8192


class End:
    """Takes the place of the ``forward`` of a module that looks at single tokens ``[B, N, C]``.

    If there are many, and those of a noted image are more than `most`.
    """

    def __init__(self, module: nn.Module, note: MapsNote, most: int) -> None:
        self.module, self.note, self.most = module, note, most

    def applies(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> bool:
        many = hidden_states.ndim == 3 and hidden_states.shape[1] > ENOUGH and sum(self.note.maps.areas[:1]) > self.most
        return many and not is_differentiated(self.module, hidden_states)

    def __call__(self, original: Callable[..., Any], hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        count = hidden_states.shape[1]
        return assemble(
            Runs(count, ENOUGH),
            lambda run: original(hidden_states[:, slice(*run)], *args, **kwargs),
            place=lambda run: (slice(None), slice(*run)),
            make=lambda some: some.new_empty(len(some), count, some.shape[2]),
        )


class HostEnd:
    """Takes the place of the ``forward`` of a module that looks at single tokens ``[B, N, C]``, those of a noted map.

    What it makes is on the host where it is large, unless it is what the model `delivers`.
    """

    def __init__(self, module: nn.Module, note: MapsNote, host: Host, delivers: bool = False) -> None:
        self.module, self.note, self.host, self.delivers = module, note, host, delivers

    def applies(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> bool:
        parts = self._parts(hidden_states) if hidden_states.ndim == 3 else []
        known = [part.shape[1] for part in parts] == self.note.maps.areas
        return known and self.host.serves(hidden_states.device) and not is_differentiated(self.module, hidden_states)

    def _parts(self, tokens: torch.Tensor) -> Sequence[torch.Tensor]:
        """Those of each map, if they are as many in all."""
        areas = self.note.maps.areas
        alike = tokens.shape[1] == sum(areas) and not isinstance(tokens, Map)
        return tokens.split_with_sizes(areas, dim=1) if alike else parts_of(tokens)

    def __call__(self, original: Callable[..., Any], hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        maps, work = self.note.maps, lambda tokens: original(tokens, *args, **kwargs)
        made = [self._of_map(work, *each) for each in zip(self._parts(hidden_states), maps, strict=True)]
        joined = JoinedTokens.of(made)
        return joined if isinstance(joined, Map) and joined.away else whole(joined)

    def _of_map(self, work: Work, tokens: torch.Tensor, size: Size) -> torch.Tensor:
        """What is made of all tokens of a map."""
        height, width = size

        def read(runs: Sequence[Run]) -> Iterator[torch.Tensor]:
            return runs_of(tokens, [(top * width, bottom * width) for top, bottom in runs])

        plane: StoredMap = assemble(
            Runs(height, max(ENOUGH // width, 1)),
            lambda run, some: as_map(work(some), (run[1] - run[0], width)),
            place=lambda run: (slice(None), slice(None), slice(*run)),
            make=lambda part: self._empty(part, height),
            read=read,
        )
        made = TokenMap.of(plane)
        return made if made.away else made.whole()

    def _empty(self, part: torch.Tensor, height: int) -> StoredMap:
        batch, channels, _, width = part.shape
        shape = (batch, channels, height, width)
        if self.host.takes(part, (batch, channels, self.note.maps.area)) and not self.delivers:
            passing = self.note.passing is not None and self.note.passing.alone
            return StoredMap.empty(shape, part, self.host, passing)
        # Token after token, as they are without.
        return StoredMap.of(part.new_empty(batch, height, width, channels).permute(0, 3, 1, 2))
