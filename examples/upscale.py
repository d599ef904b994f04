"""Paint a coherent large image: generate small, enlarge, refine by image-to-image under the patch.

A model composes well only at about the size that it was trained on; asked for more at once, it repeats itself.
So the composition is made at that size, and the patch lets the same model paint the details at full size.
"""

import argparse
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image, ImageOps

from pipelines import (
    PROMPT,
    add_patch_options,
    beside,
    build_patch,
    image_path,
    load_pipeline,
    positive,
    training_size,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default=PROMPT, help="what to paint (%(default)s)")
    parser.add_argument(
        "--model", metavar="NAME_OR_PATH", help="a checkpoint on the hub or a folder in diffusers' format"
    )
    parser.add_argument("--image", type=picture, metavar="FILE", help="enlarge this picture, not a generated one")
    parser.add_argument("--width", type=positive, metavar="N", help="of the small image (the model's training size)")
    parser.add_argument("--height", type=positive, metavar="N", help="of the small image (the model's training size)")
    parser.add_argument("--factor", type=factor, default=4.0, metavar="X", help="how much larger (%(default)s)")
    parser.add_argument(
        "--strength",
        type=fraction,
        default=0.4,
        metavar="X",
        help="share of the steps that refine: 0.2 sharpens, 0.6 repaints (%(default)s)",
    )
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="denoising steps (%(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=4.0, metavar="X", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of both noises (%(default)s)")
    parser.add_argument("--out", type=image_path, default="upscaled.png", help="the file to write (%(default)s)")
    parser.add_argument("--stages", action="store_true", help="also write the small and the enlarged image")
    add_patch_options(parser)
    return parser


def picture(text: str) -> Image.Image:
    """The upright picture in a file, as an argparse type."""
    try:
        return ImageOps.exif_transpose(Image.open(text)).convert("RGB")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"there is no picture {text!r} to read: {error}") from None


def factor(text: str) -> float:
    """A finite number greater than 1, as an argparse type."""
    value = float(text)
    if not 1 < value <= 64:
        raise argparse.ArgumentTypeError(f"must be more than 1 and at most 64; got {text!r}")
    return value


def fraction(text: str) -> float:
    """A number above 0 and up to 1, as an argparse type."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be more than 0 and at most 1; got {text!r}")
    return value


def paint(pipe: Any, options: argparse.Namespace, **arguments: Any) -> Image.Image:
    return pipe(
        options.prompt,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(options.seed),
        **arguments,
    ).images[0]


def generate_small(pipe: Any, options: argparse.Namespace) -> Image.Image:
    side = training_size(pipe)
    return paint(pipe, options, width=options.width or side, height=options.height or side)


def enlarge(image: Image.Image, times: float, multiple: int) -> Image.Image:
    """By Lanczos, to the nearest size in multiples of `multiple` sample pixels."""
    width, height = (max(1, round(side * times / multiple)) * multiple for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def main() -> None:
    parser = build_parser()
    options = parser.parse_args()
    if int(options.steps * options.strength) < 1:
        parser.error(f"--steps {options.steps} times --strength {options.strength} must leave at least one step")
    pipe = load_pipeline(options.model)
    small = options.image or generate_small(pipe, options)
    enlarged = enlarge(small, options.factor, pipe.vae_scale_factor)
    refiner = AutoPipelineForImage2Image.from_pipe(pipe)
    with build_patch(parser, refiner, *enlarged.size, options):
        refined = paint(refiner, options, image=enlarged, strength=options.strength)
    stages = {beside(options.out, "small"): small, beside(options.out, "enlarged"): enlarged} if options.stages else {}
    for path, image in {options.out: refined, **stages}.items():
        image.save(path)
        print(f"written to {path}")


if __name__ == "__main__":
    main()
