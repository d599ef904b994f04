"""Rows of maps in the host's memory, and their way to a device and back.

On CUDA that memory is pinned and each direction has a stream of its own: while one strip is computed, the next one
comes and the last one goes. No more than two are under way, so the device never holds more. Elsewhere copies are made
where they are asked for. All of this is exact.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from .tilings import Run, Runs, Tile

BAND_BYTES = 2**24  # of one copy: long enough for the bus, small beside any map that is worth moving

# Pieces of a map that are on their way in each direction at once: one is computed, the next one comes.
UNDER_WAY = 2

# Of an image, so that what a pipeline does to it next still fits: it makes up to three copies.
COPIES_TO_COME = 3


def _by_rows(plane: torch.Tensor) -> torch.Tensor:
    """``[H, B, C, W]``, a view of ``[B, C, H, W]``, or back: a run of rows is then a single run of memory."""
    return plane.permute(2, 0, 1, 3)


def _by_samples(rows: torch.Tensor) -> torch.Tensor:
    return rows.permute(1, 2, 0, 3)


class Host:
    """The host of some devices. Tensors that lie on `where` stay there.

    Args:
        where: the host's own device.
        band_bytes: of the blocks of memory that rows of a map are kept in.
    """

    def __init__(self, where: str = "cpu", band_bytes: int = BAND_BYTES) -> None:
        self.where = torch.device(where)
        self.band_bytes = band_bytes
        self._streams: dict[torch.device, tuple[Any, Any]] = {}
        self._stored: deque[Any] = deque()

    def keeps(self, value: object) -> bool:
        """Whether `value` is a map that can leave its device; one that gradients pass through cannot."""
        return (
            isinstance(value, torch.Tensor)
            and value.ndim == 4
            and self.serves(value.device)
            and not value.requires_grad
        )

    def serves(self, device: torch.device) -> bool:
        return device != self.where

    def cuts(self, plane: torch.Tensor) -> Runs:
        """The runs of rows in which a map travels."""
        height = plane.shape[2]
        rows = max(self.band_bytes * height // max(plane.numel() * plane.element_size(), 1), 1)
        return Runs(height, rows)

    def fetch(self, rows: "HostRows", runs: Sequence[Run]) -> Iterator[torch.Tensor]:
        """Runs of rows on the device, in turn. Later ones may not be stored to before they have been yielded."""
        streams = self._of(rows.device)
        if streams is None:
            width = rows.bands[0].shape[-1]
            yield from (rows.gather(Tile(top, 0, bottom, width)).to(rows.device).contiguous() for top, bottom in runs)
            return
        incoming, outgoing = streams
        compute = torch.cuda.current_stream(rows.device)
        incoming.wait_stream(outgoing)  # what was stored before can be read
        used: deque[Any] = deque()
        for top, bottom in runs:
            with torch.cuda.stream(incoming):
                block = torch.empty(bottom - top, *rows.bands[0].shape[1:], dtype=rows.dtype, device=rows.device)
                for start, part in rows.parts(top, bottom):
                    block[start : start + len(part)].copy_(part, non_blocking=True)
            compute.wait_stream(incoming)
            block.record_stream(compute)
            yield _by_samples(block).contiguous()
            used.append(compute.record_event())
            if len(used) >= UNDER_WAY:
                used.popleft().synchronize()

    def store(self, rows: "HostRows", top: int, values: torch.Tensor) -> None:
        """`values` ``[B, C, h, W]`` into the rows from `top` on."""
        streams = self._of(values.device)
        source = _by_rows(values)
        if streams is None:
            for start, part in rows.parts(top, top + len(source)):
                part.copy_(source[start : start + len(part)])
            return
        source = source.contiguous()
        _, outgoing = streams
        outgoing.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(outgoing):
            for start, part in rows.parts(top, top + len(source)):
                part.copy_(source[start : start + len(part)], non_blocking=True)
            self._stored.append(outgoing.record_event())
        source.record_stream(outgoing)
        if len(self._stored) > UNDER_WAY:
            self._stored.popleft().synchronize()

    def settle(self, device: torch.device) -> None:
        """Wait until all that was stored from `device` has arrived, so that the host may read any part of it."""
        streams = self._of(device)
        if streams is not None:
            streams[1].synchronize()

    def has_room(self, device: torch.device, size: int) -> bool:
        """Whether `device` can take a finished image of so many bytes, and what a pipeline makes of it next."""
        if self._of(device) is None:
            return True
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return bool(torch.cuda.mem_get_info(device)[0] + unused > (1 + COPIES_TO_COME) * size)

    def pins(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def _of(self, device: torch.device) -> tuple[Any, Any] | None:
        """The streams in and out, where the device has any."""
        if not self.pins(device):
            return None
        if device not in self._streams:
            pair = (torch.cuda.Stream(device), torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
            self._streams[device] = pair
        return self._streams[device]


class HostRows:
    """Memory of the host for a map ``[B, C, H, W]``, row after row, in bands; read from `device`.

    In bands, since memory is pinned in powers of two: of one large block up to half might be wasted.
    """

    def __init__(self, host: Host, device: torch.device, edges: Sequence[int], bands: Sequence[torch.Tensor]) -> None:
        self.host = host
        self.device = device
        self.edges = edges  # rows where bands begin, and the height
        self.bands = bands  # [h, B, C, W]

    @classmethod
    def empty(cls, host: Host, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> "HostRows":
        batch, channels, height, width = shape
        pinned = host.pins(device)
        rows = max(host.band_bytes // max(batch * channels * width * dtype.itemsize, 1), 1) if pinned else height
        edges = [*range(0, height, rows), height]
        made = [
            torch.empty(bottom - top, batch, channels, width, dtype=dtype, device=host.where, pin_memory=pinned)
            for top, bottom in pairwise(edges)
        ]
        return cls(host, device, edges, made)

    @property
    def dtype(self) -> torch.dtype:
        return self.bands[0].dtype

    def parts(self, top: int, bottom: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Views ``[h, B, C, W]`` of the bands that rows `top` to `bottom` lie in, each with its distance from `top`."""
        for (first, last), band in zip(pairwise(self.edges), self.bands, strict=True):
            if first < bottom and top < last:
                start = max(top, first)
                yield start - top, band[start - first : min(bottom, last) - first]

    def gather(self, tile: Tile) -> torch.Tensor:
        """A part of the map on the host, ``[B, C, h, w]``; the host waits for what is still to arrive."""
        self.host.settle(self.device)
        parts = [part[..., tile.columns] for _, part in self.parts(tile.top, tile.bottom)]
        if not parts:
            return _by_samples(self.bands[0][:0, ..., tile.columns])
        return _by_samples(parts[0] if len(parts) == 1 else torch.cat(parts))

    def scatter(self, tile: Tile, values: torch.Tensor) -> None:
        """The inverse; the host waits for the values, too."""
        self.host.settle(self.device)
        source = _by_rows(values)
        for start, part in self.parts(tile.top, tile.bottom):
            part[..., tile.columns] = source[start : start + len(part)]

    def samples(self, which: slice) -> "HostRows":
        """The rows of some samples alone, in the same memory."""
        return HostRows(self.host, self.device, self.edges, [band[:, which] for band in self.bands])
