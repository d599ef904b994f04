"""Group statistics of a map that is seen piece by piece: record, pool, apply."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .patching import PatchStack
from .pieces import collect, repeated
from .planes import fetch
from .tilings import Run, Runs

# Values whose statistics are taken together.
BAND = 2**24

# Values that are normalized, too, for their statistics: 1 MiB in float32.
NORMALIZED = 2**18


class GroupStatistics(NamedTuple):
    """Mean and population variance ``[B, groups]`` in float32 or better, over `cells` cells of a map."""

    cells: int
    mean: torch.Tensor
    variance: torch.Tensor


def record(hidden_states: torch.Tensor, groups: int) -> GroupStatistics:
    """The statistics of a map ``[B, C, H, W]``, per sample and group."""
    return repeated(_record, hidden_states, groups)


def _record(hidden_states: torch.Tensor, groups: int) -> GroupStatistics:
    batch, _, height, width = hidden_states.shape
    variance, mean = _var_mean(_precise(hidden_states).reshape(batch * groups, -1))
    return GroupStatistics(height * width, mean.view(batch, groups), variance.view(batch, groups))


def _var_mean(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Population variance and mean ``[R]`` of each row of ``[R, N]``.

    On a CPU `torch.var_mean` takes one value after another, 3 to 13 times as long as the kernel of group norm, which
    tells the same but makes a result besides, too: so of few rows at a time.
    """
    if rows.device.type != "cpu" or (torch.is_grad_enabled() and rows.requires_grad):
        return torch.var_mean(rows, dim=-1, correction=0)
    count = rows.shape[1]
    parts = [
        torch.native_group_norm(some[:, None].contiguous(), None, None, len(some), 1, count, 1, 0.0)[1:]
        for some in torch.split(rows, max(NORMALIZED // count, 1))
    ]
    means, inverse_deviations = (torch.cat(each)[:, 0] for each in zip(*parts, strict=True))
    return inverse_deviations.pow(-2), means


def _precise(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def pool(parts: Sequence[GroupStatistics]) -> GroupStatistics:
    """The statistics of the union of disjoint parts: exact, with the term between parts.

    ``mean = sum n_i m_i / N`` and ``variance = sum n_i (v_i + (m_i - mean)^2) / N``. Averaging the variances alone
    loses what the parts differ by: on a brightness ramp more than half of the variance.
    """
    return repeated(_pool, parts)


def _pool(parts: Sequence[GroupStatistics]) -> GroupStatistics:
    total = sum(part.cells for part in parts)
    means = torch.stack([part.mean for part in parts])
    variances = torch.stack([part.variance for part in parts])
    # Filled, not copied from a list: that would stop the device for a moment, and without data it cannot be done.
    weights = torch.stack([means.new_full((1, 1), part.cells / total) for part in parts])
    mean = (weights * means).sum(dim=0)
    variance = (weights * (variances + (means - mean).square())).sum(dim=0)
    return GroupStatistics(total, mean, variance)


def record_by_rows(plane: torch.Tensor, groups: int, runs: Sequence[Run] = ()) -> GroupStatistics:
    """The same as `record` for a tensor or map, run of rows by run, so that no float32 copy of all of it is alive."""
    if not runs:
        rows = max(BAND // max(plane.numel() // plane.shape[2], 1), 1)
        runs = Runs(plane.shape[2], rows)
    return pool(collect(runs, lambda run, rows: record(rows, groups), read=partial(fetch, plane)))


def apply(
    statistics: GroupStatistics,
    hidden_states: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``F.group_norm`` of ``[B, C, ...]`` with the given statistics in place of the input's own.

    Batch norm in evaluation is just that, per channel: one fused pass, computed in float32 for half precision.
    """
    if torch.is_grad_enabled() and statistics.mean.requires_grad:
        return _apply_with_gradients(statistics, hidden_states, groups, weight, bias, eps)
    batch, channels, *cells = hidden_states.shape
    per_group = channels // groups

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values[..., None].expand(-1, -1, per_group).flatten()

    def for_all(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else _precise(values).expand(batch, -1).flatten()

    normalized = F.batch_norm(
        hidden_states.reshape(1, batch * channels, *cells),
        spread(statistics.mean),
        spread(statistics.variance),
        for_all(weight),
        for_all(bias),
        training=False,
        eps=eps,
    )
    return normalized.view(batch, channels, *cells)


def _apply_with_gradients(
    statistics: GroupStatistics,
    hidden_states: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """The same by plain operations: batch norm has no gradient for statistics."""
    mean, spread = statistics.mean[..., None], (statistics.variance[..., None] + eps).rsqrt()
    by_group = _precise(hidden_states).reshape(len(hidden_states), groups, -1)
    by_channel = ((by_group - mean) * spread).reshape(*hidden_states.shape[:2], -1)
    if weight is not None:
        by_channel = by_channel * weight[:, None]
    if bias is not None:
        by_channel = by_channel + bias[:, None]
    return by_channel.view(hidden_states.shape).to(hidden_states.dtype)


class GivenStatistics(TorchFunctionMode):
    """Makes ``F.group_norm`` use given statistics.

    So a module's original forward still runs, with whatever hooks bring its weights to the device or to a dtype.
    """

    def __init__(self, statistics: GroupStatistics) -> None:
        super().__init__()
        self.statistics = statistics

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.group_norm:
            return repeated(apply, self.statistics, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def sharing_statistics(norm: nn.GroupNorm, statistics: GroupStatistics) -> Iterator[None]:
    """Inside, `norm` gives whatever part of a map it sees the statistics of the whole."""

    def normalize(original: Callable[..., torch.Tensor], part: torch.Tensor) -> torch.Tensor:
        with GivenStatistics(statistics):
            return original(part)

    with PatchStack() as stack:
        stack.wrap(norm, "forward", normalize, "group_norm.forward")
        yield
