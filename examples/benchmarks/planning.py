"""How long an estimate takes, and the planning of settings for a limit, on the real architectures without data.

A limit that nothing fits is refused; that says what would fit, and takes its time, too. Each pipeline is built anew for
each sample, but torch and the library are warm from another size, as they are when a pipeline has been loaded. CPU
seconds of one thread.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformer_step
from memory import MODELS, build_pipeline

from _common import add_common_options, environment, positive, print_table, write_json
from largerespatch import LargeResPatch

PLANNED = ["sd15", "sdxl", "flux", "qwen-image"]
LIMITS = ["2.5GiB", "4GiB", "6GiB", "8GiB", "12GiB", "16GiB", "24GiB", "28GiB", "48GiB"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", choices=(*MODELS, *transformer_step.MODELS), nargs="+", default=PLANNED, help="(%(default)s)"
    )
    parser.add_argument(
        "--sizes", type=positive, nargs="+", default=[4096, 8192, 16384], metavar="N", help="sides (%(default)s)"
    )
    parser.add_argument("--limits", nargs="+", default=LIMITS, help="(%(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="(%(default)s)")
    add_common_options(parser, "planning")
    return parser.parse_args()


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()  # so that the garbage of pipelines before is not searched meanwhile
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def build(model: str) -> Any:
    """In half precision, without data."""
    if model in MODELS:
        return build_pipeline(model, "meta", torch.float16)
    known = transformer_step.MODELS[model]
    return transformer_step.build_pipeline(known, known.blocks)


def plan(pipe: Any, size: int, limit: str) -> str:
    """What was planned, or why nothing was."""
    try:
        return repr(LargeResPatch(pipe, size, size, memory_limit=limit)).splitlines()[-1].strip()
    except ValueError as refused:
        return str(refused)


def measure(model: str, size: int, limits: list[str]) -> list[dict[str, Any]]:
    patch = LargeResPatch(build(model), size, size, memory_limit=None)
    works: dict[str, Callable[[], Any]] = {"first estimate": patch.estimate, "second estimate": patch.estimate}
    for limit in limits:
        pipe = build(model)
        works[f"plan for {limit}"] = lambda pipe=pipe, limit=limit: plan(pipe, size, limit)
    timed = {name: cpu_seconds(work) for name, work in works.items()}
    return [
        {"model": model, "size": size, "of": name, "seconds": took, "said": str(said)}
        for name, (took, said) in timed.items()
    ]


def outcome(said: str) -> str:
    """What came of a plan, in a word."""
    if "does not fit" in said or "needs" in said:
        return "refuses"
    if "must be more" in said:
        return "refuses for the weights alone"
    return "picks" if "memory_limit" in said else "tells"


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    samples: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for model in options.models:
            LargeResPatch(build(model), 1024, 1024).estimate()
            for size in options.sizes:
                for row in measure(model, size, options.limits):
                    samples.setdefault((row["model"], row["size"], row["of"]), []).append(row)
    rows = [
        rows[0]
        | {"seconds": [row["seconds"] for row in rows], "median": statistics.median(row["seconds"] for row in rows)}
        for rows in samples.values()
    ]
    report = {"question": __doc__.splitlines()[0], "environment": environment(), "note": options.note, "rows": rows}
    write_json(options.out, report)
    print_table(
        ("model", "image", "CPU seconds of", "median", "that"),
        [[row["model"], f"{row['size']}²", row["of"], f"{row['median']:.2f}", outcome(row["said"])] for row in rows],
    )
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
