"""What the examples share: the pipeline they start from, the options of the patch, checks of the command line."""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForText2Image
from diffusers.utils import is_accelerate_available
from PIL import Image

from largerespatch import LargeResPatch

DEMO_MODEL = Path(__file__).with_name("demo_model")
PROMPT = "fallen maple leaves on the ground, golden autumn light"


def load_pipeline(model: str | None = None) -> Any:
    """`model` is a folder or a name on the hub; without one, the demo model that comes with the examples.

    In half precision on CUDA, in single precision on a CPU.
    """
    cuda = torch.cuda.is_available()
    dtype = torch.float16 if cuda else torch.float32
    # The default asks for accelerate and complains where it is missing.
    sparing = {"low_cpu_mem_usage": is_accelerate_available()}
    pipe = AutoPipelineForText2Image.from_pretrained(model or DEMO_MODEL, dtype=dtype, **sparing)
    return pipe.to("cuda") if cuda else pipe


def training_size(pipe: Any) -> int:
    """The side in sample pixels of the images that the pipeline was trained on."""
    return _trained_latent_side(pipe) * pipe.vae_scale_factor


def _trained_latent_side(pipe: Any) -> int:
    side = pipe.unet.config.sample_size
    return side if isinstance(side, int) else min(side)


def add_patch_options(parser: argparse.ArgumentParser) -> None:
    """The options of `LargeResPatch`, for tiles as wide as they are high."""
    group = parser.add_argument_group("patch")
    group.add_argument(
        "--attn-slice",
        type=positive,
        metavar="N",
        help="attn_slice_x and attn_slice_y, in tokens (64, or the training size of a model trained on less: "
        "attention then spans what it has learned to span)",
    )
    group.add_argument(
        "--attn-full-tokens",
        type=positive,
        metavar="N",
        help="maps of at most so many tokens are attended whole (four times the square of --attn-slice)",
    )
    group.add_argument(
        "--attn-context",
        type=whole,
        default=512,
        metavar="N",
        help="tokens outside its block that a block attends to as well, 0 for none (%(default)s)",
    )
    group.add_argument("--attn-shape", choices=("brick", "tile"), default="brick", help="(%(default)s)")
    group.add_argument("--ff-chunk-size", type=positive, default=4096, metavar="N", help="in tokens (%(default)s)")
    group.add_argument("--vae-chunk", type=positive, default=64, metavar="N", help="in latent pixels (%(default)s)")
    group.add_argument(
        "--vae-mode",
        choices=("two-pass", "exact"),
        default="two-pass",
        help="exact takes more memory, and strips of --vae-chunk rows (%(default)s)",
    )
    group.add_argument(
        "--padding-mode",
        choices=("constant", "circular", "reflect", "replicate"),
        default="constant",
        help="beyond the edge of the image; circular makes a picture that continues at its opposite edge (%(default)s)",
    )


def build_patch(
    parser: argparse.ArgumentParser, pipe: Any, width: int, height: int, options: argparse.Namespace
) -> LargeResPatch:
    """The patch that the command line asks for; what it refuses ends the program as any wrong option does."""
    attn_slice = options.attn_slice or min(64, _trained_latent_side(pipe))
    try:
        return LargeResPatch(
            pipe,
            width,
            height,
            attn_slice_x=attn_slice,
            attn_slice_y=attn_slice,
            attn_shape=options.attn_shape,
            ff_chunk_size=options.ff_chunk_size,
            padding_mode=options.padding_mode,
            vae_chunk_size_x=options.vae_chunk,
            vae_chunk_size_y=options.vae_chunk,
            attn_full_tokens=options.attn_full_tokens or 4 * attn_slice**2,
            attn_context=options.attn_context,
            vae_mode=options.vae_mode,
        )
    except ValueError as error:
        parser.error(str(error))


def positive(text: str) -> int:
    """A whole number of at least 1, as an argparse type."""
    return whole(text, least=1)


def whole(text: str, least: int = 0) -> int:
    """A whole number of at least `least`, as an argparse type."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}; got {text!r}")
    return int(text)


def image_path(text: str) -> Path:
    """A path that a picture can be saved to, as an argparse type: found out before hours are spent on the picture."""
    path = Path(text)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise argparse.ArgumentTypeError(f"must end in the suffix of an image, as in .png; got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must lie in an existing folder; got {text!r}")
    return path


def beside(path: Path, what: str) -> Path:
    """``out.png`` as ``out-what.png``."""
    return path.with_stem(f"{path.stem}-{what}")
