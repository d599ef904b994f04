"""Train the demo model in `examples/demo_model` from freely licensed photographs.

Stages, each of which resumes where an interrupted run left it: fetch the photographs (four Debian packages, with
apt-get and dpkg-deb, and the sample pictures of scikit-image and scikit-learn where those are installed), train the
VAE, train its decoder alone, train U-Net and text encoder on the VAE's latents. Then the pipeline folder is written,
with half-precision weights. Photographs are used where `captions.json` describes them; those it lists as held out are
never trained on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from demo_training.data import fetch_packages, load_photos, sample_image_folders
from demo_training.decoder import train_decoder
from demo_training.export import export
from demo_training.text import fetch_vocabulary, write_tokenizer
from demo_training.text_to_image import TextToImage, prepare_latents, train_text_to_image
from demo_training.vae import train_vae


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with the unpacked packages; fetched where not given")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("demo_training_work"),
        help="folder for checkpoints, logs and sample sheets; training resumes from what it holds (%(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).with_name("demo_model"),
        help="pipeline folder to write (%(default)s)",
    )
    parser.add_argument("--vae-steps", type=int, default=600, help="optimizer steps of the VAE (%(default)s)")
    parser.add_argument("--decoder-steps", type=int, default=800, help="of the decoder alone, then (%(default)s)")
    parser.add_argument("--unet-steps", type=int, default=940, help="optimizer steps of the U-Net (%(default)s)")
    parser.add_argument("--unet-batch", type=int, default=8, help="latent crops in a step of the U-Net (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, crops and noise (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice where not given")
    parser.add_argument("--until", choices=("vae", "decoder", "all"), default="all", help="where to stop (%(default)s)")
    parser.add_argument(
        "--export-now",
        action="store_true",
        help="write the folder from the checkpoints as they are, without training any further",
    )
    return parser.parse_args()


def last_row(log: Path) -> dict[str, float]:
    return json.loads(log.read_text(encoding="utf-8").splitlines()[-1]) if log.exists() else {}


def main() -> None:
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    folders = [options.images or fetch_packages(work / "photographs"), *sample_image_folders()]
    photos = load_photos(folders, ("photos", "drawings"))
    held_out = load_photos(folders, ("held_out",))
    vocabulary = fetch_vocabulary(work)

    shared = {"seed": options.seed, "device": options.device}
    vae_steps = 0 if options.export_now else options.vae_steps
    vae, vae_seconds = train_vae(photos, held_out, work, steps=vae_steps, **shared)
    if options.until == "vae":
        return
    decoder_steps = 0 if options.export_now else options.decoder_steps
    vae, decoder_seconds = train_decoder(vae, photos, held_out, work, steps=decoder_steps, **shared)
    if options.until == "decoder":
        return
    both, both_seconds = TextToImage(), 0.0
    if not options.export_now or (work / "text_to_image.pt").exists():
        both, both_seconds = train_text_to_image(
            prepare_latents(vae, photos, work),
            vae,
            write_tokenizer(vocabulary, work / "tokenizer"),
            work,
            steps=0 if options.export_now else options.unet_steps,
            batch=options.unet_batch,
            **shared,
        )
    training = {
        **shared,
        "photographs": len(photos),
        "vae": {"seconds": round(vae_seconds), "last": last_row(work / "vae.jsonl")},
        "decoder": {"seconds": round(decoder_seconds), "last": last_row(work / "decoder.jsonl")},
        "text_to_image": {"seconds": round(both_seconds), "last": last_row(work / "text_to_image.jsonl")},
    }
    size = export(vae, both, vocabulary, options.out, training)
    print(f"{options.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
