"""Rehearsing a loop over many pieces with a few that stand for all, to find out what it needs in memory.

From the second of its equal pieces on, a loop holds what it held before. So a memory estimate has to visit two pieces of
every kind, not thousands. Loops over tiles, strips and chunks ask `pieces` what to visit; outside a rehearsal that is
all of them.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

_rehearsing: ContextVar[bool] = ContextVar("rehearsing", default=False)

P = TypeVar("P")

_ENOUGH = 2  # of a kind: during the second, what is left of the first is still alive


@contextmanager
def rehearsal() -> Iterator[None]:
    """Loops inside, in this thread, visit few of their pieces. Their results are meaningless."""
    token = _rehearsing.set(True)
    try:
        yield
    finally:
        _rehearsing.reset(token)


def pieces(every: Sequence[P], kind: Callable[[P], Hashable] = lambda _: None) -> Sequence[P]:
    """All of them; in a rehearsal the first two and the last two, and the first two of every `kind`.

    `kind` tells pieces apart that may need different amounts of memory.
    """
    if not _rehearsing.get() or len(every) <= 2 * _ENOUGH:
        return every
    seen: Counter[Hashable] = Counter()
    visited = []
    for i, piece in enumerate(every):
        seen[kind(piece)] += 1
        if seen[kind(piece)] <= _ENOUGH or i >= len(every) - _ENOUGH:
            visited.append(piece)
    return visited
