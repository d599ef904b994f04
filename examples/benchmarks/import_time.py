"""How long `import largerespatch` takes, against importing just what it needs of diffusers, in fresh processes."""

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

from _common import add_common_options, environment, positive, print_table, ratio_of_medians, write_json

STATEMENTS = {
    "largerespatch": "import largerespatch",
    "diffusers": (
        "from diffusers.models.attention import BasicTransformerBlock, FeedForward; "
        "from diffusers.models.attention_processor import Attention; "
        "from diffusers.models.downsampling import Downsample2D; "
        "from diffusers.models.resnet import ResnetBlock2D; "
        "from diffusers.models.upsampling import Upsample2D"
    ),
}
TIMED = """
import json, sys, time
wall, cpu = time.perf_counter(), time.process_time()
{statement}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps(dict(wall=wall, cpu=cpu, modules=len(sys.modules), transformers="transformers" in sys.modules)))
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=positive, default=7, help="(%(default)s)")
    add_common_options(parser, "import_time")
    return parser.parse_args()


def time_import(statement: str) -> dict[str, Any]:
    """Wall and CPU seconds of one statement in a process of its own, and what is loaded after it."""
    script = TIMED.format(statement=statement)
    finished = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(finished.stdout.splitlines()[-1])


def measure(rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Samples by name, in turns; each round in the opposite order of the one before."""
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in STATEMENTS}
    order = list(STATEMENTS)
    for _ in range(rounds):
        for name in order:
            samples[name].append(time_import(STATEMENTS[name]))
        order.reverse()
    return samples


def summarize(samples: list[dict[str, Any]]) -> dict[str, Any]:
    last = samples[-1]
    return {
        "median_wall_seconds": statistics.median(sample["wall"] for sample in samples),
        "median_cpu_seconds": statistics.median(sample["cpu"] for sample in samples),
        "modules": last["modules"],
        "transformers_loaded": last["transformers"],
    }


def main() -> None:
    options = parse_arguments()
    if options.rounds > 1:
        time_import(STATEMENTS["largerespatch"])  # the first import of all reads the files from the disk
    samples = measure(options.rounds)
    results = {
        name: summarize(samples[name]) | {"statement": STATEMENTS[name], "samples": samples[name]} for name in samples
    }
    ratios = {
        f"{clock}_ratio": ratio_of_medians(*([sample[clock] for sample in samples[name]] for name in STATEMENTS))
        for clock in ("wall", "cpu")
    }
    report = {
        "question": __doc__.splitlines()[0],
        "environment": environment(),
        "note": options.note,
        "rounds": options.rounds,
        **ratios,
        "results": results,
    }
    write_json(options.out, report)
    print_table(
        ("import of", "wall seconds", "CPU seconds", "modules", "transformers loaded"),
        [
            [
                name,
                f"{result['median_wall_seconds']:.2f}",
                f"{result['median_cpu_seconds']:.2f}",
                str(result["modules"]),
                "yes" if result["transformers_loaded"] else "no",
            ]
            for name, result in results.items()
        ],
    )
    print(f"ratio of medians: {ratios['wall_ratio']:.3f} wall, {ratios['cpu_ratio']:.3f} CPU")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
