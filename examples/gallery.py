"""Make the README's pictures from scratch, as labelled sheets.

    planet.jpg     a planet painted by the ladder of generate.py, shown small, with two parts of it as they are
    sizes.jpg      one prompt and one seed at the training size, and at a multiple of it without and with the patch
    attention.jpg  the ways to block self-attention against attention over the whole image
    seams.jpg      decoding by diffusers' tiling and in two passes, and what each differs by from decoding at once

Everything but the part shown is as without the patch, so a difference has one cause only. Without --model the small
pipeline that comes with the examples paints. All but the planet is to be run where the unpatched pipeline still fits
into memory.
"""

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont

from generate import build_parser as generator_parser
from generate import generate
from largerespatch import LargeResPatch
from pipelines import image_path, load_pipeline, patch_builder, positive, run, training_size
from pipelines import save as save_picture

SHEETS = ("planet", "sizes", "attention", "seams")
CONTINENT = "a continent, green and desert coast by a deep sea, mountains"
ATTENTION = {
    "bricks with context": {"attn_shape": "brick"},
    "tiles with context": {"attn_shape": "tile"},
    "bricks alone": {"attn_shape": "brick", "attn_context": 0},
    "tiles alone": {"attn_shape": "tile", "attn_context": 0},
}
PATCHED = "bricks with context"  # as by default
LARGEST_FILE = 500_000  # bytes
ZOOM = 2
ATTENTION_GAIN, VAE_GAIN = 4, 16  # of drawn differences
PAGE = 1000  # drawn pixels that the planet is wide
PARTS = ((0.4, 0.49), (0.785, 0.25))  # where the middles of its two parts are, of its width and height
GAP, FONT = 12, 20
PAPER, INK = "white", "#2A2733"


class Panel(NamedTuple):
    label: str
    picture: Image.Image


class Painter:
    """Paints one prompt from one seed with and without patches, each picture only once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.pipe = load_pipeline(options.model)
        self.options = options
        self.small = options.size or training_size(self.pipe)
        self.large = self.small * options.times
        self.painted: dict[str, torch.Tensor] = {}

    def patch(self, **changes: Any) -> LargeResPatch:
        """Bricks as large as what the model attends to in training, and tiles of the VAE of half the image."""
        side = self.small // self.pipe.vae_scale_factor
        half = self.large // self.pipe.vae_scale_factor // 2
        settings = {"attn_slice_x": side, "attn_slice_y": side, "attn_full_tokens": 4 * side**2}
        settings |= {"vae_chunk_size_x": half, "vae_chunk_size_y": half}
        return LargeResPatch(self.pipe, self.large, self.large, **settings | changes)

    def latents(self, name: str) -> torch.Tensor:
        """`name` is a key of `ATTENTION`, or "unpatched", or "small" for the training size."""
        if name not in self.painted:
            side = self.small if name == "small" else self.large
            patch = self.patch(**ATTENTION[name]) if name in ATTENTION else nullcontext()
            with patch:
                self.painted[name] = self.pipe(
                    self.options.prompt,
                    width=side,
                    height=side,
                    num_inference_steps=self.options.steps,
                    guidance_scale=self.options.guidance_scale,
                    generator=torch.Generator("cpu").manual_seed(self.options.seed),
                    output_type="latent",
                ).images
        return self.painted[name]

    @torch.inference_mode()
    def decoded(self, name: str, way: AbstractContextManager[object] | None = None) -> Image.Image:
        """Decoded at once, or inside `way`."""
        with way or nullcontext():
            sample = self.pipe.vae.decode(self.latents(name) / self.pipe.vae.config.scaling_factor).sample
        return self.pipe.image_processor.postprocess(sample)[0]


class DiffusersTiling:
    """diffusers' own tiled decoding, its tiles as large as the small picture."""

    def __init__(self, vae: Any, side: int) -> None:
        self.vae = vae
        self.side = side

    def __enter__(self) -> None:
        self.vae.tile_sample_min_size = self.side
        self.vae.tile_latent_min_size = self.side // 8
        self.vae.enable_tiling()

    def __exit__(self, *_: object) -> None:
        self.vae.disable_tiling()


def sizes(painter: Painter) -> list[Panel]:
    small, large = painter.small, painter.large
    return [
        Panel(f"{small} x {small}, the training size", painter.decoded("small")),
        Panel(f"{large} x {large}, unpatched", painter.decoded("unpatched")),
        Panel(f"{large} x {large}, patched", painter.decoded(PATCHED)),
    ]


def attention(painter: Painter) -> list[Panel]:
    whole = painter.decoded("unpatched")
    blocked = {name: painter.decoded(name) for name in ATTENTION}
    prompt = Panel(f"{painter.small} x {painter.small}", painter.decoded("small"))
    return [Panel("whole image", whole), *against(whole, blocked), prompt, *differences(whole, blocked, ATTENTION_GAIN)]


def seams(painter: Painter) -> list[Panel]:
    """Enlarged crops, which hold a seam of each way that has one."""
    whole = painter.decoded(PATCHED)
    ways = {"diffusers' tiling": DiffusersTiling(painter.pipe.vae, painter.small), "two passes": painter.patch()}
    decoded = {label: painter.decoded(PATCHED, way) for label, way in ways.items()}
    box = seam_box(painter.small, painter.large)
    panels = [*against(whole, decoded), *differences(whole, decoded, VAE_GAIN)]
    return [Panel(label, zoomed(picture, box)) for label, picture in panels]


def planet(options: argparse.Namespace) -> Image.Image:
    arguments = [f"--width={options.planet_width}", f"--height={options.planet_width // 2}"]
    generating = generator_parser().parse_args([*arguments, f"--seed={options.seed}", *model_option(options)])
    pipe = load_pipeline(options.model)
    picture = generate(pipe, generating, patch_builder(generator_parser(), generating))
    if options.planet:
        save_picture(picture, options.planet)
    return with_parts(picture)


def with_parts(picture: Image.Image) -> Image.Image:
    """The picture above, two parts of it below, each as wide as half of the page."""
    half, height = (PAGE - GAP) // 2, PAGE // 3
    page = Image.new("RGB", (PAGE, PAGE // 2 + GAP + height), PAPER)
    page.paste(picture.resize((PAGE, PAGE // 2), Image.Resampling.LANCZOS))
    for index, (across, down) in enumerate(PARTS):
        left = min(max(0, round(across * picture.width) - half // 2), max(0, picture.width - half))
        top = min(max(0, round(down * picture.height) - height // 2), max(0, picture.height - height))
        page.paste(picture.crop((left, top, left + half, top + height)), (index * (half + GAP), PAGE // 2 + GAP))
    return page


def model_option(options: argparse.Namespace) -> list[str]:
    return [f"--model={options.model}"] if options.model else []


def against(reference: Image.Image, pictures: dict[str, Image.Image]) -> list[Panel]:
    """The pictures, labelled with the PSNR of each."""
    return [Panel(f"{label}: {psnr(reference, picture)}", picture) for label, picture in pictures.items()]


def differences(reference: Image.Image, pictures: dict[str, Image.Image], gain: int) -> list[Panel]:
    def amplified(level: int) -> int:
        return min(255, gain * level)

    return [
        Panel(f"difference x {gain}", ImageChops.difference(reference, picture).point(amplified))
        for picture in pictures.values()
    ]


def psnr(reference: Image.Image, picture: Image.Image) -> str:
    error = np.mean((np.asarray(picture, float) - np.asarray(reference, float)) ** 2)
    return f"{10 * np.log10(255**2 / error):.1f} dB" if error else "equal"


def seam_box(small: int, large: int) -> tuple[int, int, int, int]:
    """A square around the seams in the middle of the two passes, and those of diffusers' tiling next to them.

    diffusers' tiles start every three quarters of their side, and are blended over the quarter before.
    """
    side, middle = small // ZOOM, large // 2
    return (middle - side // 4, middle - side // 4, middle + side - side // 4, middle + side - side // 4)


def zoomed(picture: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    crop = picture.crop(box)
    return crop.resize((crop.width * ZOOM, crop.height * ZOOM), Image.Resampling.NEAREST)


def sheet(panels: Sequence[Panel], columns: int, side: int) -> Image.Image:
    """Panels in rows, each in a square of `side` drawn pixels below its label; smaller pictures keep their size."""
    font = ImageFont.load_default(FONT)
    head = 2 * FONT
    rows = -(-len(panels) // columns)
    page = Image.new("RGB", (columns * (side + GAP) + GAP, rows * (side + head) + GAP), PAPER)
    pen = ImageDraw.Draw(page)
    for i, (label, picture) in enumerate(panels):
        left, top = GAP + i % columns * (side + GAP), i // columns * (side + head)
        pen.text((left, top + FONT // 2), label, fill=INK, font=font)
        if picture.width > side:
            picture = picture.resize((side, side), Image.Resampling.LANCZOS)
        page.paste(picture, (left, top + head))
    return page


def save(page: Image.Image, path: Path) -> None:
    """A JPEG of the best quality that keeps the file small enough; anything else as it is."""
    encoded = BytesIO()
    for quality in range(95, 50, -5):
        encoded = BytesIO()
        page.save(encoded, Image.registered_extensions()[path.suffix], quality=quality, optimize=True)
        if encoded.tell() <= LARGEST_FILE:
            break
    path.write_bytes(encoded.getvalue())
    print(f"written to {path}, {encoded.tell() / 1000:.0f} kB")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheets", nargs="+", choices=SHEETS, default=SHEETS, help="which to make (all)")
    parser.add_argument("--model", metavar="NAME_OR_PATH", help="a checkpoint or a folder in diffusers' format")
    parser.add_argument("--prompt", default=CONTINENT, help="what to paint but for the planet (%(default)s)")
    parser.add_argument(
        "--planet-width", type=positive, default=4096, metavar="N", help="of the planet, twice its height (%(default)s)"
    )
    parser.add_argument("--planet", type=image_path, metavar="FILE", help="write the whole planet there, too")
    parser.add_argument("--size", type=positive, metavar="N", help="of the small picture (the model's training size)")
    parser.add_argument("--times", type=positive, default=3, metavar="N", help="how much larger (%(default)s)")
    parser.add_argument("--steps", type=positive, default=12, metavar="N", help="denoising steps (%(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=3.0, metavar="X", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("pictures"), help="folder to write to (%(default)s)"
    )
    return parser


def main() -> None:
    options = build_parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    painter = Painter(options)
    pages = {
        "planet": lambda: planet(options),
        "sizes": lambda: sheet(sizes(painter), 3, painter.large // 2),
        "attention": lambda: sheet(attention(painter), 5, painter.large * 3 // 8),
        "seams": lambda: sheet(seams(painter), 4, painter.small),
    }
    for name in options.sheets:
        save(pages[name](), options.out / f"{name}.jpg")


if __name__ == "__main__":
    run(main)
