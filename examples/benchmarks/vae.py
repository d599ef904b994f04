"""VAE decode and encode: what two passes and exact cost, against untiled and against diffusers' own tiling.

Time, arithmetic and memory of Stable Diffusion's VAE, at its real size and with random weights. Arithmetic and live
bytes are counted on torch's meta device, from the shapes of the real calls. `fidelity.py` says what they are worth.
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import AutoencoderKL

from _common import (
    FACTOR,
    Candidate,
    add_common_options,
    add_device_options,
    build_sized_vae,
    cost_on_paper,
    dtype_of,
    interleaved,
    mebibytes,
    own_tiling,
    positive,
    prepare,
    print_table,
    ratio_of_medians,
    run_vae,
    vae_pipeline,
    write_json,
)
from largerespatch import LargeResPatch

UNTILED, TWO_PASS, EXACT, DIFFUSERS = "untiled", "two-pass", "exact", "diffusers' tiling"
DIRECTIONS = ("decode", "encode")

Methods = dict[str, Callable[[], AbstractContextManager[Any]]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes",
        type=positive,
        nargs="+",
        default=[512, 1024],
        metavar="N",
        help="sides of square images in sample pixels (%(default)s)",
    )
    parser.add_argument("--vae-chunk", type=positive, default=32, metavar="N", help="in latent pixels (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="at most, for each size (%(default)s)")
    parser.add_argument(
        "--budget",
        type=float,
        default=60,
        metavar="SECONDS",
        help="no further round begins after this time (%(default)s)",
    )
    parser.add_argument(
        "--channels",
        type=positive,
        nargs=4,
        default=[128, 256, 512, 512],
        metavar="N",
        help="of the four levels of the VAE whose cost is measured (%(default)s, Stable Diffusion's)",
    )
    add_device_options(parser)
    add_common_options(parser, "vae")
    return parser.parse_args()


def build_vae(channels: list[int], device: str, dtype: torch.dtype) -> AutoencoderKL:
    """Stable Diffusion's architecture, of any width."""
    torch.manual_seed(0)
    with torch.device(device):
        vae = build_sized_vae(channels)
    if dtype != vae.dtype:
        vae.to(dtype)
    return vae.eval().requires_grad_(False)


def methods(vae: AutoencoderKL, size: int, chunk: int) -> Methods:
    """Contexts in which the VAE works in one of the four ways."""
    pipe = vae_pipeline(vae)

    def patch(mode: str) -> LargeResPatch:
        return LargeResPatch(pipe, size, size, vae_chunk_size_x=chunk, vae_chunk_size_y=chunk, vae_mode=mode)

    return {
        UNTILED: lambda: own_tiling(vae, None),
        TWO_PASS: lambda: patch("two-pass"),
        EXACT: lambda: patch("exact"),
        DIFFUSERS: lambda: own_tiling(vae, chunk),
    }


def source_shape(direction: str, size: int) -> tuple[int, int, int, int]:
    return (1, 4, size // FACTOR, size // FACTOR) if direction == "decode" else (1, 3, size, size)


def candidates(vae: AutoencoderKL, direction: str, size: int, chunk: int) -> dict[str, Candidate]:
    source = torch.randn(source_shape(direction, size), device=vae.device, dtype=vae.dtype)
    return {
        name: Candidate(lambda: run_vae(vae, direction, source), context)
        for name, context in methods(vae, size, chunk).items()
    }


def measure_cost(
    vae: AutoencoderKL, shadow: AutoencoderKL, direction: str, size: int, options: Any
) -> list[dict[str, Any]]:
    """A row for each method; `shadow` is the same VAE on ``meta``."""
    counted = candidates(shadow, direction, size, options.vae_chunk)
    timed = candidates(vae, direction, size, options.vae_chunk)
    if torch.device(options.device).type == "cuda":
        interleaved(timed, 1, options.device)  # kernels are chosen at the first sight of a shape
    samples = interleaved(timed, options.rounds, options.device, options.clock, options.budget)
    return [
        {
            "direction": direction,
            "size": size,
            "method": name,
            "seconds": samples[name],
            "median_seconds": statistics.median(samples[name]),
            "time_ratio": ratio_of_medians(samples[name], samples[UNTILED]),
            **describe_cost(counted[name]),
        }
        for name in counted
    ]


def describe_cost(candidate: Candidate) -> dict[str, int]:
    cost = cost_on_paper(candidate)
    return {"flops": cost.flops, "peak_live_bytes": cost.peak_live_bytes}


def print_cost(rows: list[dict[str, Any]]) -> None:
    print("Cost (Stable Diffusion's VAE, random weights; time ratio to untiled)")
    print_table(
        ("", "image", "method", "seconds", "rounds", "time ratio", "TFLOP", "peak live"),
        [
            [
                row["direction"],
                f"{row['size']}x{row['size']}",
                row["method"],
                f"{row['median_seconds']:.2f}",
                str(len(row["seconds"])),
                f"{row['time_ratio']:.2f}",
                f"{row['flops'] / 1e12:.2f}",
                mebibytes(row["peak_live_bytes"]),
            ]
            for row in rows
        ],
    )


def main() -> None:
    options = parse_arguments()
    report: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        "environment": prepare(options),
        "note": options.note,
        "options": {"vae_chunk": options.vae_chunk, "channels": options.channels},
        "cost": [],
    }
    dtype = dtype_of(options.device)
    vae = build_vae(options.channels, options.device, dtype)
    shadow = build_vae(options.channels, "meta", dtype)
    with torch.no_grad():
        run_vae(vae, "decode", run_vae(vae, "encode", torch.zeros(1, 3, 64, 64, device=options.device, dtype=dtype)))
        for size in options.sizes:
            for direction in DIRECTIONS:
                report["cost"] += measure_cost(vae, shadow, direction, size, options)
            write_json(options.out, report)  # after every size: the next one may take long
    print_cost(report["cost"])
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
