"""Attention to a map that is on the host: its keys come in runs, and what each run gives is added up. Exact.

Attention to a run of keys is a mean of their values, and the logarithm of the mass that it is a mean by. Means add up
weighted by their masses, in float32: ``log m = logaddexp(log m_1, log m_2)`` and ``o = o_1 m_1 / m + o_2 m_2 / m``.
Keys and values are projected anew for each chunk of queries; a run of the map is all that there is of them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ...core.pieces import assemble, collect
from ...core.tilings import Run, Runs
from ...core.tokens import TokenMap, runs_of
from .context import SCORES

# Keys of a run. With 512 channels in half precision they come in 0.7 ms at 25 GB/s; 2^13 queries attend to them in 2.7
# ms at 100 TFLOP/s.
KEYS = 2**14

# What torch's memory-efficient kernel, which tells the mass, is made for.
_TELLS = (torch.float16, torch.bfloat16, torch.float32)

Project = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class KeysInRuns(TorchFunctionMode):
    """Makes ``F.scaled_dot_product_attention`` attend to all tokens of a map, whatever keys and values it is given.

    `project` makes keys and values ``[B, heads, n, C]`` of tokens ``[B, n, C]``.
    """

    def __init__(self, tokens: TokenMap, project: Project) -> None:
        super().__init__()
        self.tokens = tokens
        self.project = project

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        return attend_in_runs(query, self.tokens, self.project, kwargs.get("scale"))


def attend_in_runs(query: torch.Tensor, tokens: TokenMap, project: Project, scale: float | None = None) -> torch.Tensor:
    """What attention of queries ``[B, heads, N, C]`` to all `tokens` gives."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    precise = torch.promote_types(query.dtype, torch.float32)
    mean = torch.zeros(query.shape, dtype=precise, device=query.device)
    mass = torch.full((*query.shape[:-1], 1), -math.inf, dtype=precise, device=query.device)

    def add(run: Run, some: torch.Tensor) -> None:
        other_mean, other_mass = _attend(query, *project(some), scale)
        sum_of_both = torch.logaddexp(mass, other_mass)
        mean.mul_((mass - sum_of_both).exp_()).add_(other_mean * (other_mass - sum_of_both).exp_())
        mass.copy_(sum_of_both)

    _, width = tokens.map_size
    collect(Runs(tokens.shape[1], max(KEYS // width, 1) * width), add, read=partial(runs_of, tokens))
    return mean.to(query.dtype)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of some values ``[B, heads, N, C]``, and the logarithm of its mass ``[B, heads, N, 1]``."""
    if query.device.type == "cuda" and query.dtype in _TELLS and query.shape[-1] % 8 == 0:
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        mean, mass, *_ = attend(query, key, value, None, True, scale=scale)
        return mean, mass[..., : query.shape[-2], None]
    return _attend_plainly(query, key, value, scale)


def _attend_plainly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where no kernel tells the mass: few queries at a time, whose scores are all there, in float32."""
    precise = torch.promote_types(query.dtype, torch.float32)
    key, value = key.to(precise).transpose(-1, -2), value.to(precise)

    def attended(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.matmul(query[:, :, slice(*run)].to(precise) * scale, key)
        mass = scores.logsumexp(dim=-1, keepdim=True)
        return torch.matmul(scores.sub_(mass).exp_(), value), mass

    batch, heads, queries, _ = query.shape
    length = max(SCORES // (batch * heads * key.shape[-1]), 1)
    return assemble(  # type: ignore[no-any-return]
        Runs(queries, length),
        attended,
        place=lambda run: (slice(None), slice(None), slice(*run)),
        make=lambda parts: tuple(each.new_empty(batch, heads, queries, each.shape[-1]) for each in parts),
    )
