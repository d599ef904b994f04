"""A transformer whose tokens several processes share, each with those of a band of rows of the image. Exact.

What it is given is cut where it comes in, and joined where it goes out. In between only attention looks from one token
at others (see `largerespatch.techniques.joint.shared_attention`); text is in all processes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...core.bands import Bands
from ..shared_maps import InBands
from .tokens import MapsNote, own_rows


class TokensInBands(InBands):
    """The same for tokens ``[B, N, C]`` of the maps that are noted. Of references it is not known how to share them.

    Args:
        takes: of which arguments of the model tokens have rows, and where; see `Tokens`. Where its `sample` is none of
            these, it is left as it is, and tokens are cut where they enter a list of blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        bands: Bands,
        note: MapsNote,
        takes: Mapping[str, Any],
        sample: str,
        joined: bool,
    ) -> None:
        super().__init__(model, path, bands, {}, joined)
        self.note = note
        self.takes = takes
        self.sample = sample

    def _size(self, sample: Any) -> tuple[int, int]:
        maps = self.note.maps
        if len(maps) != 1 or (self.sample in self.takes and maps.area != sample.shape[1]):
            told = " and ".join(f"{height}x{width}" for height, width in maps) or "no maps that are known"
            raise ValueError(
                f"process_group: {self.path} runs in bands of the tokens of one image, without references; got {told}"
            )
        return maps[0]

    def _refused(self, arguments: dict[str, Any]) -> list[str]:
        return []  # what of that there is blocks see

    def _cut_all(self, arguments: dict[str, Any]) -> None:
        band = self.bands.of_whole(*self.note.maps[0])
        for name, rows in self.takes.items():
            # Pictures may be encoded with other noise, too. The sample is the first process's already.
            seen = (lambda sample: sample) if name == self.sample else self.bands.first
            arguments.update(own_rows({name: rows}, arguments, band, seen=seen))

    def _whole(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.bands.of_whole(*self.note.maps[0]).all_tokens(tokens, "maps")
