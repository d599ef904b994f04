"""The demo model's figures: how well its VAE restores photographs it has never seen, and a blind test of its prompts.

PSNR is that of the central 512x512 sample pixels of each held-out photograph, at its native size and reduced to a half
and a quarter, encoded to the mean of the latent distribution and decoded, untiled. The blind test writes pictures with
five captions each, in a hidden order, for a person to match; the answers go into a file beside them.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image, ImageDraw

from _common import add_common_options, dtype_of, environment, positive, print_table, write_json

EXAMPLES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(EXAMPLES))

from demo_training.data import CAPTIONS, SCALES, fetch_packages, load_photos  # noqa: E402  (by the line above)
from demo_training.vae import held_out_psnr  # noqa: E402

CANDIDATES = 5
COLUMNS = 4
LINE = 16


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "demo_model", help="pipeline folder (%(default)s)")
    parser.add_argument("--images", type=Path, help="folder with the unpacked photo packages; fetched where not given")
    parser.add_argument("--work", type=Path, default=Path("demo_training_work"), help="where to fetch (%(default)s)")
    parser.add_argument("--blind", type=Path, metavar="FOLDER", help="write a blind test there instead of measuring")
    parser.add_argument("--samples", type=positive, default=20, help="pictures in the blind test (%(default)s)")
    parser.add_argument("--steps", type=positive, default=20, help="denoising steps in the blind test (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the blind test (%(default)s)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu measures in float32, cuda in float16 (%(default)s)",
    )
    add_common_options(parser, "demo_model")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> None:
    vae = AutoencoderKL.from_pretrained(options.model, subfolder="vae", dtype=dtype_of(options.device))
    vae.to(options.device).eval()
    photos = load_photos([options.images or fetch_packages(options.work / "photographs")], ("held_out",))
    figures = held_out_psnr(vae, photos)
    table = {photo.name: {str(scale): figures[f"{photo.name} 1/{scale}"] for scale in SCALES} for photo in photos}
    headings = ["PSNR in dB, 512x512", *(f"1/{scale}" if scale > 1 else "native" for scale in SCALES)]
    print_table(headings, [[name, *(f"{row[str(scale)]:.2f}" for scale in SCALES)] for name, row in table.items()])
    means = {str(scale): statistics.mean(row[str(scale)] for row in table.values()) for scale in SCALES}
    size = sum(path.stat().st_size for path in options.model.rglob("*") if path.is_file())
    print(f"scaling factor {vae.config.scaling_factor}, folder {size / 1e6:.1f} MB")
    report = {
        "question": "How well does the demo model's VAE restore photographs it has never seen?",
        "psnr_db_by_scale_divisor": {**table, "mean": means},
        "scaling_factor": vae.config.scaling_factor,
        "folder_bytes": size,
        "note": options.note,
        **environment(options.device),
    }
    write_json(options.out, report)


def blind_test(options: argparse.Namespace) -> None:
    """Write `quiz.png` and `answers.json`."""
    pipeline = StableDiffusionPipeline.from_pretrained(options.model, dtype=dtype_of(options.device))
    pipeline.to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    captions = list(json.loads(CAPTIONS.read_text(encoding="utf-8"))["photos"].values())
    draw = random.Random(options.seed)
    pictures, questions, answers = [], [], []
    start = time.perf_counter()
    for truth in draw.sample(captions, options.samples):
        offered = [truth, *draw.sample([caption for caption in captions if caption != truth], CANDIDATES - 1)]
        draw.shuffle(offered)
        generator = torch.Generator().manual_seed(draw.randrange(2**31))
        result = pipeline(truth, num_inference_steps=options.steps, guidance_scale=4.0, generator=generator)
        pictures.append(result.images[0])
        questions.append(offered)
        answers.append("abcde"[offered.index(truth)])
    options.blind.mkdir(parents=True, exist_ok=True)
    quiz_sheet(pictures, questions).save(options.blind / "quiz.png")
    write_json(options.blind / "answers.json", {"seed": options.seed, "answers": answers})
    print(f"{options.blind / 'quiz.png'}: {len(answers)} pictures in {time.perf_counter() - start:.0f} s")


def quiz_sheet(pictures: list[Image.Image], questions: list[list[str]]) -> Image.Image:
    """Numbered pictures with their lettered captions below."""
    width, height = max(pictures[0].width, 520), pictures[0].height + LINE * (CANDIDATES + 2)
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, offered) in enumerate(zip(pictures, questions, strict=True)):
        left, top = i % COLUMNS * width, i // COLUMNS * height
        sheet.paste(picture, (left, top))
        lines = [f"{i + 1}.", *(f"{letter}) {caption}" for letter, caption in zip("abcde", offered, strict=True))]
        for j, line in enumerate(lines):
            pen.text((left, top + picture.height + LINE * j), line[:84], fill="black")
    return sheet


if __name__ == "__main__":
    arguments = parse_arguments()
    blind_test(arguments) if arguments.blind else measure(arguments)
