"""A map that is halved, in the memory of the whole one, where that lies row by row. Exact."""

from typing import Any

import torch

from ..core.maps import StoredMap
from .strips import Forward, StripResample
from .walked import WalkedResample


class WalkedDownsample(WalkedResample):
    """Of a map that lies row by row the first rows of pairs become the output, where it fits; the second are spare.

    So nothing is alive beside its input, and whatever follows works in the memory of that.
    """

    by_rows = True

    def run(self, original: Forward, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return StripResample.run(self, original, self.strips.taken(source), *args, **kwargs)

    def output(self, source: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        if not isinstance(source, StoredMap) or not source.passing or source.away or source.dtype != like.dtype:
            return super().output(source, like, shape)
        memory, (_, channels, height, width) = source.whole(), shape
        sample, channel, row, cell = memory.stride()
        lies_so = (channel, cell) == (memory.shape[3], 1) and memory.shape[2] == 2 * height
        if not lies_so or channels * width > memory.shape[1] * memory.shape[3]:
            return super().output(source, like, shape)
        first = memory.as_strided(shape, (sample, width, 2 * row, 1))
        second = memory[:, :, 1:].as_strided(shape, (sample, width, 2 * row, 1))
        self.strips.spare = StoredMap.of(second, self.strips.host, passing=True)
        return StoredMap.of(first, self.strips.host, passing=True)
