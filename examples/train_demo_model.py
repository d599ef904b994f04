"""Train the demo models in `examples/demo_model` and `examples/demo_transformer` from maps of the Earth.

Stages, each of which resumes where an interrupted run left it: fetch the maps and CLIP's vocabulary with pip, train the
VAE (in the last third of its steps its decoder alone), encode windows of the maps, train the text encoder, the
transformer and the U-Net on them. Then the folders are written, with half-precision weights. Longitudes 110 to 180 E
from 50 S to the equator are never trained on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from demo_training.captions import classes
from demo_training.data import SCALES, fetch_maps, load_map, resized, sea, without_held_out, without_hole
from demo_training.export import export_pipeline, export_transformer
from demo_training.latents import build_levels, prepare_latents
from demo_training.text import fetch_vocabulary, train_text_encoder, write_tokenizer
from demo_training.text_to_image import train_unet
from demo_training.transformer import train_transformer
from demo_training.vae import held_out_crops, train_vae

STAGES = ("vae", "transformer", "unet", "export")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=Path, help="folder with the maps; fetched where not given")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("demo_training_work"),
        help="folder for checkpoints, logs and sample sheets; training resumes from what it holds (%(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder to write both models into (%(default)s)"
    )
    parser.add_argument("--vae-steps", type=int, default=1800, help="optimizer steps of the VAE (%(default)s)")
    parser.add_argument("--transformer-steps", type=int, default=1400, help="of the transformer (%(default)s)")
    parser.add_argument("--unet-steps", type=int, default=1050, help="of the U-Net (%(default)s)")
    parser.add_argument("--windows", type=float, default=1.0, help="share of the usual number (%(default)s)")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=STAGES,
        help="what to do; the others' parts are taken as their checkpoints hold them (all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, crops and noise (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice where not given")
    return parser.parse_args()


def last_row(log: Path) -> dict[str, float]:
    return json.loads(log.read_text(encoding="utf-8").splitlines()[-1]) if log.exists() else {}


def main() -> None:
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    maps = options.maps or fetch_maps(work / "maps")
    blue_marble, etopo, relief = (load_map(maps, name) for name in ("bmng.jpg", "etopo1.jpg", "shadedrelief.jpg"))
    held_out = held_out_crops(blue_marble)
    blue_marble = without_held_out(without_hole(blue_marble, sea(etopo)))
    etopo, relief = without_held_out(etopo), without_held_out(relief)

    def steps(stage: str) -> int:
        return getattr(options, f"{stage}_steps") if stage in options.stages else 0

    shared = {"seed": options.seed, "device": options.device}
    pyramids = [[resized(each, scale.width) for scale in SCALES] for each in (blue_marble, relief)]
    vae, vae_seconds = train_vae(*pyramids, held_out, work, steps=steps("vae"), **shared)
    if set(options.stages) == {"vae"}:
        return
    levels = build_levels(blue_marble, classes(blue_marble, etopo, relief))
    windows = prepare_latents(vae, levels, work, share=options.windows, seed=options.seed)
    tokenizer = write_tokenizer(fetch_vocabulary(work), work / "tokenizer")
    text_encoder = train_text_encoder(windows, tokenizer, work / "text_encoder.pt", seed=options.seed)
    text_encoder.to(options.device)
    parts: dict[str, Any] = {}
    seconds = {"vae": vae_seconds}
    for stage, train in (("transformer", train_transformer), ("unet", train_unet)):
        if stage in options.stages or "export" in options.stages:
            parts[stage], seconds[stage] = train(
                windows, vae, text_encoder, tokenizer, work, steps=steps(stage), **shared
            )
    if "export" not in options.stages:
        return
    record = {
        **shared,
        "windows": len(windows),
        **{
            stage: {"seconds": round(spent), "last": last_row(work / f"{stage}.jsonl")}
            for stage, spent in seconds.items()
        },
    }
    vocabulary = fetch_vocabulary(work)
    for name, size in (
        (
            "demo_model",
            export_pipeline(vae, parts["unet"], text_encoder, vocabulary, options.out / "demo_model", record),
        ),
        ("demo_transformer", export_transformer(parts["transformer"], options.out / "demo_transformer", record)),
    ):
        print(f"{options.out / name}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
