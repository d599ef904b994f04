"""The demo model's figures: how well its VAE restores maps that it has never seen, and a blind test of its prompts.

Without options this prints what was measured, from the JSON that comes with the examples; `--measure` measures anew.
PSNR is that of parts of the held-out region, 512x512 sample pixels of the map at its native size (512x368 at a half of
it), encoded to the mean of the latent distribution and decoded, untiled.

The blind test writes pictures with five captions each, in a hidden order, for somebody to match; the answers go into a
file beside them. Then `--blind FOLDER --answers bacd...` counts the right ones and notes them.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image, ImageDraw

from _common import RESULTS, add_common_options, dtype_of, environment, positive, print_table, write_json

EXAMPLES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(EXAMPLES))

from demo_training.captions import PROMPTS  # noqa: E402  (by the line above)
from demo_training.data import fetch_maps, load_map  # noqa: E402
from demo_training.vae import branches_silent, held_out_crops, held_out_psnr  # noqa: E402

CANDIDATES = 5
COLUMNS = 4
LINE = 16
LETTERS = "abcde"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "demo_model", help="pipeline folder (%(default)s)")
    parser.add_argument("--measure", action="store_true", help="measure the PSNR anew")
    parser.add_argument(
        "--maps", type=Path, default=Path("demo_training_work/maps"), help="where the maps are, or go (%(default)s)"
    )
    parser.add_argument("--blind", type=Path, metavar="FOLDER", help="write a blind test there")
    parser.add_argument("--answers", metavar="LETTERS", help="grade these answers to the blind test in --blind FOLDER")
    parser.add_argument("--by", default="", help="who answered, and knowing what; noted with the answers")
    parser.add_argument("--samples", type=positive, default=20, help="pictures in the blind test (%(default)s)")
    parser.add_argument("--size", type=positive, default=256, help="of them, in sample pixels (%(default)s)")
    parser.add_argument("--steps", type=positive, default=20, help="denoising steps in the blind test (%(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="in the blind test (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the blind test (%(default)s)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu measures in float32, cuda in float16 (%(default)s)",
    )
    add_common_options(parser, "demo_model")
    options = parser.parse_args()
    if options.answers and not options.blind:
        parser.error("--answers needs the folder of the blind test: --blind FOLDER")
    return options


def committed(path: Path) -> dict[str, Any]:
    source = path if path.exists() else RESULTS / "demo_model.json"
    return json.loads(source.read_text(encoding="utf-8"))


def report(figures: dict[str, Any]) -> None:
    psnr, silent = figures["psnr_db"], figures["psnr_db_without_residual_branches"]
    rows = [[name, f"{value:.2f}", f"{silent[name]:.2f}" if name in silent else ""] for name, value in psnr.items()]
    print_table(["PSNR in dB, held-out region", "", "without residual branches"], rows)
    print(f"scaling factor {figures['scaling_factor']}, folder {figures['folder_bytes'] / 1e6:.1f} MB")
    if "blind_test" in figures:
        blind = figures["blind_test"]
        print(f"blind test: {blind['right']} of {blind['pictures']} right (chance: 1 in {CANDIDATES}); {blind['by']}")


def with_means(table: dict[str, float]) -> dict[str, float]:
    """The figures of all crops, and of each size their mean."""
    kinds = {kind: [value for name, value in table.items() if name.startswith(kind)] for kind in ("native", "1/2")}
    return table | {f"mean, {kind}": statistics.fmean(values) for kind, values in kinds.items()}


def measure(options: argparse.Namespace) -> None:
    vae = AutoencoderKL.from_pretrained(options.model, subfolder="vae", dtype=dtype_of(options.device))
    vae.to(options.device).eval()
    crops = held_out_crops(load_map(fetch_maps(options.maps), "bmng.jpg"))
    figures = {
        "question": "How well does the demo model's VAE restore maps of a region that it has never seen?",
        "psnr_db": with_means(held_out_psnr(vae, crops)),
    }
    with branches_silent(vae):
        figures["psnr_db_without_residual_branches"] = with_means(held_out_psnr(vae, crops))
    figures |= {
        "scaling_factor": vae.config.scaling_factor,
        "folder_bytes": sum(path.stat().st_size for path in options.model.rglob("*") if path.is_file()),
        "note": options.note,
        **environment(options.device),
    }
    if options.out.exists() and "blind_test" in (before := committed(options.out)):
        figures["blind_test"] = before["blind_test"]
    write_json(options.out, figures)


def blind_test(options: argparse.Namespace) -> None:
    """Write `quiz.png` and `answers.json`."""
    pipeline = StableDiffusionPipeline.from_pretrained(options.model, dtype=dtype_of(options.device))
    pipeline.to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    draw = random.Random(options.seed)
    pictures, questions, answers = [], [], []
    start = time.perf_counter()
    for truth in draw.sample(PROMPTS, options.samples):
        offered = [truth, *draw.sample([other for other in PROMPTS if other != truth], CANDIDATES - 1)]
        draw.shuffle(offered)
        result = pipeline(
            truth,
            width=options.size,
            height=options.size,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            generator=torch.Generator().manual_seed(draw.randrange(2**31)),
        )
        pictures.append(result.images[0])
        questions.append(offered)
        answers.append(LETTERS[offered.index(truth)])
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
        lines = [f"{i + 1}.", *(f"{letter}) {caption}" for letter, caption in zip(LETTERS, offered, strict=True))]
        for j, line in enumerate(lines):
            pen.text((left, top + picture.height + LINE * j), line, fill="black")
    return sheet


def grade(options: argparse.Namespace) -> None:
    """Count the right answers and note them in the JSON."""
    test = json.loads((options.blind / "answers.json").read_text(encoding="utf-8"))
    given = list(options.answers.lower())
    if len(given) != len(test["answers"]):
        raise SystemExit(f"--answers must be {len(test['answers'])} letters, one a picture; got {len(given)}")
    right = sum(mine == theirs for mine, theirs in zip(given, test["answers"], strict=True))
    blind = {"right": right, "pictures": len(given), "given": options.answers, "seed": test["seed"], "by": options.by}
    write_json(options.out, committed(options.out) | {"blind_test": blind})


def main() -> None:
    options = parse_arguments()
    if options.measure:
        measure(options)
    if options.blind:
        grade(options) if options.answers else blind_test(options)
    if options.measure or options.answers or not options.blind:
        report(committed(options.out))


if __name__ == "__main__":
    main()
