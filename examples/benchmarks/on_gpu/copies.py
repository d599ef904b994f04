"""Maps on the host: how much of their copies is hidden behind computing, and what host memory is really taken."""

from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from _common import Candidate, seconds
from largerespatch.core import hosts

from .lab import Lab, Row, Settings, stage, timed

# Model, stage, place of the size among the lab's, settings.
CASES: tuple[tuple[str, str, int, Settings], ...] = (
    ("sd15", "step", -2, {"unet_offload": True, "unet_serial": True, "unet_strip_rows": 64}),
    ("sd15", "decode", 1, {"vae_mode": "exact", "vae_offload": True}),
    ("sd15", "decode", 1, {"vae_offload": True}),
    ("sd15", "step", -2, {"unet_offload": "maps", "unet_serial": True, "unet_strip_rows": 64}),
    ("flux", "step", -2, {"unet_offload": "maps"}),
)
AHEAD = (1, 2, 3)  # pieces under way at once

Span = tuple[float, float]


def rows(lab: Lab) -> Iterator[Row]:
    for model, name, place, settings in CASES:
        row: Row = {"model": model, "stage": name, "size": lab.sizes[place], "settings": settings}
        if lab.clock.left() < 0 or lab.knows(**row):
            continue
        pipe, size = lab.pipeline(model), lab.sizes[place]
        kept = {key: value for key, value in settings.items() if not key.endswith("_offload")}
        with torch.no_grad():
            row["seconds_on_device"] = timed(lab, stage(pipe, name, size, kept))
            row["seconds_by_pieces_ahead"] = {}
            for ahead in AHEAD:
                with patch.object(hosts, "UNDER_WAY", ahead):
                    row["seconds_by_pieces_ahead"][ahead] = timed(lab, stage(pipe, name, size, settings))
            row |= pinned(lab, pipe, name, size, settings) | hidden(lab, pipe, name, size, settings)
        lab.clear()
        yield row


def pinned(lab: Lab, pipe: Any, name: str, size: int, settings: Settings) -> Row:
    """Bytes of all maps that were made on the host (more than lived at once, if some died), and those torch took."""
    original, asked = hosts.HostRows.empty, []

    def empty(*args: Any) -> Any:
        made = original(*args)
        asked.extend(band.numel() * band.element_size() for band in made.bands)
        return made

    with patch.object(hosts.HostRows, "empty", empty):
        seconds(stage(pipe, name, size, settings), lab.device)
    row: Row = {"host_bytes_asked": sum(asked)}
    if lab.cuda:
        stats = torch.cuda.host_memory_stats()
        row["host_bytes_taken"] = {key: value for key, value in stats.items() if "bytes" in key and "peak" in key}
    return row


def hidden(lab: Lab, pipe: Any, name: str, size: int, settings: Settings) -> Row:
    """The share of the time of copies during which kernels ran."""
    if not lab.cuda:
        return {"hidden": None}
    events = profiled(stage(pipe, name, size, settings))
    spans = {
        kind: union((each.time_range.start, each.time_range.end) for each in events if test(each.name))
        for kind, test in {
            "in": lambda text: "HtoD" in text,
            "out": lambda text: "DtoH" in text,
            "kernels": lambda text: "Memcpy" not in text and "Memset" not in text,
        }.items()
    }
    row: Row = {f"{kind}_seconds": length(each) / 1e6 for kind, each in spans.items()}
    row["hidden"] = {
        kind: length(overlap(spans[kind], spans["kernels"])) / max(length(spans[kind]), 1e-9) for kind in ("in", "out")
    }
    if spans["kernels"]:
        row["span_seconds"] = (spans["kernels"][-1][1] - spans["kernels"][0][0]) / 1e6
    return row


def profiled(candidate: Candidate) -> list[Any]:
    """What one run does on the device."""
    with candidate.context(), torch.no_grad(), profile(activities=[ProfilerActivity.CUDA]) as profiler:
        candidate.run()
        torch.cuda.synchronize()
    return [each for each in profiler.events() if str(each.device_type).endswith("CUDA")]


def union(spans: Iterator[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def overlap(first: Sequence[Span], second: Sequence[Span]) -> list[Span]:
    found, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            found.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(spans: Sequence[Span]) -> float:
    return sum(end - start for start, end in spans)
