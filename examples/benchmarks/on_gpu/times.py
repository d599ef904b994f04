"""Seconds of a step, a decode, an encode: unpatched where it fits, patched, diffusers' tiling."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from _common import Candidate

from .lab import Lab, Row, Settings, called, flops, stage, timed

# Sides beyond which a way would not fit a card, or not the minutes.
STEPS: dict[str, tuple[Settings | None, int]] = {
    "unpatched": (None, 8192),
    "patched": ({}, 8192),
    "patched, unet_offload": ({"unet_offload": True, "unet_serial": True, "unet_strip_rows": 64}, 8192),
}
TRANSFORMER_STEPS: dict[str, tuple[Settings | None, int]] = {
    "unpatched": (None, 8192),
    "patched": ({}, 8192),
    "patched, unet_offload": ({"unet_offload": "maps"}, 8192),
}
PIECES: dict[str, tuple[Settings | None, int]] = {
    "untiled": (None, 4096),
    "diffusers' tiling": (None, 8192),
    "two-pass": ({}, 8192),
    "two-pass, blocked": ({"vae_attn": "blocked"}, 8192),
    "exact": ({"vae_mode": "exact"}, 8192),
    "exact, vae_offload": ({"vae_mode": "exact", "vae_offload": True}, 8192),
}
COMPARED = (
    ("sd15", "step", STEPS),
    ("sdxl", "step", STEPS),
    ("flux", "step", TRANSFORMER_STEPS),
    ("sd15", "decode", PIECES),
    ("sd15", "encode", {way: PIECES[way] for way in ("untiled", "diffusers' tiling", "two-pass", "exact")}),
)
GROWTH = 5.5  # in seconds, of the slowest way, from one size to its double


def rows(lab: Lab) -> Iterator[Row]:
    """Small sizes of all come before the large ones of any."""
    for size in lab.sizes:
        for model, name, ways in COMPARED:
            yield from compared(lab, model, name, size, ways)


def compared(lab: Lab, model: str, name: str, size: int, ways: dict[str, tuple[Settings | None, int]]) -> Iterator[Row]:
    """A row for each way that fits."""
    for way, (settings, largest) in ways.items():
        kind = (model, name, way)
        row: Row = {"model": model, "stage": name, "size": size, "way": way}
        if (size > largest and not lab.small) or lab.knows(**row) or not lab.clock.affords(kind, GROWTH):
            continue
        since = time.monotonic()
        try:
            row |= run(lab, model, name, size, way, settings)
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
        lab.clear()
        yield row
        lab.clock.took(kind, since)


def run(lab: Lab, model: str, name: str, size: int, way: str, settings: Settings | None) -> Row:
    pipe = lab.pipeline(model)
    candidate: Candidate = stage(pipe, name, size, settings)
    tiled = way == "diffusers' tiling"
    if tiled:
        pipe.vae.enable_tiling()
    try:
        with torch.no_grad(), called(pipe, name):
            samples = timed(lab, candidate)
    finally:
        pipe.vae.disable_tiling()
    row: dict[str, Any] = {"seconds": samples, "median": statistics.median(samples)}
    if not tiled:
        row["flops"] = flops(lab, model, name, size, settings)
        if row["flops"] is not None:
            row["tflops_per_second"] = row["flops"] / row["median"] / 1e12
    return row
