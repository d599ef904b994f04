"""Draw the four tilings that blocked attention takes turns with."""

import argparse
import re

from largerespatch import viewBricks

LATENT_FACTOR = 8  # sample pixels along each axis of a token at Stable Diffusion's finest level


def image_size(text: str) -> tuple[int, int]:
    """``"2992x1496"`` as (width, height)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    sides = [int(side) for side in match.groups()] if match else [0]
    if any(side < 1 or side % LATENT_FACTOR for side in sides):
        raise argparse.ArgumentTypeError(
            f"must be WxH with multiples of {LATENT_FACTOR}, as in 2992x1496; got {text!r}"
        )
    return sides[0], sides[1]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("width", type=int, nargs="?", default=374, help="of the attended map in tokens (%(default)s)")
    parser.add_argument("height", type=int, nargs="?", default=374, help="of the attended map in tokens (%(default)s)")
    parser.add_argument(
        "--image-size",
        type=image_size,
        metavar="WxH",
        help="size of the image in sample pixels, in place of width and height: it is divided by 8, which gives the "
        "tokens of Stable Diffusion's finest attended map",
    )
    parser.add_argument("--attn-slice-x", type=int, default=64, metavar="N", help="in tokens (%(default)s)")
    parser.add_argument("--attn-slice-y", type=int, default=64, metavar="N", help="in tokens (%(default)s)")
    parser.add_argument("--attn-shape", choices=("brick", "tile"), default="brick", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the colours (%(default)s)")
    parser.add_argument("--out", default="bricks.png", help="the image file to write (%(default)s)")
    options = parser.parse_args()
    if options.image_size:
        options.width, options.height = (side // LATENT_FACTOR for side in options.image_size)
    return options


def main() -> None:
    options = parse_arguments()
    viewBricks(
        options.width,
        options.height,
        options.attn_slice_x,
        options.attn_slice_y,
        options.out,
        attn_shape=options.attn_shape,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
