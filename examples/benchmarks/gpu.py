"""Proof on a GPU, in minutes: peaks against estimates, seconds, kernels, copies, small frictions, the CUDA-only tests.

Real architectures with random weights, which change neither time nor memory. The parts share the minutes; in each, what
says most comes first, and a row that would not fit is left out. JSON is written after every row. Figures that need no
GPU (plans, estimates, arithmetic) can be made beforehand with ``--paper-only`` and are read from ``--paper``.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from on_gpu import copies, frictions, kernels, peaks, times
from on_gpu.lab import Clock, Lab, Paper, Row, attempts, flops

from _common import add_common_options, environment, write_json

ROOT = Path(__file__).parents[2]


def cuda_tests(lab: Lab) -> Iterator[Row]:
    """``pytest -m gpu``, in a process of its own; files without the mark may need packages that are not there."""
    files = [each for each in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in each.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-n0", "-ra", "-W", "default", *map(str, files)]
    with TemporaryFile("w+", encoding="utf-8") as told:
        running = subprocess.Popen(command, cwd=ROOT, stdout=told, stderr=subprocess.STDOUT)
        try:
            status: int | str = running.wait(timeout=max(lab.clock.left(), 60))
        except subprocess.TimeoutExpired:  # what has passed until then has
            running.kill()
            running.wait()
            status = "no minutes left"
        told.seek(0)
        lines = told.read().replace(f"{ROOT}/", "").splitlines()
    yield {"status": status, "passed": sum(" PASSED" in line for line in lines), "output": lines[-60:]}


# Each with its share of what is left when its turn comes.
PARTS: dict[str, tuple[Callable[[Lab], Iterator[Row]], float]] = {
    "tests": (cuda_tests, 0.3),
    "frictions": (frictions.rows, 0.25),
    "copies": (copies.rows, 0.15),
    "times": (times.rows, 0.5),
    "kernels": (kernels.rows, 0.2),
    "peaks": (peaks.rows, 0.8),
    "compiled": (frictions.compiled, 1.0),
}
GO_ON = ("copies", "times", "peaks")  # whose rows are long, and each a case of its own


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, metavar="N", help="for all parts (%(default)s)")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="the rows of others are kept (%(default)s)"
    )
    parser.add_argument("--go-on", action="store_true", help="keep rows of earlier runs, add those that lack")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--small", action="store_true", help="toy models and sizes, to try the script on a CPU")
    parser.add_argument("--paper", type=Path, help="the file for figures that need no GPU")
    parser.add_argument("--paper-only", action="store_true", help="make that file, and nothing else")
    add_common_options(parser, "gpu")
    options = parser.parse_args()
    if options.paper_only and options.paper is None:
        parser.error("--paper-only needs --paper FILE")
    if torch.device(options.device).type == "cpu" and not (options.small or options.paper_only):
        parser.error("without a GPU only --small and --paper-only make sense")
    return options


def make_paper(lab: Lab) -> None:
    """All figures that parts will ask for."""
    for case in peaks.SMALL_CASES if lab.small else peaks.CASES:
        print(case, peaks.plan(lab, *case))
    for model, name, ways in times.COMPARED:
        for way, (settings, largest) in ways.items():
            for size in lab.sizes:
                if size <= largest and way != "diffusers' tiling":
                    print(model, name, size, way, flops(lab, model, name, size, settings))


def main() -> None:
    options = parse_arguments()
    lab = Lab(
        options.device,
        options.small,
        Paper(options.paper, closed=options.paper is not None and not options.paper_only),
        Clock(60 * options.minutes),
    )
    if options.paper_only:
        lab.device = "cuda"  # figures are those of a GPU
        make_paper(lab)
        return
    whole = lab.clock
    report: dict[str, Any] = {"question": __doc__.splitlines()[0], "note": options.note, "parts": {}}
    if options.out.exists():
        report["parts"] = json.loads(options.out.read_text(encoding="utf-8"))["parts"]
    parts = [name for name in PARTS if name in options.parts]
    for name in parts:
        rows, share = PARTS[name]
        found = kept_rows(report["parts"].get(name)) if options.go_on and name in GO_ON else []
        lab.kept = list(found)
        part = {"environment": environment(options.device), "rows": found}
        report["parts"][name] = part
        lab.clock = whole.until(1.0 if name == parts[-1] else share)
        for row in attempts(rows(lab)):
            found.append(row)
            write_json(options.out, report)
        lab.clear()
    print_rows(report["parts"])
    print(f"written to {options.out}")


def kept_rows(part: Any) -> list[Row]:
    """The rows of an earlier run, each with its day and device."""
    if part is None:
        return []
    run = {key: part["environment"][key] for key in ("date", "device_name")}
    return [run | row for row in part["rows"] if "error" not in row]


def print_rows(parts: dict[str, Any]) -> None:
    for name, part in parts.items():
        print(f"\n{name}")
        for row in part["rows"]:
            print("  " + ", ".join(f"{key}: {brief(value)}" for key, value in row.items()))


def brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {brief(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return (
            "[" + " ".join(map(brief, value)) + "]"
            if not value or not isinstance(value[0], str)
            else "\n    ".join(value)
        )
    return str(value)


if __name__ == "__main__":
    main()
