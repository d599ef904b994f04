"""Linear attention to a whole map, strip by strip: numerator and denominator are sums over all cells, so they are
recorded in strips and pooled, and then each strip is attended with the sums of all. Exact, to rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ...core.maps import StoredMap
from ...core.patching import PatchStack
from ...core.pieces import assemble, collect
from ...core.tilings import Tile
from ..strips.cuts import Block, rows_of
from ..strips.strips import Forward
from .walk import Walk

# What pooled sums must know the inside of: that a map is attended by one of two methods, which give the same to
# rounding and are handed queries, keys and values ``[B, heads, C, cells]`` after all that mixes cells.
LEANS_ON = (
    "diffusers.models.attention_processor.SanaMultiscaleLinearAttention.apply_linear_attention",
    "diffusers.models.attention_processor.SanaMultiscaleLinearAttention.apply_quadratic_attention",
    "diffusers.models.attention_processor.SanaMultiscaleAttnProcessor2_0.__call__",
    "diffusers.models.attention_processor.SanaMultiscaleAttentionProjection.forward",
)

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def sums(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What cells ``[B, heads, C, N]`` add to the numerator, and last to the denominator: ``[B, heads, C + 1, C]``."""
    with_ones = F.pad(value.float(), (0, 0, 0, 1), value=1)
    return with_ones @ key.float().transpose(-1, -2)


def attended(query: torch.Tensor, pooled: torch.Tensor, eps: float) -> torch.Tensor:
    """The attention of queries ``[B, heads, C, N]`` to all cells whose sums are `pooled`."""
    both = pooled @ query.float()
    return (both[:, :, :-1] / (both[:, :, -1:] + eps)).to(query.dtype)


class WalkedLinearAttention:
    """Takes the place of the ``forward`` of a linear attention that is given maps.

    Queries, keys and values are computed twice, which is little beside the feed-forward that follows. `halo` counts the
    rows that its convolutions see around each.
    """

    def __init__(self, module: Any, walk: Walk, halo: int) -> None:
        self.module = module
        self.walk = walk
        self.halo = halo

    def __call__(self, original: Forward, hidden_states: torch.Tensor) -> torch.Tensor:
        walk = self.walk
        if walk.is_one(hidden_states):
            return original(hidden_states)
        plane = walk.taken(hidden_states)
        read, cuts = partial(walk.read, plane, self.halo), walk.cut(plane)

        def note(strip: Tile, given: Block) -> torch.Tensor:
            above, block = given
            own = slice(above * strip.width, (above + strip.height) * strip.width)
            noted = []

            def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
                noted.append(sums(key[..., own], value[..., own]))
                return query

            with self._attending(attend):
                original(block)
            return noted[0]

        here = torch.stack(collect(cuts, note, read=read, carries=True)).sum(dim=0)
        pooled = walk.bands.of(plane).summed(here)

        def compute(strip: Tile, given: Block) -> torch.Tensor:
            above, block = given
            with self._attending(lambda query, key, value: attended(query, pooled, self.module.eps)):
                return original(block)[:, :, above : above + strip.height]

        return assemble(  # type: ignore[no-any-return]
            cuts,
            compute,
            rows_of,
            into=plane if isinstance(plane, StoredMap) and plane.passing else None,
            make=lambda result: walk.empty(result, (*result.shape[:2], *plane.shape[2:])),
            read=read,
            carries=True,
        )

    @contextmanager
    def _attending(self, attend: Attend) -> Iterator[None]:
        """Inside, the module attends by that, whichever way it chooses for a strip's number of cells."""
        with PatchStack() as stack:
            for way in ("apply_linear_attention", "apply_quadratic_attention"):
                stack.wrap(self.module, way, lambda _, *given: attend(*given), way)
            yield
