"""Paint small, then enlarge and refine, doubling by doubling, each time with the words for what is seen from there.

A model composes well only at about the size that it was trained on; asked for more at once, it repeats itself. So the
composition is made at that size, and the patch lets the same model paint the details at each larger one.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image

from pipelines import Words, positive

Size = tuple[int, int]  # width and height in sample pixels
Patch = Callable[[Any, int, int], AbstractContextManager[Any]]


def add_ladder_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=positive, default=12, metavar="N", help="denoising steps (%(default)s)")
    parser.add_argument(
        "--strength",
        type=fraction,
        default=0.5,
        metavar="X",
        help="share of the steps that refine an enlarged picture: 0.2 sharpens, 0.6 repaints (%(default)s)",
    )
    parser.add_argument(
        "--guidance-scale", type=float, default=3.0, metavar="X", help="of the first picture (%(default)s)"
    )
    parser.add_argument(
        "--refine-guidance-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="of the refined ones: without guidance, 1, their steps take half of the time (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all noise (%(default)s)")


def check_ladder_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if int(options.steps * options.strength) < 1:
        parser.error(f"--steps {options.steps} times --strength {options.strength} must leave at least one step")


def fraction(text: str) -> float:
    """A number above 0 and up to 1, as an argparse type."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be more than 0 and at most 1; got {text!r}")
    return value


def first_size(size: Size, side: int, multiple: int) -> Size:
    """Where to begin: `size` halved as long as its area stays at least that of a square of the training size."""
    halvings = max(0, math.floor(math.log2(math.sqrt(size[0] * size[1]) / side)))
    return rounded(size, 2**halvings, multiple)


def rounded(size: Size, divisor: float, multiple: int) -> Size:
    width, height = (max(1, round(side / divisor / multiple)) * multiple for side in size)
    return width, height


def sizes_between(small: Size, large: Size, multiple: int) -> Iterator[Size]:
    """The sizes to refine at on the way from `small` to `large`: each about twice the one before, and `large` last."""
    times = math.sqrt(large[0] * large[1] / (small[0] * small[1]))
    doublings = max(1, math.ceil(math.log2(times) - 0.05))
    for left in range(doublings - 1, 0, -1):
        yield rounded(large, times ** (left / doublings), multiple)
    yield large


def paint(pipe: Any, words: Words, size: Size, options: argparse.Namespace, patch: Patch) -> Image.Image:
    """A picture of this size from noise alone."""
    width, height = size
    scale = options.guidance_scale
    return _call(pipe, words, size, options, patch, width=width, height=height, guidance_scale=scale)


def refine(
    pipe: Any, words: Words, image: Image.Image, size: Size, options: argparse.Namespace, patch: Patch
) -> Image.Image:
    """The picture enlarged to this size, with the details that belong there."""
    refiner = AutoPipelineForImage2Image.from_pipe(pipe)
    enlarged = enlarge(image, size, around=options.padding_mode == "circular")
    scale = options.refine_guidance_scale
    return _call(refiner, words, size, options, patch, image=enlarged, strength=options.strength, guidance_scale=scale)


def enlarge(image: Image.Image, size: Size, around: bool) -> Image.Image:
    """By Lanczos; `around` lets the right edge look at the left one as its neighbour, and the other way round."""
    if not around:
        return image.resize(size, Image.Resampling.LANCZOS)
    width, height = image.size
    margin = min(8, width)
    wider = Image.new(image.mode, (width + 2 * margin, height))
    for left in (margin - width, margin, margin + width):
        wider.paste(image, (left, 0))
    return wider.resize(size, Image.Resampling.LANCZOS, box=(margin, 0, margin + width, height))


def _call(
    pipe: Any, words: Words, size: Size, options: argparse.Namespace, patch: Patch, **arguments: Any
) -> Image.Image:
    prompt = words.at(size[0])
    print(f"{size[0]} x {size[1]}: {prompt}", flush=True)
    with patch(pipe, *size):
        return pipe(
            prompt,
            num_inference_steps=options.steps,
            generator=torch.Generator("cpu").manual_seed(options.seed + size[0]),
            **arguments,
        ).images[0]


def climb(
    pipe: Any, words: Words, image: Image.Image, size: Size, options: argparse.Namespace, patch: Patch
) -> Iterator[Image.Image]:
    """The picture at every size on the way to `size`, refined at each."""
    for rung in sizes_between(image.size, size, pipe.vae_scale_factor):
        image = refine(pipe, words, image, rung, options, patch)
        yield image
