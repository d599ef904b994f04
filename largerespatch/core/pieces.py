"""The one loop over pieces: it visits them, allocates the result at the first, and writes each where it belongs.

From the second of its largest pieces on, a loop holds what it held before. So a memory estimate has to visit a few
pieces, not thousands: inside a `rehearsal` every loop does. Since there is no other loop, no technique can forget it.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

P = TypeVar("P")
R = TypeVar("R")
Size = tuple[int, ...]

# Runs some work, or does as if: ``(known, key, work, given, **named)``, where work of the same `key` that was given
# what looks the same leaves the same behind. It is remembered in `known`, or for the whole rehearsal if that is None.
Runner = Callable[..., Any]

_rehearsing: ContextVar[Runner | None] = ContextVar("rehearsing", default=None)

_ENOUGH = 2  # what is left of a full one is still alive during the next


def _run_each(known: object, key: Hashable, work: Callable[..., R], given: tuple[Any, ...], **named: Any) -> R:
    return work(*given, **named)


@contextmanager
def rehearsal(run: Runner = _run_each) -> Iterator[None]:
    """Loops inside, in this thread, visit few of their pieces, which `run` runs. Their results are meaningless."""
    token = _rehearsing.set(run)
    try:
        yield
    finally:
        _rehearsing.reset(token)


def rehearsing() -> bool:
    """Whether values are meaningless and only shapes count."""
    return _rehearsing.get() is not None


def visited(pieces: Sequence[P], carries: bool = False) -> Sequence[P]:
    """All of them; in a rehearsal two of each size that no other one contains.

    `carries`: the reader keeps something of each piece for the next. So the first, which gets nothing, is another one.

    A piece that has a method `size` is as large as that says, a slice or a run as it is long; others are all alike. Of
    pieces that have a method `telling`, which says at what places those are found, the others are not even looked at.
    """
    if not rehearsing():
        return pieces
    places = pieces.telling() if hasattr(pieces, "telling") else range(len(pieces))
    looked_at = [pieces[i] for i in places]
    sizes = set(map(_size, looked_at))
    needed = Counter({each: _ENOUGH for each in sizes if not _exceeded(each, sizes)})
    few = looked_at[: int(carries)]
    for piece in looked_at[len(few) :]:
        if needed[_size(piece)] > 0:
            few.append(piece)
            needed[_size(piece)] -= 1
    return few


def _size(piece: Any) -> Size:
    match piece:
        case slice(start=int(first), stop=int(last)) | (int(first), int(last)):
            return (last - first,)
    return tuple(piece.size()) if hasattr(piece, "size") else ()


def _exceeded(size: Size, sizes: set[Size]) -> bool:
    return any(size != other and all(a <= b for a, b in zip(size, other, strict=True)) for other in sizes)


def repeated(work: Callable[..., R], *given: Any, **named: Any) -> R:
    """The result of work that every piece does; in a rehearsal it runs once for all that is given what looks the same.

    It has to leave nothing behind but new tensors.
    """
    return alike(work, work, *given, **named)


def alike(key: Any, work: Callable[..., R], *given: Any, **named: Any) -> R:
    """The same for work that is known by a `key`, such as a technique: whoever rehearses says which ones are alike."""
    run = _rehearsing.get()
    return work(*given, **named) if run is None else run(None, key, work, given, **named)


def _rehearsed(compute: Callable[..., R]) -> Callable[..., R]:
    """The same; in a rehearsal it runs once for all pieces of a size that are given what looks the same."""
    run = _rehearsing.get()
    if run is None:
        return compute
    known: dict[Any, Any] = {}
    return lambda piece, *given: run(known, _size(piece), partial(compute, piece), given)


def collect(
    pieces: Sequence[P],
    compute: Callable[..., R],
    read: Callable[[Sequence[P]], Iterator[Any]] | None = None,
    carries: bool = False,
) -> list[R]:
    """What `compute` makes of each of the visited pieces.

    `read` is for what pieces are cut from: given the pieces that will be visited, it yields what there is to read for
    each, one after another, and `compute` gets that as well. It `carries` where it keeps something for the next piece.
    """
    return _loop(pieces, _rehearsed(compute), read, carries)


def _loop(
    pieces: Sequence[P],
    work: Callable[..., R],
    read: Callable[[Sequence[P]], Iterator[Any]] | None,
    carries: bool,
) -> list[R]:
    which = visited(pieces, carries)
    # Not a loop with variables of its own: they would keep what was read for one piece while the next one is read.
    results = list(map(work, which) if read is None else map(work, which, read(which)))
    if len(results) != len(which):
        raise ValueError(f"of {len(which)} pieces only {len(results)} were read")
    return results


def side_by_side(*sources: Iterator[Any]) -> Iterator[tuple[Any, ...]]:
    """What several sources yield, as `zip`, which would keep what it gave last while it asks for the next."""
    return map(lambda *each: each, *sources)


def assemble(
    pieces: Sequence[P],
    compute: Callable[..., Any],
    place: Callable[[P], Any],
    make: Callable[[Any], Any] | None = None,
    into: Any = None,
    read: Callable[[Sequence[P]], Iterator[Any]] | None = None,
    carries: bool = False,
) -> Any:
    """Puts what `compute` makes of each piece into one output, at the index that `place` gives for the piece.

    The output is `into`, or what `make` makes once the first result is there to say its shape and dtype. Several
    results of a piece, in a tuple, go into as many outputs. `read` and `carries` as for `collect`. Returns the output.
    """
    outputs, compute = [into], _rehearsed(compute)

    def put(piece: P, *given: Any) -> None:
        result = compute(piece, *given)
        if outputs[0] is None:
            assert make is not None  # callers give one of the two
            outputs[0] = make(result)
        several = zip(outputs[0], result, strict=True) if isinstance(result, tuple) else [(outputs[0], result)]
        for output, part in several:
            output[place(piece)] = part

    _loop(pieces, put, read, carries)
    return outputs[0]


class Putting:
    """Where results of a loop go that are not all in one place: `put` is told the index and the result."""

    def __init__(self, put: Callable[[Any, Any], None]) -> None:
        self.put = put

    def __setitem__(self, index: Any, result: Any) -> None:
        self.put(index, result)
