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
        self._put, self._done = 0, 0

    def put(self, work):
        self._work.append(work)
        self._put += 1

    def run(self, count=None):
        while self._work and (count is None or self._done < count):
            work = self._work.popleft()
            self._done += 1
            work()

    def record_event(self):
        return Event(self, self._put)

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


def play(monkeypatch):
    """Have `torch.cuda` deal in these streams; returns what came and was not kept for its reader."""
    current, unkept = [MAIN], {}
    copy, to, empty = torch.Tensor.copy_, torch.Tensor.to, torch.empty

    @contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    def later(target, source):
        stream = current[-1]
        target.fill_(float("nan"))
        stream.put(lambda: copy(target, source))

    def play_copy(self, source, non_blocking=False):
        if current[-1] is MAIN or not non_blocking:
            return copy(self, source)
        later(self, source)
        return self

    def play_to(self, *args, non_blocking=False, **kwargs):
        if current[-1] is MAIN or not non_blocking:
            return to(self, *args, **kwargs)
        result = torch.empty_like(self)
        later(result, self)
        unkept[result.untyped_storage().data_ptr()] = result
        return result

    def keep(self, stream):
        unkept.pop(self.untyped_storage().data_ptr(), None)

    def play_empty(*args, pin_memory=False, **kwargs):
        return empty(*args, **kwargs)

    cuda = SimpleNamespace(
        Stream=Stream,
        Event=Event,
        current_stream=lambda device: current[-1],
        stream=on,
        mem_get_info=lambda device: (2**40, 2**40),
        memory_reserved=lambda device: 0,
        memory_allocated=lambda device: 0,
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "empty", play_empty)
    monkeypatch.setattr(torch.Tensor, "copy_", play_copy)
    monkeypatch.setattr(torch.Tensor, "to", play_to)
    monkeypatch.setattr(torch.Tensor, "record_stream", keep)
    return unkept
