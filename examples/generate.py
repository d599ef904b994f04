"""Paint a large image from a prompt: small first, then enlarged and refined, doubling by doubling.

Without --model this paints the map of a planet with the small pipeline that comes with the examples: it needs no
download and no GPU.
"""

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ladder import Patch, add_ladder_options, check_ladder_options, climb, first_size, paint
from pipelines import (
    Parser,
    add_patch_options,
    add_picture_options,
    beside,
    load_pipeline,
    patch_builder,
    run,
    save,
    training_size,
    unpatched,
    words_for,
)

Pixels = NDArray[np.uint8]  # [H, W, 3]


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_picture_options(parser, 4096, 2048)
    add_ladder_options(parser)
    parser.add_argument(
        "--at-once", action="store_true", help="from noise at full size, without the small picture and the refining"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="generate once more without the patch, and write that picture and the amplified difference, too",
    )
    add_patch_options(parser)
    return parser


def generate(pipe: Any, options: argparse.Namespace, patch: Patch) -> Image.Image:
    size, words = (options.width, options.height), words_for(options)
    first = size if options.at_once else first_size(size, training_size(pipe), pipe.vae_scale_factor)
    image = paint(pipe, words, first, options, patch)
    if first != size:
        *_, image = climb(pipe, words, image, size, options, patch)
    return image


def compare(patched: Pixels, reference: Pixels) -> Image.Image:
    """The difference, with its largest value as white; prints how large it is."""
    difference = np.abs(patched.astype(int) - reference)
    largest, mean_square = int(difference.max()), float(np.square(difference).mean())
    psnr = f"{10 * np.log10(255**2 / mean_square):.1f} dB" if mean_square else "infinite"
    print(f"patched against unpatched: PSNR {psnr}, largest error {largest} of 255 (drawn as white)")
    return Image.fromarray((difference * 255 // max(1, largest)).astype(np.uint8))


def main() -> None:
    parser = build_parser()
    options = parser.parse_args()
    check_ladder_options(parser, options)
    pipe = load_pipeline(options.model, parser)
    patch = patch_builder(parser, options)
    patch(pipe, options.width, options.height)  # what it refuses is told before any work
    patched = generate(pipe, options, patch)
    save(patched, options.out)
    if options.compare:
        reference = generate(pipe, options, unpatched)
        save(reference, beside(options.out, "unpatched"))
        save(compare(np.asarray(patched), np.asarray(reference)), beside(options.out, "difference"))


if __name__ == "__main__":
    run(main)
