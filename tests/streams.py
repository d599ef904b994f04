"""CUDA streams, played on the CPU by the least obliging ones there could be.

A copy that is put on a side stream happens as late as what was asked for allows: when somebody waits for it. Until then
its target holds no numbers, and what is written over its source meanwhile is what arrives. So a wait that is missing is
a wrong result. (The main stream is ahead of all others here, so work that comes too early is not found out.)
"""

from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace

import torch


class Stream:
    def __init__(self, device=None):
        self._work = deque()
        self.total, self._done = 0, 0  # pieces of work that were put on it, and those that are done

    def put(self, work):
        self._work.append(work)
        self.total += 1

    def run(self, count=None):
        while self._work and (count is None or self._done < count):
            work = self._work.popleft()
            self._done += 1
            work()

    def record_event(self):
        return Event(self, self.total)

    def wait_event(self, event):
        self.put(event.synchronize)
        if self is MAIN:
            self.run()

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        self.run()


class Event:
    def __init__(self, stream, count):
        self.stream, self.count = stream, count

    def synchronize(self):
        self.stream.run(self.count)


MAIN = Stream()


def play(monkeypatch, host):
    """Have `host` copy on these streams; returns the memory that was not kept for the stream that uses it, too."""
    current, pinned, unkept = [MAIN], {}, {}
    copy, empty = torch.Tensor.copy_, torch.empty

    @contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    def key(tensor):
        return tensor.untyped_storage().data_ptr()

    def play_copy(self, source, non_blocking=False):
        stream = current[-1]
        if stream is MAIN or not non_blocking:
            return copy(self, source)
        self.fill_(float("nan"))
        stream.put(lambda: copy(self, source))
        # Whoever copies to or from memory of the device does so on a stream that it does not belong to, or gives it to
        # another one. The host's memory is watched over by torch.
        for each in (self, source):
            if key(each) not in pinned:
                unkept[key(each)] = each
        return self

    def play_empty(*args, pin_memory=False, **kwargs):
        result = empty(*args, **kwargs)
        if pin_memory:
            pinned[key(result)] = result
        return result

    cuda = SimpleNamespace(
        Stream=Stream,
        Event=Event,
        current_stream=lambda device: current[-1],
        stream=on,
        mem_get_info=lambda device: (2**40, 2**40),
        memory_reserved=lambda device: 0,
        memory_allocated=lambda device: 0,
    )
    monkeypatch.setattr(host, "pins", host.serves)
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "empty", play_empty)
    monkeypatch.setattr(torch.Tensor, "copy_", play_copy)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: unkept.pop(key(self), None))
    return unkept
