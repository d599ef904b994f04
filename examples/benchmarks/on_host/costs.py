"""What maps and pictures on the host cost: bytes on their way to a device and back, and the host's memory."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import run
from typing import Any
from unittest.mock import patch

import torch

from largerespatch import LargeResPatch
from largerespatch.core.hosts import Host, HostRows
from largerespatch.memory.counting import KernelsInOne
from largerespatch.memory.estimate import Estimator, play
from largerespatch.memory.shadow import ACCELERATOR
from largerespatch.memory.weightless import WithoutData
from largerespatch.options import Options

GIB = 2**30

# GiB on the device that large images should not need more than with every saver: model, side, whose VAE is exact, GiB.
GOALS = (
    ("sd15", 8192, (False,), 3.2),
    ("sd15", 16384, (False,), 4.3),
    ("sdxl", 8192, (True,), 8.0),
    ("sdxl", 16384, (False, True), 9.0),
)


def goals(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What large images need, next to what they should."""
    peaks = {(row["model"], row["size"], row["way"]): row["peak"] for row in rows}
    for model, size, exact, most in GOALS:
        for each in exact:
            way = "every saver, exact VAE" if each else "every saver"
            if peak := peaks.get((model, size, way)):
                yield {
                    "model": model,
                    "size": size,
                    "way": way,
                    "peak": peak,
                    "most": most * GIB,
                    "met": peak <= most * GIB,
                }
    small, large = (peaks.get(("sd15", size, "every saver")) for size in (4096, 16384))
    if small and large:
        yield {"model": "sd15", "size": 16384, "way": "over 4096", "ratio": large / small, "met": large <= 1.8 * small}


# --- the way between host and device ------------------------------------------------------------------------------

TRAVEL = {"unet_serial": True, "unet_strip_rows": 16, "ff_chunk_size": 4096}
BUS, ARITHMETIC = 25e9, 100e12  # bytes and operations a second, by which counts become seconds


def travel(pipe: Any, size: int, flops: float) -> Iterator[dict[str, Any]]:
    """Bytes that a step brings to the device and back, next to its arithmetic; every piece is visited.

    `pipe` has models on ``meta``.
    """
    for way in ("skips", "maps"):
        estimator = Estimator(pipe, [], LargeResPatch(pipe, size, size)._on)
        options, shadow, moved = Options(**TRAVEL, unet_offload=way), estimator.shadow, Counter[str]()
        models = list(shadow.models.values())
        patched = estimator.patched(shadow.calling("step"), options)
        with moving(moved), patched, torch.no_grad(), WithoutData(ACCELERATOR), KernelsInOne():
            play("step", models, shadow.pipe, size, size)
        row = {"size": size, "way": way, "to the device": moved["in"], "to the host": moved["out"]}
        yield row | {"seconds": max(moved["in"], moved["out"]) / BUS, "arithmetic seconds": flops / ARITHMETIC}


@contextmanager
def moving(moved: Counter[str]) -> Iterator[None]:
    """Counts the bytes of what comes from the host and of what goes there."""
    gather, store = HostRows.gather, Host.store

    def gathered(rows: HostRows, tile: Any) -> torch.Tensor:
        found = gather(rows, tile)
        moved["in"] += found.numel() * found.element_size()
        return found

    def stored(host: Host, rows: HostRows, tile: Any, values: torch.Tensor) -> None:
        moved["out"] += values.numel() * values.element_size()
        store(host, rows, tile, values)

    with patch.object(HostRows, "gather", gathered), patch.object(Host, "store", stored):
        yield


# --- the picture --------------------------------------------------------------------------------------------------


def picture(size: int) -> Iterator[dict[str, Any]]:
    """What the host holds at most for a picture, in a process of its own, beside what it held before it was there.

    As a decoder leaves it on the host, in half precision, and turned to an image by the pipeline, or written by
    `LargeResPatch.decode`, to which it comes in strips. On Linux alone.
    """
    done = run([sys.executable, "-c", PICTURE, str(size)], capture_output=True, text=True, check=True)
    for way, most in zip(("pipeline", "decode"), done.stdout.split(), strict=True):
        yield {"size": size, "way": way, "bytes": int(most)}


PICTURE = r"""
import re, sys, torch
from pathlib import Path
from diffusers.image_processor import VaeImageProcessor
from largerespatch.core.tilings import Tile
from largerespatch.techniques.vae.images import wanted, writing

def kib(name):
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

def by_pipeline(size):
    decoded = torch.zeros(1, 3, size, size, dtype=torch.half)
    return VaeImageProcessor().postprocess(decoded, output_type="pil")

def by_decode(size):
    with writing(size, size) as image:
        made = wanted(torch.zeros(1, dtype=torch.half), (1, 3, size, size))
        for top in range(0, size, 16):
            tile = Tile(top, 0, min(top + 16, size), size)
            made.write(tile, torch.zeros(1, 3, *tile.size(), dtype=torch.half))
    return image

for make in (by_pipeline, by_decode):
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten
    before = kib("VmRSS")
    make(int(sys.argv[1]))
    print(1024 * (kib("VmHWM") - before))
"""
