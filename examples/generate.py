"""Generate a large image from a prompt.

Without --model this uses the small pipeline that comes with the examples: it needs no download and no GPU.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines import PROMPT, add_patch_options, beside, build_patch, image_path, load_pipeline, positive

SIZE = 2048  # default width and height, in sample pixels
STEPS_HELP = "denoising steps (%(default)s, enough for the small pipeline; others want 20 to 50)"

Pixels = NDArray[np.float32]  # [H, W, 3] in [0, 1]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default=PROMPT, help="what to paint (%(default)s)")
    parser.add_argument(
        "--model", metavar="NAME_OR_PATH", help="a checkpoint on the hub or a folder in diffusers' format"
    )
    parser.add_argument("--width", type=positive, default=SIZE, metavar="N", help="in sample pixels (%(default)s)")
    parser.add_argument("--height", type=positive, default=SIZE, metavar="N", help="in sample pixels (%(default)s)")
    parser.add_argument("--steps", type=positive, default=6, metavar="N", help=STEPS_HELP)
    parser.add_argument("--guidance-scale", type=float, default=4.0, metavar="X", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise to start from (%(default)s)")
    parser.add_argument("--out", type=image_path, default="large.png", help="the file to write (%(default)s)")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="generate once more without the patch, and write that picture and the amplified difference, too",
    )
    add_patch_options(parser)
    return parser


def generate(pipe: Any, options: argparse.Namespace) -> Pixels:
    generator = torch.Generator("cpu").manual_seed(options.seed)
    return pipe(
        options.prompt,
        width=options.width,
        height=options.height,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        generator=generator,
        output_type="np",
    ).images[0]


def save(pixels: Pixels, path: Path) -> None:
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(path)
    print(f"written to {path}")


def compare(patched: Pixels, unpatched: Pixels, path: Path) -> None:
    """Write the unpatched picture and the difference, with its largest value as white, and print how large it is."""
    difference = np.abs(patched - unpatched)
    largest, mean_square = float(difference.max()), float(np.square(difference, dtype=np.float64).mean())
    save(unpatched, beside(path, "unpatched"))
    save(difference / largest if largest else difference, beside(path, "difference"))
    psnr = f"{-10 * np.log10(mean_square):.1f} dB" if mean_square else "infinite"
    print(f"patched against unpatched: PSNR {psnr}, largest error {255 * largest:.0f} of 255 (drawn as white)")


def main() -> None:
    parser = build_parser()
    options = parser.parse_args()
    pipe = load_pipeline(options.model)
    with build_patch(parser, pipe, options.width, options.height, options):
        patched = generate(pipe, options)
    save(patched, options.out)
    if options.compare:
        compare(patched, generate(pipe, options), options.out)


if __name__ == "__main__":
    main()
