"""How far are results from those of the unpatched model: overall, at worst, and next to the lines where tiles meet?

The VAE: encode and decode of maps, in tiles as diffusers does it, by the original's recipe of 2022, in two and more
passes, and exactly, against the untiled result of the same weights. It means something on trained weights and on
pictures of their kind only: these are of the region of the Earth that the demo model was never trained on.

Self-attention: whole pictures, generated with attention in blocks alone and with contexts of several sizes, against the
picture that dense attention gives from the same noise. Both are decoded by the untiled VAE.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import nn

from _common import (
    FACTOR,
    add_common_options,
    add_device_options,
    maximum_error,
    own_tiling,
    positive,
    prepare,
    print_table,
    psnr,
    run_vae,
    seam_error,
    vae_pipeline,
    write_json,
)
from largerespatch import LargeResPatch
from largerespatch.core.patching import PatchStack
from largerespatch.core.statistics import GivenStatistics, GroupStatistics, record
from largerespatch.core.tilings import tiles, window

EXAMPLES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(EXAMPLES))

from demo_training.captions import PROMPTS  # noqa: E402  (by the line above)
from demo_training.data import fetch_maps, held_out_region, load_map, to_tensor  # noqa: E402

OVERLAP = 0.25  # of a tile, in diffusers' own tiling
RECIPE_HALO = 4  # latent pixels
DIFFUSERS, RECIPE, EXACT = "diffusers' tiling", "2022 recipe", "exact"

Pictures = dict[str, torch.Tensor]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        type=Path,
        default=EXAMPLES / "demo_model",
        metavar="FOLDER",
        help="a trained pipeline in diffusers' format (%(default)s)",
    )
    parser.add_argument(
        "--maps",
        type=Path,
        default=Path("demo_training_work/maps"),
        metavar="FOLDER",
        help="where the maps of examples/train_demo_model.py are, or are to be fetched to (%(default)s)",
    )
    parser.add_argument("--pictures", type=positive, metavar="N", help="no more than so many parts of the map")
    parser.add_argument("--size", type=positive, default=512, metavar="N", help="of an image (%(default)s)")
    parser.add_argument("--vae-chunk", type=positive, default=32, metavar="N", help="in latent pixels (%(default)s)")
    parser.add_argument(
        "--passes", type=positive, nargs="+", default=[2, 3, 4], metavar="N", help="over the VAE's tiles (%(default)s)"
    )
    parser.add_argument(
        "--generated", type=positive, default=640, metavar="N", help="size of generated pictures (%(default)s)"
    )
    parser.add_argument("--prompts", type=positive, default=2, metavar="N", help="generated pictures (%(default)s)")
    parser.add_argument("--steps", type=positive, nargs="+", default=[4, 20], metavar="N", help="(%(default)s)")
    parser.add_argument("--attn-slice", type=positive, default=16, metavar="N", help="in tokens (%(default)s)")
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[0, 128, 512, 2048], metavar="N", help="in tokens (%(default)s)"
    )
    add_device_options(parser)
    add_common_options(parser, "fidelity")
    return parser.parse_args()


# --- maps -------------------------------------------------------------------------------------------------------


def held_out_maps(folder: Path, size: int) -> Pictures:
    """The corners of the region that was never trained on, ``[1, 3, size, size]`` in [-1, 1]."""
    region = held_out_region(load_map(fetch_maps(folder), "bmng.jpg"))
    bottom, right = (side - size for side in region.shape[:2])
    if bottom < 0 or right < 0:
        raise SystemExit(
            f"--size must be at most {min(region.shape[:2])}, which the held-out region is high; got {size}"
        )
    corners = {"north-west": (0, 0), "north-east": (0, right), "south-west": (bottom, 0), "south-east": (bottom, right)}
    return {
        name: to_tensor(region[top : top + size, left : left + size][None]) for name, (top, left) in corners.items()
    }


# --- the VAE ----------------------------------------------------------------------------------------------------


def vae_methods(
    vae: AutoencoderKL, size: int, chunk: int, passes: list[int]
) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Contexts in which the VAE works in one way or another, by name."""
    patch = partial(LargeResPatch, vae_pipeline(vae), size, size, vae_chunk_size_x=chunk, vae_chunk_size_y=chunk)
    return {
        DIFFUSERS: lambda: own_tiling(vae, chunk),
        RECIPE: lambda: recipe(vae, chunk),
        **{f"{count} passes": partial(patch, vae_passes=count) for count in passes},
        EXACT: lambda: patch(vae_mode="exact"),
    }


class AveragedGroupNorm:
    """Normalizes tiles by themselves and notes their statistics, halo counted; once averaged, by their average."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.groups = norm.num_groups
        self.seen: list[GroupStatistics] = []
        self.averaged: GroupStatistics | None = None

    def average(self) -> None:
        """Of means and of variances: the variances lack what the tiles' means differ by."""
        mean, variance = (torch.stack([getattr(each, name) for each in self.seen]) for name in ("mean", "variance"))
        self.averaged = GroupStatistics(sum(each.cells for each in self.seen), mean.mean(0), variance.mean(0))

    def __call__(self, original: Callable[..., torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
        if self.averaged is None:
            self.seen.append(record(hidden_states.flatten(2)[..., None], self.groups))
            return original(hidden_states)
        with GivenStatistics(self.averaged):
            return original(hidden_states.flatten(2)[..., None]).view(hidden_states.shape)


@contextmanager
def recipe(vae: AutoencoderKL, chunk: int) -> Iterator[None]:
    """What StableDiffusionLargeResPatch did in 2022: all of the network, attention too, on tiles, in two passes."""
    with PatchStack() as stack:
        for half, unit, scale in (("encoder", FACTOR, Fraction(1, FACTOR)), ("decoder", 1, Fraction(FACTOR))):
            model = getattr(vae, half)
            around = partial(by_recipe, model, chunk * unit, RECIPE_HALO * unit, scale)
            stack.wrap(model, "forward", around, f"vae.{half}.forward")
        yield


def by_recipe(
    model: nn.Module, side: int, halo: int, scale: Fraction, original: Callable[..., torch.Tensor], plane: torch.Tensor
) -> torch.Tensor:
    """Run `model` on windows of ``[B, C, H, W]``: tiles of `side` cells and a `halo`; `scale` is its output's."""
    height, width = plane.shape[-2:]
    windows = [window(tile, halo, height, width) for tile in tiles(height, width, 0, side, side)]
    if len(windows) == 1:
        return original(plane)
    parts = [plane[:, :, each.outer.rows, each.outer.columns] for each in windows]
    with PatchStack() as stack:
        norms = []
        for name, norm in model.named_modules():
            if isinstance(norm, nn.GroupNorm):
                norms.append(AveragedGroupNorm(norm))
                stack.wrap(norm, "forward", norms[-1], name)
        for part in parts:
            original(part)
        for shared in norms:
            shared.average()
        results = [original(part) for part in parts]
    output = plane.new_empty(*results[0].shape[:2], int(height * scale), int(width * scale))
    for each, result in zip(windows, results, strict=True):
        place, owned = each.tile.scaled(scale), each.owned(*result.shape[-2:])
        output[:, :, place.rows, place.columns] = result[:, :, owned.rows, owned.columns]
    return output


def seam_lines(method: str, size: int, chunk: int, unit: int) -> list[int]:
    """Where tiles meet, in output cells of `unit` per latent pixel; the same along both axes.

    Exact strips leave no seams: those of the tiles are looked at.
    """
    side = size // FACTOR
    if method == DIFFUSERS:  # each tile is blended into the one before over its first quarter
        stride = int(chunk * (1 - OVERLAP))
        return [unit * start for start in range(stride, side, stride)] if side > chunk else []
    return [unit * tile.left for tile in tiles(side, side, 0, chunk, chunk) if tile.top == 0 and tile.left > 0]


def measure_vae(vae: AutoencoderKL, pictures: Pictures, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each part of the map, direction and method, against the untiled result."""
    methods = vae_methods(vae, options.size, options.vae_chunk, options.passes)
    for name, picture in pictures.items():
        image = picture.to(vae.device, vae.dtype)
        latent = run_vae(vae, "encode", image)
        for direction, source, unit in (("decode", latent, FACTOR), ("encode", image, 1)):
            untiled = run_vae(vae, direction, source)
            for method, context in methods.items():
                with context():
                    result = run_vae(vae, direction, source)
                lines = seam_lines(method, options.size, options.vae_chunk, unit)
                errors = errors_of(result.cpu(), untiled.cpu(), lines, max(1, unit // 4))
                yield {"direction": direction, "method": method, "picture": name, **errors}


def errors_of(result: torch.Tensor, reference: torch.Tensor, lines: list[int], reach: int) -> dict[str, float]:
    """Errors relative to the range of the reference; seams within `reach` cells of `lines` along both axes."""
    span = float(reference.max() - reference.min())
    seam = seam_error(result, reference, lines, lines, reach)
    return {
        "psnr": psnr(result, reference, span),
        "maximum_error": maximum_error(result, reference) / span,
        "seam_error": seam["seam"] / span,
        "error_elsewhere": seam["elsewhere"] / span,
    }


def print_vae(rows: list[dict[str, Any]]) -> None:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["direction"], row["method"]), []).append(row)

    def summary(group: list[dict[str, Any]]) -> list[str]:
        decibels = [row["psnr"] for row in group]
        means = (statistics.fmean(row[key] for row in group) for key in ("seam_error", "error_elsewhere"))
        largest = max(row["maximum_error"] for row in group)
        return [
            f"{statistics.fmean(decibels):.1f} dB",
            f"{min(decibels):.1f} dB",
            *(f"{e:.1e}" for e in (largest, *means)),
        ]

    print_table(
        ("", "method", "mean PSNR", "worst", "max. error", "at seams", "elsewhere"),
        [[direction, method, *summary(group)] for (direction, method), group in groups.items()],
    )


# --- self-attention ---------------------------------------------------------------------------------------------


def measure_attention(pipe: StableDiffusionPipeline, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each number of steps, prompt, shape of blocks and size of context, against dense attention."""
    size, side = options.generated, options.attn_slice

    def latents(prompt: str, steps: int, seed: int) -> torch.Tensor:
        return pipe(
            prompt,
            width=size,
            height=size,
            num_inference_steps=steps,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images

    def picture(latent: torch.Tensor) -> torch.Tensor:
        return pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample.clamp(-1, 1).cpu()

    for steps in options.steps:
        for seed in range(options.prompts):
            prompt = PROMPTS[seed * len(PROMPTS) // options.prompts]
            dense = picture(latents(prompt, steps, seed))
            for shape in ("brick", "tile"):
                for context in options.contexts:
                    blocks = {"attn_slice_x": side, "attn_slice_y": side, "attn_full_tokens": 4 * side**2}
                    with LargeResPatch(pipe, size, size, attn_shape=shape, attn_context=context, **blocks):
                        latent = latents(prompt, steps, seed)
                    result = picture(latent)
                    yield {
                        "steps": steps,
                        "prompt": prompt,
                        "shape": shape,
                        "context": context,
                        "psnr": psnr(result, dense, 2.0),
                        "maximum_error": maximum_error(result, dense) / 2.0,
                    }


def print_attention(rows: list[dict[str, Any]]) -> None:
    groups: dict[tuple[int, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["steps"], row["shape"], row["context"]), []).append(row)
    print_table(
        ("steps", "shape", "context", "PSNR of each picture", "max. error"),
        [
            [
                *map(str, key),
                ", ".join(f"{row['psnr']:.1f}" for row in group),
                f"{max(row['maximum_error'] for row in group):.1e}",
            ]
            for key, group in groups.items()
        ],
    )


def main() -> None:
    options = parse_arguments()
    pictures = dict(list(held_out_maps(options.maps, options.size).items())[: options.pictures])
    report: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        "environment": prepare(options) | {"dtype": "float32"},
        "note": options.note,
        "options": {name: getattr(options, name) for name in ("size", "vae_chunk", "generated", "attn_slice", "steps")},
        "weights": options.model.resolve().name,
        "pictures": "parts of a map of the region that was never trained on",
    }
    pipe = StableDiffusionPipeline.from_pretrained(options.model, dtype=torch.float32).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        report["vae"] = list(measure_vae(pipe.vae, pictures, options))
        report["attention"] = list(measure_attention(pipe, options))
    write_json(options.out, report)
    print(f"The VAE of {report['weights']}: {report['pictures']}, {options.size}x{options.size}")
    print_vae(report["vae"])
    print(f"Self-attention in blocks: {options.generated}x{options.generated} pictures, against dense attention")
    print_attention(report["attention"])
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
