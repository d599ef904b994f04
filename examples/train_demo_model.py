"""Train the demo models in `examples/demo_model` and `examples/demo_transformer` from maps of the Earth.

Stages: fetch the maps and CLIP's vocabulary with pip, train the VAE, encode windows of the maps and caption crops of
them, train the text encoder, the transformer and the U-Net, write the folders with half-precision weights. Trainings
take as many steps as the device makes in the minutes given, and go on where an interrupted run left them. On a CPU
crops per step are fewer; all else is the same. Longitudes 110 to 180 E from 50 S to the equator are never trained on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from demo_training.captions import classes
from demo_training.data import fetch_maps, load_map, sea, without_held_out, without_hole
from demo_training.denoiser import Batches, paint_sheet, train_denoiser
from demo_training.export import export_pipeline, export_transformer
from demo_training.planets import build_levels
from demo_training.pool import TrainingSet, prepare_training_set
from demo_training.text import fetch_vocabulary, train_text_encoder, write_tokenizer
from demo_training.vae import MapCrops, held_out_crops, train_vae

STAGES = ("vae", "latents", "transformer", "unet", "export")
# What is usual on a kind of device.
USUAL = {
    "cuda": {"vae_minutes": 3, "transformer_minutes": 4, "unet_minutes": 4, "batch_share": 1, "windows": 1},
    "cpu": {"vae_minutes": 60, "transformer_minutes": 90, "unet_minutes": 90, "batch_share": 1 / 32, "windows": 0.1},
}


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
    for stage in ("vae", "transformer", "unet"):
        gpu, cpu = (USUAL[kind][f"{stage}_minutes"] for kind in ("cuda", "cpu"))
        text = f"of its training, all runs together ({gpu:g} on a GPU, {cpu:g} on a CPU)"
        parser.add_argument(f"--{stage}-minutes", type=float, help=text)
    parser.add_argument(
        "--vae-from", type=Path, metavar="FOLDER", help="a VAE to begin with (the best linear one, set and not learned)"
    )
    parser.add_argument(
        "--keep-latents",
        action="store_true",
        help="train it further with its latents kept where they are, so that denoisers trained on them need not be",
    )
    parser.add_argument(
        "--batch-share",
        type=float,
        help="of the crops per step, 256 where they are small (1 on a GPU, 1/32 on a CPU)",
    )
    parser.add_argument("--windows", type=float, help="share of the usual number (1 on a GPU, 0.1 on a CPU)")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=STAGES,
        help="what to do; the others' parts are taken as their checkpoints hold them (all). "
        "Once there are latents, two processes can train the denoisers beside each other",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, crops and noise (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice where not given")
    options = parser.parse_args()
    if options.keep_latents and not options.vae_from:
        parser.error("--keep-latents needs a VAE that has some: --vae-from FOLDER")
    for name, usual in USUAL["cpu" if options.device == "cpu" else "cuda"].items():
        if getattr(options, name) is None:
            setattr(options, name, usual)
    return options


def load_maps(folder: Path) -> dict[str, Any]:
    """Blue Marble and relief without the held-out region, the classes of each cell, and the crops held out."""
    blue_marble, etopo, relief = (load_map(folder, name) for name in ("bmng.jpg", "etopo1.jpg", "shadedrelief.jpg"))
    held_out = held_out_crops(blue_marble)
    blue_marble = without_held_out(without_hole(blue_marble, sea(etopo)))
    etopo, relief = without_held_out(etopo), without_held_out(relief)
    cells = classes(blue_marble, etopo, relief)
    return {"blue_marble": blue_marble, "relief": relief, "cells": cells, "held_out": held_out}


def fast_settings() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass has failed


def last_row(log: Path) -> dict[str, float]:
    return json.loads(log.read_text(encoding="utf-8").splitlines()[-1]) if log.exists() else {}


def record_of(options: argparse.Namespace, training_set: TrainingSet) -> dict[str, Any]:
    """What the training was, for the folders of the models."""
    cuda = options.device.startswith("cuda")
    return {
        "seed": options.seed,
        "device": torch.cuda.get_device_name(options.device) if cuda else options.device,
        "windows": sum(len(group.cells) for group in training_set.groups),
        "captions": len(training_set.captions),
        **{stage: last_row(options.work / f"{stage}.jsonl") for stage in ("vae", "unet", "transformer")},
    }


def main() -> None:
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device.startswith("cuda"):
        fast_settings()
    work, device, seed = options.work, options.device, options.seed
    work.mkdir(parents=True, exist_ok=True)
    maps = load_maps(options.maps or fetch_maps(work / "maps"))

    def seconds(stage: str) -> float:
        return 60 * getattr(options, f"{stage}_minutes") if stage in options.stages else 0

    crops = MapCrops(maps["blue_marble"], maps["relief"], device)
    vae = train_vae(
        crops,
        maps["held_out"],
        work,
        seconds=seconds("vae"),
        batch_share=options.batch_share,
        begin_with=options.vae_from,
        keep_latents=options.keep_latents,
        seed=seed,
        device=device,
    )
    if set(options.stages) == {"vae"}:
        return
    levels = build_levels(maps["blue_marble"], maps["cells"], device)
    training_set = prepare_training_set(
        vae, levels, work / "latents.pt", share=options.windows, seed=seed, device=device
    )
    vocabulary = fetch_vocabulary(work)
    tokenizer = write_tokenizer(vocabulary, work / "tokenizer")
    text_encoder = train_text_encoder(
        training_set.groups, tokenizer, work / "text_encoder.pt", seed=seed, device=device
    )
    batches = Batches(training_set, text_encoder, tokenizer, options.batch_share)
    trained: dict[str, Any] = {}
    for kind in ("transformer", "unet"):
        if kind in options.stages or "export" in options.stages:
            trained[kind] = train_denoiser(kind, batches, work, seconds=seconds(kind), seed=seed, device=device)
        if kind in options.stages:
            paint_sheet(kind, trained[kind], vae, text_encoder, tokenizer, work / f"{kind}.png")
    if "export" in options.stages:
        record = record_of(options, training_set)
        pipeline, transformer = (options.out / name for name in ("demo_model", "demo_transformer"))
        size = export_pipeline(vae, trained["unet"], text_encoder, vocabulary, pipeline, record)
        print(f"{pipeline}: {size / 1e6:.1f} MB")
        size = export_transformer(trained["transformer"], transformer, record)
        print(f"{transformer}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
