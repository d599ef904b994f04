"""What a transformer does to tokens one by one, before its blocks and after them: in runs of rows, to and from the host.

So tokens of a large map are never all on the device, from where they are made of what the model is given to where they
are made to what it gives. Exact.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...core.hosts import Host
from ...core.maps import StoredMap
from ...core.pieces import assemble
from ...core.tilings import Run, Runs
from ...core.tokens import TokenMap, as_map, runs_of
from ..strips.strips import is_differentiated
from .tokens import MapsNote

# Tokens that pass at once: as many as blocks have at once by default.
ENOUGH = 8192


class HostEnd:
    """Takes the place of the ``forward`` of a module that looks at single tokens ``[B, N, C]``, those of a noted map.

    What it makes is on the host where it is large, unless it is what the model `delivers`.
    """

    def __init__(self, module: nn.Module, note: MapsNote, host: Host, delivers: bool = False) -> None:
        self.module, self.note, self.host, self.delivers = module, note, host, delivers

    def applies(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> bool:
        maps = self.note.maps
        known = len(maps) == 1 and hidden_states.ndim == 3 and hidden_states.shape[1] == maps.area
        return known and self.host.serves(hidden_states.device) and not is_differentiated(self.module, hidden_states)

    def __call__(self, original: Callable[..., torch.Tensor], hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        (height, width) = self.note.maps[0]

        def compute(run: Run, tokens: torch.Tensor) -> torch.Tensor:
            return as_map(original(tokens, *args, **kwargs), (run[1] - run[0], width))

        def read(runs: Sequence[Run]) -> Iterator[torch.Tensor]:
            return runs_of(hidden_states, [(top * width, bottom * width) for top, bottom in runs])

        plane: StoredMap = assemble(
            Runs(height, max(ENOUGH // width, 1)),
            compute,
            place=lambda run: (slice(None), slice(None), slice(*run)),
            make=lambda part: self._empty(part, height),
            read=read,
        )
        tokens = TokenMap.of(plane)
        return tokens if tokens.away else tokens.whole()

    def _empty(self, part: torch.Tensor, height: int) -> StoredMap:
        batch, channels, _, width = part.shape
        shape = (batch, channels, height, width)
        if self.host.takes(part, shape) and not self.delivers:
            passing = self.note.passing is not None and self.note.passing.alone
            return StoredMap.empty(shape, part, self.host, passing)
        # Token after token, as they are without.
        return StoredMap.of(part.new_empty(batch, height, width, channels).permute(0, 3, 1, 2))
