"""VAE decode and encode: two passes and exact, against untiled and against diffusers' own tiling.

Cost: time, arithmetic and memory of Stable Diffusion's VAE, at its real size and with random weights. Arithmetic and
live bytes are counted on torch's meta device, from the shapes of the real calls.

Fidelity: how far each tiled result is from the untiled one, overall and next to the lines where tiles meet. That means
something on a trained VAE and on photographs only: --model names one, and scikit-image brings some.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageOps

from _common import (
    Candidate,
    add_common_options,
    add_device_options,
    cost_on_paper,
    dtype_of,
    interleaved,
    maximum_error,
    mebibytes,
    positive,
    prepare,
    print_table,
    psnr,
    ratio_of_medians,
    seam_error,
    write_json,
)
from largerespatch import LargeResPatch
from largerespatch.tilings import tiles

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
FACTOR = 8  # sample pixels along each axis of a latent pixel
OVERLAP = 0.25  # of a tile, in diffusers' own tiling
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
    parser.add_argument(
        "--model",
        type=Path,
        default=DEMO_MODEL if (DEMO_MODEL / "model_index.json").exists() else None,
        metavar="FOLDER",
        help="a pipeline in diffusers' format with a trained VAE; without one, fidelity is left out (%(default)s)",
    )
    parser.add_argument(
        "--pictures", type=positive, default=len(PHOTOGRAPHS), metavar="N", help="at most, for fidelity (%(default)s)"
    )
    add_device_options(parser)
    add_common_options(parser, "vae")
    return parser.parse_args()


def build_vae(channels: list[int], device: str, dtype: torch.dtype) -> AutoencoderKL:
    """Stable Diffusion's architecture, of any width."""
    torch.manual_seed(0)
    with torch.device(device):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=channels,
            layers_per_block=2,
            norm_num_groups=min(32, channels[0] // 2),
            sample_size=512,
        )
    if dtype != vae.dtype:
        vae.to(dtype)
    return vae.eval().requires_grad_(False)


def methods(vae: AutoencoderKL, size: int, chunk: int) -> Methods:
    """Contexts in which the VAE works in one of the four ways."""
    others = dict.fromkeys(("unet", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(**others, vae=vae, scheduler=scheduler, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def patch(mode: str) -> LargeResPatch:
        return LargeResPatch(pipe, size, size, vae_chunk_size_x=chunk, vae_chunk_size_y=chunk, vae_mode=mode)

    return {
        UNTILED: lambda: own_tiling(vae, None),
        TWO_PASS: lambda: patch("two-pass"),
        EXACT: lambda: patch("exact"),
        DIFFUSERS: lambda: own_tiling(vae, chunk),
    }


@contextmanager
def own_tiling(vae: AutoencoderKL, chunk: int | None) -> Iterator[None]:
    """diffusers' tiling with tiles of `chunk` latent pixels, or none."""
    changed = {"use_tiling": chunk is not None}
    if chunk is not None:
        changed |= {"tile_latent_min_size": chunk, "tile_sample_min_size": chunk * FACTOR}
    before = {name: getattr(vae, name) for name in changed}
    vars(vae).update(changed)
    try:
        yield
    finally:
        vars(vae).update(before)


def run(vae: AutoencoderKL, direction: str, source: torch.Tensor) -> torch.Tensor:
    return vae.decode(source).sample if direction == "decode" else vae.encode(source).latent_dist.mode()


def source_shape(direction: str, size: int) -> tuple[int, int, int, int]:
    return (1, 4, size // FACTOR, size // FACTOR) if direction == "decode" else (1, 3, size, size)


def candidates(vae: AutoencoderKL, direction: str, size: int, chunk: int) -> dict[str, Candidate]:
    source = torch.randn(source_shape(direction, size), device=vae.device, dtype=vae.dtype)
    return {
        name: Candidate(lambda: run(vae, direction, source), context)
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


def photographs(size: int) -> dict[str, torch.Tensor]:
    """Square photographs ``[1, 3, size, size]`` in [-1, 1]; without scikit-image one of smooth noise."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        torch.manual_seed(0)
        noise = torch.nn.functional.interpolate(torch.randn(1, 3, 16, 16), size=(size, size), mode="bicubic")
        return {"smooth noise": noise.tanh()}
    folder = Path(found.origin).parent / "data"
    return {name: as_tensor(folder / name, size) for name in PHOTOGRAPHS if (folder / name).exists()}


def as_tensor(path: Path, size: int) -> torch.Tensor:
    with Image.open(path) as image:
        fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def seam_lines(method: str, size: int, chunk: int, unit: int) -> list[int]:
    """Where tiles meet, in output cells of `unit` per latent pixel; the same along both axes."""
    side = size // FACTOR
    if method == EXACT:  # its strips leave no seams; those of the tiles are looked at
        method = TWO_PASS
    if method == DIFFUSERS:  # each tile is blended into the one before over its first quarter
        stride = int(chunk * (1 - OVERLAP))
        return [unit * start for start in range(stride, side, stride)] if side > chunk else []
    return [unit * tile.left for tile in tiles(side, side, 0, chunk, chunk) if tile.top == 0 and tile.left > 0]


def measure_fidelity(vae: AutoencoderKL, size: int, chunk: int, pictures: int) -> list[dict[str, Any]]:
    """A row for each photograph, direction and tiled method, against the untiled result."""
    rows = []
    for name, image in list(photographs(size).items())[:pictures]:
        latent = run(vae, "encode", image.to(vae.device, vae.dtype))
        for direction, source, unit in (("decode", latent, FACTOR), ("encode", image.to(vae.device, vae.dtype), 1)):
            results = {}
            for method, context in methods(vae, size, chunk).items():
                with context():
                    results[method] = run(vae, direction, source).float().cpu()
            for method in (TWO_PASS, EXACT, DIFFUSERS):
                errors = errors_of(results[method], results[UNTILED], seam_lines(method, size, chunk, unit), unit)
                rows.append({"direction": direction, "size": size, "method": method, "picture": name, **errors})
    return rows


def errors_of(result: torch.Tensor, reference: torch.Tensor, lines: list[int], unit: int) -> dict[str, float]:
    reach = max(1, unit // 4)
    span = float(reference.max() - reference.min())
    seam = seam_error(result, reference, lines, lines, reach)
    return {
        "psnr": psnr(result, reference, span),
        "maximum_error": maximum_error(result, reference) / span,
        "seam_error": seam["seam"] / span,
        "error_elsewhere": seam["elsewhere"] / span,
    }


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


def print_fidelity(rows: list[dict[str, Any]], model: str) -> None:
    print(f"\nFidelity against the untiled result ({model}; errors in % of its range, means over pictures)")
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["direction"], row["size"], row["method"]), []).append(row)

    def mean(group: list[dict[str, Any]], key: str) -> float:
        return statistics.fmean(row[key] for row in group)

    print_table(
        ("", "image", "method", "pictures", "PSNR", "worst", "maximum", "at seams", "elsewhere"),
        [
            [
                direction,
                f"{size}x{size}",
                method,
                str(len(group)),
                f"{mean(group, 'psnr'):.1f} dB",
                f"{min(row['psnr'] for row in group):.1f} dB",
                *(f"{mean(group, key):.2%}" for key in ("maximum_error", "seam_error", "error_elsewhere")),
            ]
            for (direction, size, method), group in groups.items()
        ],
    )


def main() -> None:
    options = parse_arguments()
    report: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        "environment": prepare(options),
        "note": options.note,
        "options": {"vae_chunk": options.vae_chunk, "channels": options.channels},
        "fidelity_weights": options.model and options.model.name,
        "cost": [],
        "fidelity": [],
    }
    dtype = dtype_of(options.device)
    vae = build_vae(options.channels, options.device, dtype)
    shadow = build_vae(options.channels, "meta", dtype)
    trained = None
    if options.model is not None:
        trained = AutoencoderKL.from_pretrained(options.model, subfolder="vae").float().to(options.device).eval()
    with torch.no_grad():
        run(vae, "decode", run(vae, "encode", torch.zeros(1, 3, 64, 64, device=options.device, dtype=dtype)))
        for size in options.sizes:
            for direction in DIRECTIONS:
                report["cost"] += measure_cost(vae, shadow, direction, size, options)
            if trained is not None:
                report["fidelity"] += measure_fidelity(trained, size, options.vae_chunk, options.pictures)
            write_json(options.out, report)  # after every size: the next one may take long
    print_cost(report["cost"])
    if trained is not None:
        print_fidelity(report["fidelity"], report["fidelity_weights"])
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
