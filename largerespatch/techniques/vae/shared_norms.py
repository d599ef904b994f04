"""Group norms that see one plane piece by piece, over several passes: sample, record, pool, apply."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from ...core.pieces import repeated
from ...core.planes import part
from ...core.statistics import GivenStatistics, GroupStatistics, pool, record, record_by_rows
from ...core.tilings import Tile, Window

# How much more than the sample a plane may vary and still be taken to change in proportion.
MOST_RATIO = 4.0


def _seen(hidden_states: torch.Tensor, groups: int, inside: Tile, edge: float, windows: int) -> GroupStatistics:
    """The statistics ``[B, groups]`` of a batch ``[windows * B, C, H, W]`` of equal windows, as one.

    All cells of a window count `edge`, and those `inside` it the rest.
    """
    own, whole = (record(each, groups) for each in (part(hidden_states, inside), hidden_states))

    def weighed(of_own: torch.Tensor, of_whole: torch.Tensor) -> torch.Tensor:
        return torch.lerp(of_own, of_whole, edge).view(windows, -1, groups).mean(dim=0)

    mean = weighed(own.mean, whole.mean)
    middle = mean.repeat(windows, 1)
    spread = weighed(*(each.variance + (each.mean - middle).square() for each in (own, whole)))
    return GroupStatistics(windows * whole.cells, mean, spread)


def _for_windows(statistics: GroupStatistics, windows: int) -> GroupStatistics:
    """The same for each window of a batch ``[windows * B, ...]``."""
    cells, mean, variance = statistics
    return GroupStatistics(cells, mean.repeat(windows, 1), variance.repeat(windows, 1))


def _varying(known: GroupStatistics, piece: GroupStatistics, share: float) -> GroupStatistics:
    """`known` with the variance that a plane has at least, of which a piece is this `share`.

    A sample may miss what varies most, and half precision overflows where that is divided by next to nothing.
    """
    least = share * (piece.variance + (piece.mean - known.mean).square())
    return known._replace(variance=known.variance.maximum(least))


def correct(recorded: GroupStatistics, before: GroupStatistics, now: GroupStatistics) -> GroupStatistics:
    """What would have been recorded, had a sample shown `now` instead of `before`.

    A control variate: the plane changes as the sample did, in proportion to how much either varies. Only the change is
    the sample's, so how well it stands for the plane matters little. No variance becomes negative.
    """
    tiny = torch.finfo(before.variance.dtype).tiny
    ratio = (recorded.variance / before.variance.clamp(min=tiny)).clamp(max=MOST_RATIO)
    return GroupStatistics(
        recorded.cells,
        recorded.mean + ratio.sqrt() * (now.mean - before.mean),
        recorded.variance + ratio * (now.variance - before.variance),
    )


class SharedGroupNorm:
    """Takes the place of ``GroupNorm.forward`` while pieces of one plane run through it, with shared statistics.

    `sample`, `record` and `apply` say what the next maps are. Shared to begin with are a sample's own statistics. They
    are not the plane's, so what is recorded under them at the norms that follow is not quite the plane's either; a
    second run of the sample, once all has been recorded, says by how much (see `correct`). Where all norms before this
    one know the plane's statistics, it knows them after the next recording.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.groups = norm.num_groups
        self.statistics: GroupStatistics | None = None
        self._sampled: GroupStatistics | None = None
        self._recorded: list[GroupStatistics] = []
        self._prepare: Callable[[torch.Tensor], GroupStatistics] = self._known

    def sample(self, windows: Sequence[Window], edge: float) -> None:
        """The next map is a batch ``[windows * B, C, H, W]`` of equal windows: renew the shared statistics.

        Their tiles stand for the plane, but for the share `edge` of it, for which all that they show does.
        """
        self._prepare = partial(self._renew, windows, edge)

    def record(self, window: Window, share: float) -> None:
        """The next map is that of `window`, at whatever scale: note what its tile, `share` of the plane, shows."""
        self._prepare = partial(self._note, window, share)

    def apply(self) -> None:
        """The next maps are windows whose statistics are not wanted."""
        self._prepare = self._known

    def of(self, plane: torch.Tensor) -> GroupStatistics:
        """The statistics for the next map, which comes strip by strip: what is called before the next one are these."""
        statistics = self._prepare(plane)
        self._prepare = lambda strip: statistics
        return statistics

    def __call__(self, original: Callable[..., torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
        with GivenStatistics(self._prepare(hidden_states)):
            return original(hidden_states)

    def _known(self, hidden_states: torch.Tensor) -> GroupStatistics:
        assert self.statistics is not None  # a sample comes first
        return self.statistics

    def _renew(self, windows: Sequence[Window], edge: float, hidden_states: torch.Tensor) -> GroupStatistics:
        inside = windows[0].owned(*hidden_states.shape[-2:])
        seen = repeated(_seen, hidden_states, self.groups, inside, edge, len(windows))
        if self._sampled is None:
            self.statistics = seen
        else:
            self.statistics = repeated(correct, pool(self._recorded), self._sampled, seen)
        self._sampled, self._recorded = seen, []
        return repeated(_for_windows, self.statistics, len(windows))

    def _note(self, window: Window, share: float, hidden_states: torch.Tensor) -> GroupStatistics:
        known, owned = self._known(hidden_states), window.owned(*hidden_states.shape[-2:])
        self._recorded.append(record_by_rows(part(hidden_states, owned), self.groups))
        if known is not self._sampled:
            return known
        return repeated(_varying, known, record_by_rows(hidden_states, self.groups), share)
