"""What the examples share: the pipeline they start from, the options of the patch, checks of the command line."""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from diffusers import AutoPipelineForText2Image
from diffusers.utils import is_accelerate_available
from PIL import Image

from demo_training.captions import scale_words
from largerespatch import LargeResPatch

DEMO_MODEL = Path(__file__).with_name("demo_model")
DEMO_TRANSFORMER = Path(__file__).with_name("demo_transformer")
HUB_NAME = re.compile(r"[\w.-]*\w/[\w.-]+")  # owner/name, and no path
PROMPT = "green and desert continents by a deep sea, some ice, mountains, bays and islands"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; how to use it is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def run(main: Callable[[], None]) -> None:
    """`main`, ended by Ctrl-C in one line and with the exit status that shells give it."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; what was not finished is not written", file=sys.stderr)
        sys.exit(130)


class Words(NamedTuple):
    """A prompt, and what goes before it at a size: how near everything is then seen."""

    prompt: str
    scale: Callable[[int], str] | None = None

    def at(self, width: int) -> str:
        return f"{self.scale(width)}, {self.prompt}" if self.scale else self.prompt


def load_pipeline(model: str | None = None, parser: argparse.ArgumentParser | None = None) -> Any:
    """`model` is a folder or a name on the hub; without one, the demo model that comes with the examples.

    In half precision on CUDA, in single precision on a CPU. What cannot be loaded is an error of `parser`, if given.
    """
    cuda = torch.cuda.is_available()
    dtype = torch.float16 if cuda else torch.float32
    # The default asks for accelerate and complains where it is missing.
    sparing = {"low_cpu_mem_usage": is_accelerate_available()}
    if parser is not None and model is not None and not Path(model).is_dir() and not HUB_NAME.fullmatch(model):
        parser.error(f"--model: there is no folder {model!r}, and a name on the hub has the form owner/name")
    try:
        pipe = AutoPipelineForText2Image.from_pretrained(model or DEMO_MODEL, dtype=dtype, **sparing)
    except (OSError, ValueError) as error:
        if parser is None:
            raise
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        parser.error(f"--model: there is no pipeline {model!r} to load: {why}")
    return pipe.to("cuda") if cuda else pipe


def load_transformer(transformer: Path = DEMO_TRANSFORMER, model: Path = DEMO_MODEL) -> Any:
    """The demo transformer with the VAE and the text encoder of the demo model, to be called like a pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    from demo_training.transformer import Flux

    pipe = load_pipeline(str(model))
    weights = FluxTransformer2DModel.from_pretrained(transformer, subfolder="transformer", dtype=pipe.dtype)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(transformer, subfolder="scheduler")
    return Flux(pipe.vae, weights.to(pipe.device), pipe.text_encoder, pipe.tokenizer, scheduler)


def words_for(options: argparse.Namespace) -> Words:
    """The prompt, with the words for the scale in front where the model knows them."""
    return Words(options.prompt, scale_words if options.model is None else None)


def training_size(pipe: Any) -> int:
    """The side in sample pixels of the images that the pipeline was trained on."""
    return _trained_latent_side(pipe) * pipe.vae_scale_factor


def _trained_latent_side(pipe: Any) -> int:
    side = pipe.unet.config.sample_size
    return side if isinstance(side, int) else min(side)


def add_picture_options(parser: argparse.ArgumentParser, width: int, height: int) -> None:
    """What to paint, by which model, how large if it is not said, and where to write it."""
    parser.add_argument("--prompt", default=PROMPT, help="what to paint (%(default)s)")
    parser.add_argument(
        "--model", metavar="NAME_OR_PATH", help="a checkpoint on the hub or a folder in diffusers' format"
    )
    parser.add_argument("--width", type=positive, default=width, metavar="N", help="in sample pixels (%(default)s)")
    parser.add_argument("--height", type=positive, default=height, metavar="N", help="in sample pixels (%(default)s)")
    parser.add_argument("--out", type=image_path, default="planet.png", help="the file to write (%(default)s)")


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
        metavar="N",
        help="tokens outside its block that a block attends to as well, 0 for none (what suits the model)",
    )
    group.add_argument("--attn-shape", choices=("brick", "tile"), default="brick", help="(%(default)s)")
    group.add_argument("--ff-chunk-size", type=positive, default=4096, metavar="N", help="in tokens (%(default)s)")
    group.add_argument("--vae-chunk", type=positive, default=64, metavar="N", help="in latent pixels (%(default)s)")
    group.add_argument(
        "--vae-mode",
        choices=("two-pass", "exact"),
        default="exact",
        help="two-pass takes less memory and more time (%(default)s, in strips of --vae-chunk rows)",
    )
    group.add_argument(
        "--vae-attn",
        choices=("blocked", "full"),
        default="blocked",
        help="of the VAE's mid block: full costs as the square of the image (%(default)s)",
    )
    group.add_argument(
        "--padding-mode",
        choices=("constant", "circular", "reflect", "replicate"),
        default="circular",
        help="beyond the edge of the image; circular makes a picture that continues at its opposite edge (%(default)s)",
    )


def patch_builder(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Callable[..., LargeResPatch]:
    """Builds the patch that the command line asks for, for a pipeline and a width and height.

    What the patch refuses ends the program as any wrong option does.
    """

    def build(pipe: Any, width: int, height: int) -> LargeResPatch:
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
                vae_attn=options.vae_attn,
            )
        except ValueError as error:
            parser.error(str(error))

    return build


def unpatched(pipe: Any, width: int, height: int) -> AbstractContextManager[None]:
    """In the place of a patch, none."""
    return nullcontext()


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
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must not be a folder; got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must lie in an existing folder; got {text!r}")
    try:  # permissions do not tell of a disk that is read-only
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"must lie in a folder that can be written; {path.parent}: {error.strerror}"
        ) from None
    return path


def beside(path: Path, what: str) -> Path:
    """``out.png`` as ``out-what.png``."""
    return path.with_stem(f"{path.stem}-{what}")


def save(image: Image.Image, path: Path, **settings: Any) -> None:
    """Write the whole picture or nothing under this name."""
    part = beside(path, f"part-{os.getpid()}")
    try:
        image.save(part, **settings)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    print(f"written to {path}")
