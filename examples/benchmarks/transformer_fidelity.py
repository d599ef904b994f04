"""How near are blocks with context to dense attention, in a joint-attention transformer beyond its training size?

One forward at three noise levels, and whole pictures from the same noise, of the small transformer that comes with the
examples; tokens outside a brick that it attends to in several numbers. Bricks are an eighth of the map. Prompts and
seeds were not used in making the library. Nothing of this has been seen on published weights.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

from _common import add_clock_options, add_common_options, positive, prepare, print_table, psnr, write_json
from largerespatch import LargeResPatch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo_training.text import embed
from pipelines import load_transformer

CELL = 16  # sample pixels along each axis of a token
TRAINED = 16  # tokens along each axis
NOISE_LEVELS = (0.9, 0.5, 0.15)
GUIDANCE = 3.0
CASES = {
    "a hemisphere, green continents by a shallow sea, bays and islands": 11,
    "a region, green coast by a deep sea, mountains": 23,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--times", type=positive, nargs="+", default=[2, 4], metavar="N", help="the training side (%(default)s)"
    )
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[0, 512, 1024, 2048, 3072],
        metavar="N",
        help="in tokens (%(default)s)",
    )
    parser.add_argument(
        "--pictures", type=int, nargs="*", default=[1024, 3072], metavar="N", help="contexts of pictures (%(default)s)"
    )
    parser.add_argument("--steps", type=positive, nargs="+", default=[8, 20], metavar="N", help="(%(default)s)")
    parser.add_argument("--prompts", type=positive, default=len(CASES), metavar="N", help="(%(default)s)")
    add_clock_options(parser)
    add_common_options(parser, "transformer_fidelity")
    return parser.parse_args()


class Painter:
    """Of one prompt, from one seed, on a square of so many tokens a side; in blocks where a context is given."""

    def __init__(self, flux: Any, prompt: str, side: int) -> None:
        self.flux, self.prompt, self.seed, self.side = flux, prompt, CASES[prompt], side

    def _patch(self, context: int | None) -> Any:
        if context is None:
            return nullcontext()
        width = self.side // 4
        sizes = {"attn_slice_x": width, "attn_slice_y": width, "attn_full_tokens": width**2}
        return LargeResPatch(self.flux.pipe, *[CELL * self.side] * 2, attn_context=context, **sizes)

    def latent(self, steps: int, context: int | None) -> torch.Tensor:
        asked = {"width": CELL * self.side, "height": CELL * self.side, "num_inference_steps": steps}
        generator = torch.Generator().manual_seed(self.seed)
        with self._patch(context):
            result = self.flux(self.prompt, guidance_scale=GUIDANCE, generator=generator, output_type="latent", **asked)
        return result.images

    def picture(self, latent: torch.Tensor) -> torch.Tensor:
        """In [-1, 1]."""
        vae, size = self.flux.pipe.vae, CELL * self.side
        plane = FluxPipeline._unpack_latents(latent, size, size, self.flux.pipe.vae_scale_factor)
        plane = plane / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        return vae.decode(plane).sample.clamp(-1, 1)

    def forward(self, latent: torch.Tensor, level: float, context: int | None) -> torch.Tensor:
        """What the transformer makes of a latent that is noise to so much."""
        words, pooled = embed(self.flux.text_encoder, self.flux.tokenizer, [self.prompt])
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(self.seed + 1))
        ids = FluxPipeline._prepare_latent_image_ids(1, self.side, self.side, "cpu", latent.dtype)
        with self._patch(context):
            return self.flux.pipe.transformer(
                torch.lerp(latent, noise, level),
                words,
                pooled,
                torch.tensor([level]),
                ids,
                torch.zeros(words.shape[1], 3),
                return_dict=False,
            )[0]


def measure(flux: Any, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each case, size, number of steps and context: one forward at a noise level, or the picture."""
    sizes = [(steps, times) for steps in options.steps for times in options.times]
    for steps, times in sizes:
        for prompt in list(CASES)[: options.prompts]:
            painter = Painter(flux, prompt, TRAINED * times)
            told = {"times": times, "prompt": prompt, "seed": painter.seed, "steps": steps}
            dense = painter.latent(steps, None)
            for level in NOISE_LEVELS:
                expected = painter.forward(dense, level, None)
                span = float(expected.max() - expected.min())
                for context in options.contexts:
                    found = psnr(painter.forward(dense, level, context), expected, span)
                    yield told | {"of": "one forward", "noise": level, "context": context, "psnr": found}
            picture = painter.picture(dense) if options.pictures else None
            for context in options.pictures:
                found = psnr(painter.picture(painter.latent(steps, context)), picture, 2.0)
                yield told | {"of": "picture", "context": context, "psnr": found}


def print_rows(rows: list[dict[str, Any]]) -> None:
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        what = f"noise {row['noise']}" if "noise" in row else f"{row['steps']} steps"
        groups.setdefault((row["of"], f"{row['times']} x", what, str(row["context"])), []).append(row["psnr"])
    print_table(
        ("", "training side", "", "context", "PSNR to dense", "worst"),
        [[*key, f"{statistics.fmean(found):.1f} dB", f"{min(found):.1f} dB"] for key, found in groups.items()],
    )


def main() -> None:
    options = parse_arguments()
    report: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        "environment": prepare(options),
        "note": options.note,
        "weights": "demo_transformer",
        "rows": [],
    }
    flux = load_transformer()
    with torch.no_grad():
        for row in measure(flux, options):
            report["rows"].append(row)
            write_json(options.out, report)  # after every row: the next one may take long
    print_rows(report["rows"])
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
