"""The samples of a batch, those of guidance first of all, dealt to several processes. Exact, as a batch in turns is."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..core.bands import Bands, at
from ..core.families import Order, Site
from .serial import looking_across, take_samples


def batch_sites(model: nn.Module, name: str, bands: Bands, joined: bool, of_all: Sequence[str] = ()) -> Iterator[Site]:
    """A model whose samples are dealt out, if there are `others` with the same rows; for the rest see `SharedBatch`."""
    if bands.others is not None:
        shares = Bands(bands.others)
        says = f"samples dealt to {shares.count} times as many"
        yield Site(model, name, Order.BATCH_SHARED, SharedBatch(model, name, shares, joined, of_all), says=says)


class SharedBatch:
    """Takes the place of a denoiser's ``forward``: this process runs its share of the samples.

    The first parameter, ``[B, ...]``, says how many there are. All run all where they cannot be dealt evenly or are
    in a list, where an attention processor may look across samples, and where the samples are those of one half of
    guidance (a ControlNet's ``guess_mode``), which the pipeline completes.

    Args:
        model: whose forward it is, and `path` its name in messages.
        shares: of the processes that have other samples.
        joined: whether the result is of all samples in all processes; else it is of this one's.
        of_all: names of arguments that concern all samples, however many rows they have.
    """

    def __init__(self, model: nn.Module, path: str, shares: Bands, joined: bool, of_all: Sequence[str] = ()) -> None:
        self.model = model
        self.path = path
        self.shares = shares
        self.joined = joined
        self.of_all = of_all

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph would end at each message
    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind_partial(*args, **kwargs)
        name, sample = next(iter(given.arguments.items()))
        batch, count = len(sample), self.shares.count
        with at(self.path):
            given.arguments[name] = self.shares.first(sample)
            in_one = isinstance(sample, torch.Tensor)  # not in a list of some
            if not in_one or batch % count or given.arguments.get("guess_mode") or looking_across(self.model):
                return original(*given.args, **given.kwargs)
            first = self.shares.rank * batch // count
            for each in set(given.arguments) - set(self.of_all):
                given.arguments[each] = take_samples(given.arguments[each], first, first + batch // count, batch, each)
            result = original(*given.args, **given.kwargs)
            return tree_map_only(torch.Tensor, self._together, result) if self.joined else result

    def _together(self, samples: torch.Tensor) -> torch.Tensor:
        return self.shares.gathered(samples, "samples").flatten(0, 1)
