"""Train the demo models by the clock on an accelerator: VAE, then latents, then both denoisers beside each other.

A first run trains the VAE and begins with the denoisers; a later one goes on from what it wrote (--resume) with the
denoisers alone. All weights that come back are averaged ones in half precision. `--export` writes them into the
examples' folders.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path
from typing import Any

# A dozen processes share the CPU; threads that wait for each other there would slow all of them down.
os.environ.setdefault("OMP_NUM_THREADS", "4")

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
KINDS = ("unet", "transformer")
SHEET_SECONDS = 14  # kept of a run for pictures and the last files
REPORT_SECONDS = 15


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=200, help="of this run, all in all (%(default)s)")
    parser.add_argument("--vae-seconds", type=float, help="of them for the VAE (90, or none with --resume)")
    parser.add_argument("--vae-rate", type=float, default=8e-4, help="peak learning rate of the VAE (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and report.zip")
    parser.add_argument("--resume", type=Path, help="folder that an earlier run wrote")
    parser.add_argument("--begin", type=float, help="share of the denoisers' training already done (as in --resume)")
    parser.add_argument("--until", type=float, default=0.3, help="share that is done after this run (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="which denoisers (both)")
    parser.add_argument("--fresh", action="store_true", help="start denoisers from random weights")
    parser.add_argument("--maps", type=Path, default=HERE / "maps", help="(%(default)s)")
    parser.add_argument(
        "--models", type=Path, default=HERE, help="folder of demo_model, demo_transformer (%(default)s)"
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the usual windows and crops (%(default)s)")
    parser.add_argument("--workers", type=int, default=10, help="processes that write captions (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny batches, to try the script out on a CPU")
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="write the weights of --out into the models there"
    )
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--single", action="store_true", help="train denoisers in single precision")
    parser.add_argument("--start", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def weights_of(options: argparse.Namespace, kind: str) -> Path:
    """Where a part begins: what an earlier run wrote, else what is shipped."""
    if options.resume and (options.resume / f"{kind}.safetensors").exists():
        return options.resume / f"{kind}.safetensors"
    folder = {"vae": "demo_model/vae", "unet": "demo_model/unet", "transformer": "demo_transformer/transformer"}[kind]
    return options.models / folder / "diffusion_pytorch_model.safetensors"


def load_vae(path: Path, models: Path) -> Any:
    from demo_training.by_clock import load_weights
    from demo_training.vae import build_vae
    from diffusers import AutoencoderKL

    vae = build_vae()
    found = load_weights(vae, path)
    factor = float(
        found.get("scaling_factor", AutoencoderKL.load_config(models / "demo_model" / "vae")["scaling_factor"])
    )
    vae.register_to_config(scaling_factor=factor, shift_factor=0.0)
    return vae


def build(kind: str) -> Any:
    from demo_training.text_to_image import build_unet
    from demo_training.transformer import build_transformer

    return {"unet": build_unet, "transformer": build_transformer}[kind](64)


def load_maps(folder: Path) -> tuple[Any, Any, Any, Any]:
    """Blue Marble and, where it is there, relief without the held-out region, classes of each cell, held-out crops."""
    from demo_training.captions import classes
    from demo_training.data import load_map, sea, without_held_out, without_hole
    from demo_training.vae import held_out_crops

    blue_marble, etopo = (load_map(folder, name) for name in ("bmng.jpg", "etopo1.jpg"))
    held_out = held_out_crops(blue_marble)
    blue_marble = without_held_out(without_hole(blue_marble, sea(etopo)))
    has_relief = (folder / "shadedrelief.jpg").exists()
    relief = without_held_out(load_map(folder, "shadedrelief.jpg")) if has_relief else None
    kept = folder / "classes.png"  # takes seconds to find out
    cells = np.asarray(Image.open(kept)) if kept.exists() else classes(blue_marble, without_held_out(etopo), relief)
    return blue_marble, relief, cells, held_out


def train_vae(
    options: argparse.Namespace, vae: Any, blue_marble: Any, relief: Any, held_out: Any, log: Any, end: float
) -> Any:
    """The trained VAE; should training break off, what it last kept, so that denoisers still have their time."""
    from demo_training.by_clock import MapCrops, measure_vae, train_vae_by_clock
    from demo_training.clock import Clock
    from demo_training.data import SCALES, resized

    path = options.work / "vae_unnormalised.safetensors"
    try:
        maps = (blue_marble, blue_marble if relief is None else relief)
        crops = MapCrops(*([resized(each, scale.width) for scale in SCALES] for each in maps), options.device)
        before, shipped = measure_vae(vae.eval(), held_out, log, 0.0), copy.deepcopy(vae)
        vae.train()
        paths = [path, options.out / "vae.safetensors"]
        clock = Clock(min(log.start + options.vae_seconds, end))
        trained = train_vae_by_clock(vae, crops, held_out, paths, clock, log, options.small, options.vae_rate)
        if measure_vae(trained, held_out, log, 1.0) > before - 0.2 or options.small:
            return trained
        log(stage="vae", failed="worse than it was: what was shipped is kept")
        return shipped
    except Exception:
        (options.work / "vae.txt").write_text(traceback.format_exc(), encoding="utf-8")
        log(stage="vae", failed=traceback.format_exc())
    return load_vae(path if path.exists() else weights_of(options, "vae"), options.models).to(options.device)


def prepare(options: argparse.Namespace, log: Any, end: float) -> None:
    """Train the VAE where there is time for it, encode the windows and leave all for the workers in `work`."""
    from demo_training.by_clock import check_latents, is_normalised, measure_vae, save_weights
    from demo_training.latents import build_levels
    from demo_training.pool import WINDOWS, Captioning, draw_windows, encode_all, levels_on_device

    device, seed = options.device, options.seed
    blue_marble, relief, cells, held_out = load_maps(options.maps)
    if options.small:
        held_out = dict(list(held_out.items())[:1])
    log(stage="maps")
    planets = levels_on_device(build_levels(blue_marble, cells), device)
    rng = np.random.default_rng([seed, 7])
    groups = [draw_windows(planets, width, options.share, rng) for width in WINDOWS]
    log(stage="windows", count=sum(len(each.cells) for each in groups))
    captioning = Captioning(groups, options.share, seed, options.workers)
    log(stage="captioning")
    vae = load_vae(weights_of(options, "vae"), options.models).to(device)
    trained = options.vae_seconds > 0
    if trained:
        vae = train_vae(options, vae, blue_marble, relief, held_out, log, end)
    vae.eval().requires_grad_(False)
    pool = encode_all(vae, groups, normalise=trained or not is_normalised(weights_of(options, "vae")))
    check_latents(pool, log)
    if trained:
        measure_vae(vae, held_out, log, 1.0)  # the same again, or folding went wrong
        log(stage="vae", scaling_factor=vae.config.scaling_factor)
    save_weights(vae, options.out / "vae.safetensors", scaling_factor=vae.config.scaling_factor)
    samples, captions = captioning.result()
    log(stage="captions", count=len(captions), examples=captions[1:400:80])
    state = {
        "pool": [each.cpu() for each in (pool.values, pool.offsets, pool.heights, pool.widths)],
        "samples": {shape: [each.index, each.top, each.left, each.text] for shape, each in samples.items()},
        "captions": captions,
    }
    torch.save(state, options.work / "pool.part")
    os.replace(options.work / "pool.part", options.work / "pool.pt")
    log(stage="pool")


def worker(options: argparse.Namespace) -> None:
    """Train one denoiser: everything is made ready while the VAE still learns, then waits for the latents."""
    from demo_training.by_clock import (
        Batches,
        HalfPrecision,
        Texts,
        fast_settings,
        load_weights,
        paint_sheet,
        train_denoiser,
    )
    from demo_training.clock import Clock, Log
    from demo_training.pool import FlatPool, Samples
    from transformers import CLIPTextModel, CLIPTokenizer

    kind, device = options.worker, options.device
    log = Log(options.work / "train.log", options.start)
    fast_settings()
    HalfPrecision.on = not options.single
    torch.manual_seed(options.seed + 100 * KINDS.index(kind) + 1)
    model, found = build(kind), {}
    if not options.fresh:
        found = load_weights(model, weights_of(options, kind))
    begin = float(found.get("progress", 0)) if options.begin is None else options.begin
    tokenizer = CLIPTokenizer.from_pretrained(options.models / "demo_model" / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(options.models / "demo_model" / "text_encoder", dtype=torch.float32)
    text_encoder.eval().requires_grad_(False)
    log(stage=kind, ready=True, begin=begin, until=options.until)
    while not (options.work / "pool.pt").exists():
        if time.time() > options.end or (options.work / "failed").exists():
            raise RuntimeError("no latents came")
        time.sleep(0.1)
    model.to(device)
    if kind == "unet" and device.startswith("cuda"):
        model.to(memory_format=torch.channels_last)
    state = torch.load(options.work / "pool.pt", weights_only=True)
    pool = FlatPool(*(each.to(device) for each in state["pool"]))
    samples = {shape: Samples(*(each.to(device) for each in parts)) for shape, parts in state["samples"].items()}
    text_encoder.to(device)
    batches = Batches(pool, samples, Texts(text_encoder, tokenizer, state["captions"], device), options.small)
    clock = Clock(options.end, begin, max(begin, options.until))
    log(stage=kind, training=True, seconds=clock.end - clock.start)
    average = train_denoiser(kind, model, batches, options.out / f"{kind}.safetensors", clock, log, device)
    vae = load_vae(options.out / "vae.safetensors", options.models).to(device).eval()
    paint_sheet(kind, average, vae, text_encoder, tokenizer, options.work / f"{kind}.jpg", options.small)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.startswith("cuda") else 0.0
    log(stage=kind, done=True, memory_gb=memory)


def write_report(work: Path, out: Path) -> None:
    """Log and sheets in one file."""
    part = work / "report.zip"
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in [work / "train.log", *sorted(work.glob("*.txt")), *sorted(work.glob("*.jpg"))]:
            if path.exists():
                archive.write(path, path.name)
    shutil.copy(part, out / "report.part")
    os.replace(out / "report.part", out / "report.zip")


def start_worker(
    options: argparse.Namespace, kind: str, start: float, end: float, *more: str
) -> subprocess.Popen[bytes]:
    arguments = [*sys.argv[1:], "--work", str(options.work), "--end", str(end), "--start", str(start), *more]
    errors = (options.work / f"{kind}.txt").open("ab")  # tracebacks
    return subprocess.Popen([sys.executable, __file__, *arguments, "--worker", kind], stderr=errors)


def supervise(options: argparse.Namespace) -> None:
    from demo_training.by_clock import fast_settings
    from demo_training.clock import Log

    start = time.time()
    options.out.mkdir(parents=True, exist_ok=True)
    options.work = Path(tempfile.mkdtemp(prefix="train_gpu_"))
    if options.vae_seconds is None:
        options.vae_seconds = 0 if options.resume else 90
    log = Log(options.work / "train.log", start)
    end = start + options.seconds - SHEET_SECONDS
    log(stage="start", torch=torch.__version__, seconds=options.seconds, device=options.device, until=options.until)
    if options.resume:  # so that what comes back is whole, whatever happens
        for path in options.resume.glob("*.safetensors"):
            shutil.copyfile(path, options.out / path.name)
    workers = {kind: start_worker(options, kind, start, end) for kind in options.only}
    try:
        fast_settings()
        torch.manual_seed(options.seed)
        prepare(options, log, end)
    except BaseException:
        (options.work / "main.txt").write_text(traceback.format_exc(), encoding="utf-8")
        traceback.print_exc()
        (options.work / "failed").touch()
    if options.device.startswith("cuda"):
        torch.cuda.empty_cache()
    again = set(options.only)  # those that may be started once more
    while any(each.poll() is None for each in workers.values()):
        write_report(options.work, options.out)
        until = time.time() + REPORT_SECONDS
        while time.time() < until and any(each.poll() is None for each in workers.values()):
            time.sleep(0.2)
            for kind in [kind for kind in again if workers[kind].poll() not in (None, 0) and time.time() < end - 20]:
                log(stage=kind, again="in single precision")  # a kernel failed: the process is of no more use
                workers[kind] = start_worker(options, kind, start, end, "--single")
                again.remove(kind)
        if time.time() > start + options.seconds + 20:
            for each in workers.values():
                each.kill()
    log(stage="end", codes=[each.returncode for each in workers.values()])
    write_report(options.work, options.out)
    for path in options.work.glob("*.txt"):
        if path.stat().st_size:
            print(path.name, path.read_text(encoding="utf-8", errors="replace")[-3000:], flush=True)
    shutil.rmtree(options.work, ignore_errors=True)


def export(options: argparse.Namespace) -> None:
    """Put the weights that came back into the folders of the models."""
    from demo_training.by_clock import load_weights
    from demo_training.export import _shipped

    vae = load_vae(options.out / "vae.safetensors", options.models)
    _shipped(vae).save_pretrained(options.export / "demo_model" / "vae")
    for kind, folder in (("unet", "demo_model/unet"), ("transformer", "demo_transformer/transformer")):
        if (options.out / f"{kind}.safetensors").exists():
            model = build(kind)
            print(kind, load_weights(model, options.out / f"{kind}.safetensors"))
            _shipped(model).save_pretrained(options.export / folder)
    print("vae", vae.config.scaling_factor)


def main() -> None:
    options = parse_arguments()
    if options.export:
        export(options)
    elif options.worker:
        worker(options)
    else:
        supervise(options)


if __name__ == "__main__":
    main()
