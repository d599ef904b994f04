"""The tables of the README, in Markdown, from the JSON files that the other benchmarks have written."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MODEL_NAMES = {"sd15": "SD 1.5", "sdxl": "SDXL"}
GIB, TERA = 2**30, 1e12


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def where(report: Any, rounds: int) -> str:
    """How it was measured, as a line below a table."""
    at = report["environment"]
    clock = "CPU seconds of one thread" if at["clock"] == "cpu" else f"wall seconds, {at['torch_threads']} threads"
    return (
        f"{at['device_name']}, {at['cpu_cores']} cores, {at['dtype']}; {clock}, median of {rounds}; "
        f"torch {at['torch']}, diffusers {at['diffusers']}, {at['date'][:10]}."
    )


def unet_table() -> str:
    report = load("unet_step")
    headings = ("image", "seconds unpatched", "patched", "ratio", "of arithmetic", "live GiB unpatched", "patched")
    rows = []
    for result in report["results"]:
        seconds, cost = result["median_seconds"], result["cost"]
        rows.append(
            [
                f"{result['size']}²",
                *(f"{seconds[name]:.0f}" for name in ("unpatched", "patched")),
                f"{result['time_ratio']:.2f}",
                f"{result['arithmetic_ratio']:.2f}",
                *(f"{cost[name]['peak_live_bytes'] / GIB:.2f}" for name in ("unpatched", "patched")),
            ]
        )
    return f"{markdown(headings, rows)}\n\n{where(report, len(report['results'][0]['seconds']['patched']))}"


def vae_table() -> str:
    report = load("vae")
    headings = ("", "image", "method", "seconds", "to untiled", "live GiB")
    rows = [
        [
            cost["direction"],
            f"{cost['size']}²",
            cost["method"],
            f"{cost['median_seconds']:.1f}",
            f"{cost['time_ratio']:.2f}",
            f"{cost['peak_live_bytes'] / GIB:.2f}",
        ]
        for cost in report["cost"]
    ]
    return f"{markdown(headings, rows)}\n\n{where(report, len(report['cost'][0]['seconds']))}"


def vae_fidelity_table() -> str:
    """A row for each direction and method, over all photographs."""
    report = load("fidelity")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report["vae"]:
        groups.setdefault((row["direction"], row["method"]), []).append(row)
    headings = ("", "method", "PSNR to untiled", "worst", "max. error", "at seams")
    return markdown(headings, [[*names, *fidelity(rows)] for names, rows in groups.items()])


def fidelity(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Mean and least PSNR, largest error, and how much larger the mean error is next to seams than elsewhere."""
    decibels = [row["psnr"] for row in rows]
    largest = max(row["maximum_error"] for row in rows)
    seam, elsewhere = (statistics.fmean(row[key] for row in rows) for key in ("seam_error", "error_elsewhere"))
    return [
        f"{statistics.fmean(decibels):.0f} dB",
        f"{min(decibels):.0f} dB",
        f"{largest:.3%}",
        f"{seam / elsewhere:.1f} x elsewhere",
    ]


def memory_table() -> str:
    """Simulated peaks of whole pipelines: a row for each model and size, a column for each way."""
    report = load("memory")
    peaks: dict[tuple[str, int], dict[str, float]] = {}
    for row in report["rows"]:
        if row["kind"] == "simulated":
            peaks.setdefault((row["model"], row["size"]), {})[row["way"]] = row["peak"] / GIB
    ways = list(dict.fromkeys(way for each in peaks.values() for way in each))
    rows = [
        [MODEL_NAMES[model], f"{size}²", *(f"{each[way]:.1f}" if way in each else "" for way in ways)]
        for (model, size), each in peaks.items()
    ]
    return markdown(("GiB, simulated", "image", *ways), rows)


if __name__ == "__main__":
    print(vae_fidelity_table(), unet_table(), vae_table(), memory_table(), sep="\n\n")
