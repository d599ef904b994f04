"""Cells of maps in the host's memory, and their way to a device and back.

On CUDA that memory is pinned and each direction has a stream of its own: while one strip is computed, the next one
comes and the last one goes. No more than two are under way, so the device never holds more. Elsewhere copies are made
where they are asked for. All of this is exact.

A row lies cell after cell, each with all its channels: a part of it is one run of memory, whoever asks for it, a strip
or a tile.
"""

from bisect import bisect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from math import prod
from typing import Any

import torch

from .tilings import Runs, Tile

BAND_BYTES = 2**24  # of one copy: long enough for the bus, small beside any map that is worth moving

# Of a map that is large: in bands. What visits the device holds about as much at its largest (four runs under way, or a
# strip, what is made of it and the workspace of its convolution), so a smaller map adds little to that; and of those
# that a U-Net keeps, its coarsest skip connections, there are few: half a dozen below this size, whatever the image's.
LARGE_BANDS = 4

# So of a denoiser's maps those of as many bytes leave the device.
LEAST_BYTES = LARGE_BANDS * BAND_BYTES

# Pieces of a map that are on their way in each direction at once: one is computed, the next one comes.
UNDER_WAY = 2


def _by_cells(plane: torch.Tensor) -> torch.Tensor:
    """``[H, B, W, C]``, a view of ``[B, C, H, W]``: how a map lies on the host."""
    return plane.permute(2, 0, 3, 1)


def by_samples(cells: torch.Tensor) -> torch.Tensor:
    """The inverse."""
    return cells.permute(1, 3, 0, 2)


class Host:
    """The host of some devices. Tensors that lie on `where` stay there.

    Args:
        where: the host's own device.
        band_bytes: of the blocks of memory that rows of a map are kept in.
        least: of the bytes of a map that leaves its device; smaller ones stay there.
    """

    def __init__(self, where: str = "cpu", band_bytes: int = BAND_BYTES, least: int = 0) -> None:
        self.where = torch.device(where)
        self.band_bytes = band_bytes
        self.least = least
        self._streams: dict[torch.device, tuple[Any, Any]] = {}
        self._stored: deque[Any] = deque()

    def keeps(self, value: object) -> bool:
        """Whether `value` is a map that can leave its device; one that gradients pass through cannot."""
        return (
            isinstance(value, torch.Tensor)
            and value.ndim == 4
            and self.takes(value, value.shape)
            and not value.requires_grad
        )

    def takes(self, like: torch.Tensor, shape: Sequence[int]) -> bool:
        """Whether a map of that shape, as `like` is, leaves its device."""
        return self.serves(like.device) and prod(shape) * like.element_size() >= self.least

    def serves(self, device: torch.device) -> bool:
        return device != self.where

    def is_large(self, like: torch.Tensor, shape: Sequence[int] | None = None) -> bool:
        """Whether a map, or one of that `shape`, should not be on its device as a whole, if that can be helped."""
        cells = like.numel() if shape is None else prod(shape)
        return cells * like.element_size() >= LARGE_BANDS * self.band_bytes

    def cuts(self, plane: torch.Tensor) -> Runs:
        """The runs of rows in which a map travels."""
        height = plane.shape[2]
        rows = max(self.band_bytes * height // max(plane.numel() * plane.element_size(), 1), 1)
        return Runs(height, rows)

    def fetch(
        self, rows: "HostRows", tiles: Iterable[Tile], made: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """What is `made` of the cells ``[h, B, w, C]`` of tiles on the device, in turn.

        Later ones may not be stored to before they have been yielded.
        """
        streams = self._of(rows.device)
        if streams is None:
            yield from (made(_by_cells(rows.gather(tile)).to(rows.device)) for tile in tiles)
            return
        incoming, outgoing = streams
        compute = torch.cuda.current_stream(rows.device)
        incoming.wait_stream(outgoing)  # what was stored before can be read
        used: deque[Any] = deque()
        for tile in tiles:
            yield made(self._arrived(rows, tile, incoming, compute))
            used.append(compute.record_event())
            if len(used) >= UNDER_WAY:
                used.popleft().synchronize()

    def _arrived(self, rows: "HostRows", tile: Tile, incoming: Any, compute: Any) -> torch.Tensor:
        with torch.cuda.stream(incoming):
            batch, channels = rows.bands[0].shape[1], rows.bands[0].shape[3]
            block = torch.empty(tile.height, batch, tile.width, channels, dtype=rows.dtype, device=rows.device)
            for target, part in rows.copies(tile, block):
                target.copy_(part, non_blocking=True)
        compute.wait_stream(incoming)
        block.record_stream(compute)
        return block

    def store(self, rows: "HostRows", tile: Tile, values: torch.Tensor) -> None:
        """`values` ``[B, C, h, w]`` into a tile."""
        streams = self._of(values.device)
        source = _by_cells(values)
        if streams is None:
            for place, part in rows.parts(tile.top, tile.bottom):
                part[:, :, tile.columns] = source[place : place + len(part)]
            return
        source = source.contiguous()
        _, outgoing = streams
        outgoing.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(outgoing):
            for part, target in rows.copies(tile, source):
                target.copy_(part, non_blocking=True)
            self._stored.append(outgoing.record_event())
        source.record_stream(outgoing)
        if len(self._stored) > UNDER_WAY:
            self._stored.popleft().synchronize()

    def settle(self, device: torch.device) -> None:
        """Wait until all that was stored from `device` has arrived, so that the host may read any part of it."""
        streams = self._of(device)
        if streams is not None:
            streams[1].synchronize()

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
        self.bands = bands  # [h, B, W, C]

    @classmethod
    def empty(cls, host: Host, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> "HostRows":
        batch, channels, height, width = shape
        pinned = host.pins(device)
        rows = max(host.band_bytes // max(batch * channels * width * dtype.itemsize, 1), 1) if pinned else height
        edges = [*range(0, height, rows), height]
        made = [
            torch.empty(bottom - top, batch, width, channels, dtype=dtype, device=host.where, pin_memory=pinned)
            for top, bottom in pairwise(edges)
        ]
        return cls(host, device, edges, made)

    @property
    def dtype(self) -> torch.dtype:
        return self.bands[0].dtype

    def parts(self, top: int, bottom: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Views ``[h, B, W, C]`` of the bands that rows `top` to `bottom` lie in, each with its distance from `top`."""
        for band in range(max(bisect(self.edges, top) - 1, 0), len(self.bands)):
            first, last = self.edges[band], self.edges[band + 1]
            if bottom <= first:
                return
            if top < last:
                start = max(top, first)
                yield start - top, self.bands[band][start - first : min(bottom, last) - first]

    def copies(self, tile: Tile, block: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Parts of `block`, a tile's cells, and of this memory: pairs that are single runs of memory both."""
        for place, part in self.parts(tile.top, tile.bottom):
            own, part = block[place : place + len(part)], part[:, :, tile.columns]
            if own.is_contiguous() and part.is_contiguous():
                yield own, part
            else:
                yield from chain.from_iterable(map(zip, own, part))

    def gather(self, tile: Tile) -> torch.Tensor:
        """A part of the map on the host, ``[B, C, h, w]``; the host waits for what is still to arrive."""
        self.host.settle(self.device)
        parts = [part[:, :, tile.columns] for _, part in self.parts(tile.top, tile.bottom)]
        if not parts:
            return by_samples(self.bands[0][:0, :, tile.columns])
        return by_samples(parts[0] if len(parts) == 1 else torch.cat(parts))

    def pick(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Single cells on the host, ``[B, S, C]``, of places ``[B, S]``; it waits for what is still to arrive."""
        self.host.settle(self.device)
        samples = torch.arange(len(rows), device=rows.device)[:, None].expand(rows.shape)
        if len(self.bands) == 1:
            return self.bands[0][rows, samples, columns]
        picked = torch.empty(*rows.shape, self.bands[0].shape[3], dtype=self.dtype)
        bands = torch.bucketize(rows, torch.tensor(self.edges[1:-1]), right=True)
        for i in set(bands.flatten().tolist()):
            here = bands == i
            picked[here] = self.bands[i][rows[here] - self.edges[i], samples[here], columns[here]]
        return picked

    def samples(self, which: slice) -> "HostRows":
        """The rows of some samples alone, in the same memory."""
        return HostRows(self.host, self.device, self.edges, [band[:, which] for band in self.bands])
