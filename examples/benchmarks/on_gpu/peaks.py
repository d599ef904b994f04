"""Bytes that CUDA's allocator says, against the estimate; under a limit that the process cannot pass."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any

import torch

from largerespatch import LargeResPatch
from largerespatch.memory.estimate import STAGES
from largerespatch.options import Options

from .lab import GIB, Lab, Row, called, stage

# Model, side, GiB allowed (None: all there are): what says most comes first.
CASES: tuple[tuple[str, int, int | None], ...] = (
    *(("sd15", size, None) for size in (1024, 2048, 4096)),
    ("sd15", 4096, 8),
    *(("sdxl", size, None) for size in (1024, 2048, 4096)),
    ("sdxl", 4096, 8),
    *(("flux", size, None) for size in (1024, 2048)),
    ("sd15", 16384, 24),
    ("sd15", 8192, 8),
    ("sdxl", 8192, 12),
    ("sdxl", 8192, 24),
    ("sd15", 16384, 8),
    ("sdxl", 16384, 12),
    ("sd15", 8192, None),
    *((model, size, limit) for model in ("sd15", "sdxl") for size in (1024, 2048, 4096) for limit in (8, 12, 24)),
    ("sd15", 8192, 12),
    ("sd15", 8192, 24),
    ("sdxl", 8192, None),
    ("flux", 8192, 8),
)
SMALL_CASES = (("sd15", 128, None), ("sd15", 256, 8), ("flux", 128, None))
DEFAULTS = Options()
GROWTH = 4.5  # in seconds, from one size to its double
LARGEST = 8192  # beyond which full attention of the VAE would take minutes


def rows(lab: Lab) -> Iterator[Row]:
    for model, size, limit in SMALL_CASES if lab.small else CASES:
        fits = lab.clock.affords((model, size // 2), GROWTH) and lab.clock.affords((model, size), 1.2)
        if fits and not lab.knows(model=model, size=size, limit=limit):
            since = time.monotonic()
            yield measure(lab, model, size, limit)
            lab.clock.took((model, size), since)


def plan(lab: Lab, model: str, size: int, limit: int | None) -> dict[str, Any]:
    """The settings that are picked for a limit and the estimate of each stage, as for an accelerator."""

    def make() -> dict[str, Any]:
        patch = LargeResPatch(lab.on_paper(model), size, size, memory_limit=None if limit is None else limit * GIB)
        picked = {each.name: getattr(patch.options, each.name) for each in fields(Options)}
        settings = {
            name: value for name, value in picked.items() if value != getattr(DEFAULTS, name) and name != "memory_limit"
        }
        return {"settings": settings} | asdict(patch.estimate())

    return dict(lab.paper.get(f"plan {model} {size} {limit}", make))


def measure(lab: Lab, model: str, size: int, limit: int | None) -> Row:
    """One row: each stage's bytes allocated and reserved at most, and how the estimate compares."""
    planned = plan(lab, model, size, limit)
    pipe = lab.pipeline(model)
    row: Row = {"model": model, "size": size, "limit": limit, "settings": planned["settings"]}
    with capped(lab, limit), LargeResPatch(pipe, size, size, memory_limit=None, **planned["settings"]):
        for name in STAGES:
            if name == "encode" and limit is not None and not planned["encodes"]:
                continue  # nothing was planned for it
            if name != "step" and size > LARGEST:
                continue
            row[name] = measure_stage(lab, pipe, name, size) | {"estimated": planned["weights"] + planned[name]}
            if row[name]["allocated"]:
                row[name]["ratio"] = row[name]["estimated"] / row[name]["allocated"]
    return row


def measure_stage(lab: Lab, pipe: Any, name: str, size: int) -> Row:
    """Weights included; what did not fit is None, and says so."""
    run, found = stage(pipe, name, size, None).run, {"allocated": None, "reserved": None, "seconds": None}
    lab.clear()
    try:
        with torch.no_grad(), called(pipe, name):
            if lab.cuda:
                found["before"] = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            since = time.monotonic()
            run()
            lab.synchronize()
            found["seconds"] = time.monotonic() - since
        if lab.cuda:
            found["allocated"], found["reserved"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    except torch.OutOfMemoryError as error:
        found["failed"] = str(error).partition(". GPU")[0]
    return found


@contextmanager
def capped(lab: Lab, limit: int | None) -> Iterator[None]:
    """Inside, the allocator gives no more than `limit` GiB in all."""
    if limit is None or not lab.cuda:
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(limit * GIB / torch.cuda.get_device_properties(0).total_memory, 1.0))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
