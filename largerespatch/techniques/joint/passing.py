"""Whether a model's blocks may write over what they are given: the next one alone has seen it, and nobody listens."""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ...core.planes import Map
from ..listening import listeners, lookers


class Passing:
    """What is made inside a call of a model that passes it on, from block to block and to nothing else.

    Args:
        model: one whose ``forward`` keeps nothing of what its blocks are given and give.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._given: set[int] = set()
        self._alone: Callable[[], bool] = lambda: False

    def begin(self, forward: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        """A call of the model, by its `forward`."""
        leaves = (each for each in tree_leaves(dict(arguments)) if isinstance(each, torch.Tensor))
        self._given = {_memory(each) for each in leaves}
        followed = torch.is_grad_enabled()
        # Hooks of a large model take time to look at, which calls that need no blocks do not ask for.
        self._alone = cache(lambda: not followed and not self._kept() and self._is_upstreams(forward))

    @property
    def alone(self) -> bool:
        """Whether nobody but the next block sees what is made in the call."""
        return self._alone()

    def is_free(self, tensor: torch.Tensor) -> bool:
        """Whether a block that is given `tensor` may write over it: not what the caller gave, or has kept."""
        if not self.alone:
            return False
        return tensor.passing if isinstance(tensor, Map) else _memory(tensor) not in self._given

    def _kept(self) -> bool:
        """Whether some hook may keep what a module of the model is given or gives."""
        return listeners(self.model) or bool(lookers(self.model.modules()))

    def _is_upstreams(self, forward: Callable[..., Any]) -> bool:
        """Not what others have put in its place, who may keep what they like."""
        own = inspect.unwrap(type(self.model).forward)
        found = inspect.unwrap(forward)
        return getattr(found, "__func__", found) is own and own.__module__ == type(self.model).__module__


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
