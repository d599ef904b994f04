"""How long an estimate takes, and the planning of settings for a limit, on the real architectures without data.

Each pipeline is built anew for each sample, but torch and the library are warm from another size, as they are when a
pipeline has been loaded. CPU seconds of one thread.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from memory import MODELS, build_pipeline

from _common import add_common_options, environment, positive, print_table, write_json
from largerespatch import LargeResPatch


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=["sd15", "sdxl"], help="(%(default)s)")
    parser.add_argument(
        "--sizes", type=positive, nargs="+", default=[4096, 8192, 16384], metavar="N", help="sides (%(default)s)"
    )
    parser.add_argument("--limits", nargs="+", default=["8GiB", "12GiB", "16GiB"], help="(%(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="(%(default)s)")
    add_common_options(parser, "planning")
    return parser.parse_args()


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def plan(pipe: Any, size: int, limit: str) -> str:
    """What was planned, or why nothing was."""
    try:
        return repr(LargeResPatch(pipe, size, size, memory_limit=limit)).splitlines()[-1].strip()
    except ValueError as refused:
        return str(refused)


def measure(model: str, size: int, limits: list[str]) -> list[dict[str, Any]]:
    patch = LargeResPatch(build_pipeline(model, "meta", torch.float16), size, size, memory_limit=None)
    works: dict[str, Callable[[], Any]] = {"first estimate": patch.estimate, "second estimate": patch.estimate}
    for limit in limits:
        pipe = build_pipeline(model, "meta", torch.float16)
        works[f"plan for {limit}"] = lambda pipe=pipe, limit=limit: plan(pipe, size, limit)
    timed = {name: cpu_seconds(work) for name, work in works.items()}
    return [
        {"model": model, "size": size, "of": name, "seconds": took, "said": str(said)}
        for name, (took, said) in timed.items()
    ]


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    samples: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for model in options.models:
            LargeResPatch(build_pipeline(model, "meta", torch.float16), 1024, 1024).estimate()
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
        ("model", "image", "CPU seconds of", "median"),
        [[row["model"], f"{row['size']}²", row["of"], f"{row['median']:.2f}"] for row in rows],
    )
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
