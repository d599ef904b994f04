"""A context's values and weights, corrected so that some queries get of it what the rest of the map gives them.

*Judges* are a few queries of the map. What each of them gets of all tokens is summed up once. A context comes near
that, with an error that is known for the judges: it is made good by changing each value and weight by a combination of
what the judges pay to the key, the smallest one that does. Queries like the judges then get what is right, too.
Statistics knows such corrections as calibration weighting (Deville and Särndal, 1992) and as control variates.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Self

import torch

from ...core.pieces import collect
from ...core.tilings import Run, Runs

# What judges may pay to a single key, as the logarithm of the share that their estimated total says: where a sample of
# keys missed those that get the most, they would get more than numbers hold.
MOST = 8.0

# What is added to the diagonal that is divided by, in parts of its mean, or of what it would be were all keys alike:
# judges that ask for the same are told apart no further, and what no key is paid for is not asked of all.
RIDGE = 0.01

# Steps towards a tile's own solution from that of the whole map.
STEPS = 6

# The least that a weight may be changed to, in parts of what it was.
LEAST = 0.05

# Shares that are looked at together: 32 MiB in float32.
SHARES = 2**23


def in_full(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Inside, products of matrices are as precise as these are: autocast would make them of halves."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if kind != "meta" and torch.is_autocast_enabled(kind) else nullcontext()


class Judges(NamedTuple):
    """Queries ``[B, heads, J, C]``, scaled, and the logarithm of what each pays in all, about, ``[B, heads, J, 1]``."""

    queries: torch.Tensor
    total: torch.Tensor

    def shares(self, keys: torch.Tensor) -> torch.Tensor:
        """What each pays to keys ``[B, heads, n, C]``, ``[B, heads, J, n]``."""
        with in_full(keys):
            scores = self.queries @ keys.to(self.queries.dtype).transpose(-1, -2)
        return scores.sub_(self.total).clamp_(max=MOST).exp_()


def given(shares: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What judges get for their shares ``[B, heads, J, n]`` of values ``[B, heads, n, C]``, and the shares' sums.

    ``[B, heads, J, C + 1]``.
    """
    with in_full(shares):
        return torch.cat([shares @ values.to(shares.dtype), shares.sum(dim=-1, keepdim=True)], dim=-1)


class Calibration(NamedTuple):
    """What corrects the context of each tile of a map.

    `everything` is what judges get of the whole map, see `given`, `shares` what they pay to the context's keys,
    ``[B, heads, J, S]``, and `inverse` that of their products under the context's own weights, with a `ridge`. Of the
    change that is right for the judges a `part`, ``[B, heads, 1, 1]``, is right for others, too.
    """

    judges: Judges
    everything: torch.Tensor
    shares: torch.Tensor
    ridge: torch.Tensor
    inverse: torch.Tensor
    part: torch.Tensor

    @classmethod
    def of(
        cls,
        judges: Judges,
        everything: torch.Tensor,
        context: tuple[torch.Tensor, torch.Tensor],
        counts: torch.Tensor,
    ) -> Self:
        """For a context's keys and values ``[B, heads, S, C]``, of which each stands for so many tokens, ``[B, S]``."""
        shares = judges.shares(context[0])
        products, missing = _products(shares, counts), everything - given(shares * counts[:, None, None], context[1])
        with in_full(shares):
            ridge, inverse = _inverse(products, counts)
            part = _right_for_others(products, missing, everything, counts)
        return cls(judges, everything, shares, ridge, inverse, part)

    @torch.no_grad()
    def corrected(
        self, tile: tuple[torch.Tensor, torch.Tensor], values: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What to add to the values ``[B, heads, S, C]`` of the context, and the logarithms of its weights.

        A `tile` is its keys and values ``[B, heads, N, C]``; each of the context's tokens stands for so many outside
        it, ``[B, S]``.
        """
        missing = self.everything.clone()

        def without(run: Run, shares: torch.Tensor) -> None:
            missing.sub_(given(shares, tile[1][:, :, slice(*run)]))

        batch, heads, judges, _ = self.shares.shape
        runs = Runs(tile[0].shape[2], max(SHARES // (batch * heads * judges), 1))
        collect(runs, without, read=lambda runs: (self.judges.shares(tile[0][:, :, slice(*run)]) for run in runs))
        missing -= given(self.shares * counts[:, None, None], values)
        products = _products(self.shares, counts) + self.ridge
        with in_full(products):
            solution = self.inverse @ missing
            for _ in range(STEPS):
                solution = solution + self.inverse @ (missing - products @ solution)
            change = self.shares.transpose(-1, -2) @ (self.part * solution)
        weights = (1 + change[..., -1:]).clamp(min=LEAST)
        more = (values.to(change.dtype) + change[..., :-1]) / weights - values
        return more, (weights[..., 0] * counts[:, None]).log()


def _products(shares: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Of the judges' shares with each other, keys weighted by their counts, ``[B, heads, J, J]``."""
    with in_full(shares):
        return (shares * counts[:, None, None]) @ shares.transpose(-1, -2)


def _inverse(products: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ridge of products ``[B, heads, J, J]``, and the inverse of both together."""
    alike = counts.sum(dim=1).reciprocal()[:, None, None, None]
    ridge = RIDGE * products.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None].maximum(alike)
    ridge = ridge * torch.eye(products.shape[-1], dtype=products.dtype, device=products.device)
    return ridge, torch.linalg.inv_ex(products + ridge).inverse  # whose errors nobody on the host waits for


def _right_for_others(
    products: torch.Tensor, missing: torch.Tensor, everything: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """By how much to multiply a change, from 0 to 1: each half of the judges says of that which suits the other.

    Where few keys get all that a judge pays, and each judge pays for others, none of it is.
    """
    even, odd = slice(0, None, 2), slice(1, None, 2)

    def promised(some: slice, others: slice) -> torch.Tensor:
        _, inverse = _inverse(products[..., some, some], counts)
        return products[..., others, some] @ (inverse @ missing[..., some, :])

    def error(lacking: torch.Tensor) -> torch.Tensor:
        """Of what judges get, their means, of what they lack of sums of values and of shares."""
        return lacking[..., :-1] - lacking[..., -1:] * means

    sums, lacking = (torch.cat([each[..., even, :], each[..., odd, :]], dim=-2) for each in (everything, missing))
    means = sums[..., :-1] / sums[..., -1:]
    wanted, got = error(lacking), error(torch.cat([promised(odd, even), promised(even, odd)], dim=-2))
    fits, size = ((each * got).sum(dim=(-2, -1), keepdim=True) for each in (wanted, got))
    return (fits / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(0, 1)
