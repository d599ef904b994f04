"""Something to do once, when the first of some methods is called."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .patching import PatchStack, beneath_hooks


class FirstCall:
    """Waits for the first call of any of some methods, before which something is done.

    That call is then made by what is in place by that time: what is done may take `stack`, which waits, off and
    exchange what is beneath. Nothing else holds on to it, so that whoever it belongs to is freed with its last user.
    """

    def __init__(self) -> None:
        self.stack = PatchStack()
        self._waits = False

    def wait_for(self, target: Any, method: str, label: str, work: Callable[[], None]) -> None:
        self._waits = True
        self.stack.wrap(target, method, partial(self._call, target, method, work), label)

    def _call(
        self, target: Any, method: str, work: Callable[[], None], original: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self._once(work)
        call = original if self.stack.active else getattr(*beneath_hooks(target, method))
        return call(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _once(self, work: Callable[[], None]) -> None:
        if self._waits:
            self._waits = False
            work()
