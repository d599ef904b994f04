"""Whole maps in the host's memory, strips of them on the device, copies beside the computation."""

from collections import deque
from collections.abc import Iterable, Iterator

import torch

# Of an image, so that what a pipeline does to it next still fits: it makes up to three copies.
COPIES_TO_COME = 3


def _by_rows(plane: torch.Tensor) -> torch.Tensor:
    """``[H, B, C, W]``, a view of ``[B, C, H, W]``."""
    return plane.permute(2, 0, 1, 3)


class Shuttle:
    """Brings strips of maps ``[B, C, H, W]`` from `host` to `device` and back.

    Maps lie in the host's memory row by row, so that a strip is a single run of it. On CUDA that memory is pinned and
    each direction has a stream of its own: while one strip is computed, the next one comes and the last one goes. No
    more than two are under way, so the device never holds more. Elsewhere copies are made where they are asked for.
    """

    def __init__(self, device: torch.device, host: torch.device) -> None:
        self.device = device
        self.host = host
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            self._incoming, self._outgoing = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        self._stored: deque[torch.cuda.Event] = deque()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a map ``[B, C, H, W]`` on the host."""
        batch, channels, height, width = shape
        rows = torch.empty(height, batch, channels, width, dtype=dtype, device=self.host, pin_memory=self.is_cuda)
        return rows.permute(1, 2, 0, 3)

    def fetch(self, pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Strips on the device, in turn. Those that come later may not be stored to before they have been yielded."""
        if not self.is_cuda:
            yield from (piece.to(self.device).contiguous() for piece in pieces)
            return
        compute = torch.cuda.current_stream(self.device)
        self._incoming.wait_stream(self._outgoing)  # what was stored before can be read
        used: deque[torch.cuda.Event] = deque()
        for piece in pieces:
            with torch.cuda.stream(self._incoming):
                rows = _by_rows(piece).to(self.device, non_blocking=True)
            compute.wait_stream(self._incoming)
            rows.record_stream(compute)
            yield rows.permute(1, 2, 0, 3).contiguous()
            used.append(compute.record_event())
            if len(used) > 1:
                used.popleft().synchronize()

    def store(self, place: torch.Tensor, strip: torch.Tensor) -> None:
        """A strip into its `place` on the host."""
        if not self.is_cuda:
            place.copy_(strip)
            return
        rows = _by_rows(strip).contiguous()
        self._outgoing.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._outgoing):
            _by_rows(place).copy_(rows, non_blocking=True)
            self._stored.append(self._outgoing.record_event())
        rows.record_stream(self._outgoing)
        if len(self._stored) > 2:
            self._stored.popleft().synchronize()

    def settle(self) -> None:
        """Wait until all that was stored has arrived, so that the host may read any part of it."""
        if self.is_cuda:
            self._outgoing.synchronize()

    def deliver(self, plane: torch.Tensor) -> torch.Tensor:
        """A finished map: on the device, or on the host where the device has no room for it."""
        self.settle()
        return (plane.to(self.device) if self._has_room(plane) else plane).contiguous()

    def _has_room(self, plane: torch.Tensor) -> bool:
        if not self.is_cuda:
            return True
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused > (1 + COPIES_TO_COME) * plane.nbytes
