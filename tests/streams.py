"""CUDA streams, played on the CPU by the least obliging ones there could be, and a watch over what they do.

A copy that is put on a side stream happens as late as what was asked for allows: when somebody waits for it. Until then
its target holds no numbers, and what is written over its source meanwhile is what arrives. So a wait that is missing is
a wrong result, where it is the main stream or the host that does not wait.

The main stream's own work is done at once, so that a side stream which does not wait for it finds what it needs all the
same. So there is a watch: of every piece of work it is noted what is known to be done before it begins, by the waits
alone (a vector clock). What reads cells that another stream wrote, or writes cells that another one wrote or read, and
does not know that to be done, is a race.
"""

from collections import Counter, deque
from contextlib import contextmanager
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from largerespatch.core.planes import Map


class Stream:
    """`known` counts how much of each stream's work is done when the next piece of this one's begins."""

    def __init__(self, host=None, name="stream"):
        self.host = Counter() if host is None else host  # what the host knows, as of streams
        self.known = Counter()
        self.name = name
        self._work = deque()
        self.total, self._done = 0, 0  # pieces of work that were put on it, and those that are done

    def begin(self):
        """Another piece of work, which begins no earlier than the host gets to it."""
        self.known |= self.host
        self.known[self] += 1

    def put(self, work):
        self.begin()
        self._work.append(work)
        self.total += 1

    def run(self, count=None):
        while self._work and (count is None or self._done < count):
            work = self._work.popleft()
            self._done += 1
            work()

    def record_event(self):
        return Event(self)

    def wait_event(self, event):
        self.put(lambda: event.stream.run(event.count))
        self.known |= event.known
        if self.name == "main":
            self.run()

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        self.record_event().synchronize()


class Event:
    def __init__(self, stream):
        self.stream, self.count, self.known = stream, stream.total, stream.known.copy()

    def synchronize(self):
        self.stream.run(self.count)
        self.stream.host |= self.known


class Memory:
    """Of each cell of a storage, which piece of whose work last wrote and read it."""

    def __init__(self, cells):
        self.cells = cells
        self.written, self.read = {}, {}

    def missed(self, known, where, writes):
        """Whose work on cells is not known to be done, though it has to be."""
        for notes in (self.written, self.read) if writes else (self.written,):
            for other, counts in notes.items():
                if counts[where].max(initial=0) > known[other]:
                    yield other

    def note(self, actor, count, where, writes):
        notes = self.written if writes else self.read
        notes.setdefault(actor, np.zeros(self.cells, dtype=np.int64))[where] = count


def cells_of(tensor):
    """Places in its storage."""
    places = np.array([tensor.storage_offset()])
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + stride * np.arange(size)).ravel()
    return places


class Watch(TorchDispatchMode):
    """Notes what is done to memory that several streams, or the host and a stream, have to do with.

    `races` are what should have waited; `unkept` is memory that was not kept for the stream that uses it, too.
    """

    def __init__(self):
        super().__init__()
        self.host = Counter()
        self.main = Stream(self.host, "main")
        self.current, self.sides = [self.main], []
        self.memories = WeakKeyDictionary()
        self.pinned = WeakKeyDictionary()
        self.owners = WeakKeyDictionary()  # of memory that was made on a side stream
        self.unkept, self.races, self.playing = {}, [], False

    def sound(self):
        assert not self.races, self.races
        assert not self.unkept
        return True

    def made(self, tensor, pinned):
        storage = tensor.untyped_storage()
        if pinned:
            self.pinned[storage] = True
        if pinned or self.current[-1] is not self.main:
            self.memories[storage] = Memory(tensor.numel())
            self.owners[storage] = self.current[-1]

    def access(self, actor, known, tensor, writes):
        memory = self.memories.get(tensor.untyped_storage())
        if memory is not None and tensor.numel():
            where = cells_of(tensor)
            for other in memory.missed(known, where, writes):
                if other is not actor:
                    doing = "writes over" if writes else "reads"
                    self.races.append(f"{_name(actor)} {doing} what {_name(other)} may not have done with")
            memory.note(actor, known[actor], where, writes)

    def copies(self, stream, target, source):
        """A copy on a side stream begins."""
        for tensor in (target, source):
            storage = tensor.untyped_storage()
            if storage not in self.memories:  # until now the main stream's alone, which may have written it just now
                size = storage.nbytes() // tensor.element_size()
                self.memories[storage] = memory = Memory(size)
                memory.note(self.main, self.main.known[self.main], np.arange(size), writes=True)
            if storage not in self.pinned:  # the host's memory is watched over by torch
                other = stream if self.owners.get(storage) is not stream else self.main
                self.unkept.setdefault((storage.data_ptr(), other), tensor)
        self.access(stream, stream.known, source, writes=False)
        self.access(stream, stream.known, target, writes=True)

    def keep(self, tensor, stream):
        self.unkept.pop((tensor.untyped_storage().data_ptr(), stream), None)

    @contextmanager
    def unseen(self):
        before, self.playing = self.playing, True
        yield
        self.playing = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.playing and not _is_view(func):
            self._note(func, args, kwargs)
        return func(*args, **kwargs)

    def _note(self, func, args, kwargs):
        tensors = [each for each in tree_leaves((args, kwargs)) if _has_memory(each)]
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        written = {
            id(each)
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for each in tree_leaves(given.get(argument.name))
        }
        pinned = [each.untyped_storage() in self.pinned for each in tensors]
        by_host = any(pinned) and all(pinned)
        if by_host:
            self.host[HOST] += 1
        else:
            self.main.begin()
        actor, known = (HOST, self.host) if by_host else (self.main, self.main.known)
        for tensor in tensors:
            self.access(actor, known, tensor, id(tensor) in written)
        if any(pinned):  # a copy between the host and the device, which the host waits for
            self.host |= self.main.known


HOST = "the host"


def _name(actor):
    return actor if actor is HOST else f"the {actor.name} stream"


def _has_memory(value):
    return isinstance(value, torch.Tensor) and not isinstance(value, Map)


def _is_view(func):
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)


@contextmanager
def play(host):
    """Inside, `host` copies on these streams; yields the watch over them."""
    copy, empty, watch = torch.Tensor.copy_, torch.empty, Watch()

    @contextmanager
    def on(stream):
        watch.current.append(stream)
        yield
        watch.current.pop()

    def play_copy(self, source, non_blocking=False):
        stream = watch.current[-1]
        if stream is watch.main or not non_blocking:
            return copy(self, source)

        def late():
            with watch.unseen():
                copy(self, source)

        stream.put(late)
        watch.copies(stream, self, source)
        with watch.unseen():
            self.fill_(float("nan"))
        return self

    def play_empty(*args, pin_memory=False, **kwargs):
        with watch.unseen():
            result = empty(*args, **kwargs)
        watch.made(result, pin_memory)
        return result

    def side(device):
        watch.sides.append(Stream(watch.host, "side"))
        return watch.sides[-1]

    cuda = SimpleNamespace(
        Stream=side,
        Event=Event,
        current_stream=lambda device: watch.current[-1],
        stream=on,
    )
    with pytest.MonkeyPatch.context() as monkeypatch, watch:
        monkeypatch.setattr(host, "pins", host.serves)
        monkeypatch.setattr(torch, "cuda", cuda)
        monkeypatch.setattr(torch, "empty", play_empty)
        monkeypatch.setattr(torch.Tensor, "copy_", play_copy)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: watch.keep(self, stream))
        yield watch
