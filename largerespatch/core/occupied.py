"""Which models are patched now."""

import threading
import weakref
from typing import Generic, TypeVar

from torch import nn

from .families import parts_of

P = TypeVar("P")


class Occupied(Generic[P]):
    """Which models are patched now, by which patch: the models themselves carry no mark. Any thread may ask."""

    def __init__(self) -> None:
        self._patches: weakref.WeakKeyDictionary[nn.Module, P] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def claim(self, models: dict[str, nn.Module], patch: P) -> None:
        """All parts of the `models` for one patch.

        Raises:
            ValueError: some are another's. None is claimed then.
        """
        parts = {part: name for name, model in models.items() for part in parts_of(model)}
        with self._lock:
            for part, name in parts.items():
                if part in self._patches:
                    which = "this" if self._patches[part] is patch else "another"
                    raise ValueError(
                        f"pipe.{name} is patched already, by {which} LargeResPatch; accepted is one at a time: leave "
                        "its block (or call its `disable`) first"
                    )
            self._patches.update(dict.fromkeys(parts, patch))

    def release(self, patch: P) -> None:
        with self._lock:
            for part in [part for part, its in self._patches.items() if its is patch]:
                del self._patches[part]

    def on(self, models: dict[str, nn.Module]) -> list[P]:
        """The patches that are on some models."""
        with self._lock:
            return list({self._patches[model]: None for model in models.values() if model in self._patches})
