"""Rehearsing a loop over many pieces with a few that stand for all, to find out what it needs in memory.

From the second of its largest pieces on, a loop holds what it held before. So a memory estimate has to visit a few
pieces, not thousands. Loops over tiles, strips and chunks ask `pieces` what to visit; outside a rehearsal that is all.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

_rehearsing: ContextVar[bool] = ContextVar("rehearsing", default=False)

P = TypeVar("P")
Size = tuple[int, ...]

_ENOUGH = 3  # the first may lack a halo, and what is left of a full one is still alive during the next


@contextmanager
def rehearsal() -> Iterator[None]:
    """Loops inside, in this thread, visit few of their pieces. Their results are meaningless."""
    token = _rehearsing.set(True)
    try:
        yield
    finally:
        _rehearsing.reset(token)


def rehearsing() -> bool:
    """Whether values are meaningless and only shapes count."""
    return _rehearsing.get()


def _exceeded(size: Size, sizes: set[Size]) -> bool:
    return any(size != other and all(a <= b for a, b in zip(size, other, strict=True)) for other in sizes)


def pieces(every: Sequence[P], size: Callable[[P], Size] = lambda _: ()) -> Sequence[P]:
    """All of them; in a rehearsal the first, the last, and three of each `size` that no other one contains."""
    if not rehearsing():
        return every
    sizes = set(map(size, every))
    needed = Counter({each: _ENOUGH for each in sizes if not _exceeded(each, sizes)})
    visited = []
    for i, piece in enumerate(every):
        if i in (0, len(every) - 1) or needed[size(piece)] > 0:
            visited.append(piece)
            needed[size(piece)] -= 1
    return visited
