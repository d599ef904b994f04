"""A transformer whose tokens several processes share, each with those of a band of rows of the image. Exact.

What it is given is cut where it comes in, and joined where it goes out. In between only attention looks from one token
at others (see `largerespatch.techniques.shared_attention`); text is in all processes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..core.bands import Bands
from .joint_tokens import MapsNote, own_rows
from .shared_maps import InBands


class TokensInBands(InBands):
    """The same for tokens ``[B, N, C]`` of the maps that are noted. Of references it is not known how to share them.

    Args:
        takes: of which arguments of the model tokens have rows, and where; see `Tokens`.
    """

    def __init__(
        self, model: nn.Module, path: str, bands: Bands, note: MapsNote, takes: Mapping[str, Any], joined: bool
    ) -> None:
        super().__init__(model, path, bands, {}, joined)
        self.note = note
        self.takes = takes

    def _size(self, sample: torch.Tensor) -> tuple[int, int]:
        maps = self.note.maps
        if len(maps) != 1 or maps.area != sample.shape[1]:
            told = " and ".join(f"{height}x{width}" for height, width in maps) or "no maps that are known"
            raise ValueError(
                f"process_group: {self.path} runs in bands of the tokens of one image, without references; got "
                f"{sample.shape[1]} tokens of {told}"
            )
        return maps[0]

    def _refused(self, arguments: dict[str, Any]) -> list[str]:
        return []  # what of that there is blocks see

    def _cut_all(self, arguments: dict[str, Any]) -> None:
        band, sample = self.bands.cutting(*self.note.maps[0]), next(iter(arguments))
        arguments.update(own_rows({sample: self.takes[sample]}, arguments, band))
        rest = {name: rows for name, rows in self.takes.items() if name != sample}
        arguments.update(own_rows(rest, arguments, band, self.bands.first))  # pictures may be encoded with other noise

    def _whole(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.bands.cutting(*self.note.maps[0]).all_tokens(tokens, "maps")
