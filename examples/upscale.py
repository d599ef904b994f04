"""Enlarge a picture and paint the details that belong to its new size, doubling by doubling.

Any model that has an image-to-image pipeline will do; without --model it is the small one that comes with the examples.
"""

import argparse

from PIL import Image, ImageOps

from ladder import Size, add_ladder_options, check_ladder_options, climb
from pipelines import (
    PROMPT,
    Parser,
    add_patch_options,
    beside,
    image_path,
    load_pipeline,
    patch_builder,
    positive,
    run,
    save,
    words_for,
)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="image", type=picture, required=True, metavar="IMAGE", help="the picture")
    parser.add_argument(
        "--to", dest="size", type=size, required=True, metavar="WIDTHxHEIGHT", help="its new size, in sample pixels"
    )
    parser.add_argument("--prompt", default=PROMPT, help="what is on it (%(default)s)")
    parser.add_argument(
        "--model", metavar="NAME_OR_PATH", help="a checkpoint on the hub or a folder in diffusers' format"
    )
    add_ladder_options(parser)
    parser.add_argument("--out", type=image_path, default="upscaled.png", help="the file to write (%(default)s)")
    parser.add_argument("--stages", action="store_true", help="also write the picture at every size on the way")
    add_patch_options(parser)
    return parser


def picture(text: str) -> Image.Image:
    """The upright picture in a file, as an argparse type."""
    try:
        return ImageOps.exif_transpose(Image.open(text)).convert("RGB")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"there is no picture {text!r} to read: {error}") from None


def size(text: str) -> Size:
    """``4096x2048`` as a pair, as an argparse type."""
    sides = text.lower().split("x")
    if len(sides) != 2:
        raise argparse.ArgumentTypeError(f"must be like 4096x2048; got {text!r}")
    width, height = map(positive, sides)
    return width, height


def main() -> None:
    parser = build_parser()
    options = parser.parse_args()
    check_ladder_options(parser, options)
    image, large = options.image, options.size
    if large[0] * large[1] <= image.width * image.height:
        parser.error(
            f"--to must be larger than the picture, which is {image.width}x{image.height}; got {large[0]}x{large[1]}"
        )
    pipe = load_pipeline(options.model, parser)
    patch = patch_builder(parser, options)
    patch(pipe, *large)  # what it refuses is told before any work
    for stage in climb(pipe, words_for(options), image, large, options, patch):
        if stage.size == large:
            save(stage, options.out)
        elif options.stages:
            save(stage, beside(options.out, f"{stage.width}x{stage.height}"))


if __name__ == "__main__":
    run(main)
