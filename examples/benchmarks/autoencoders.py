"""Autoencoders of today: in pieces, untiled, and by their own tiling; what each takes and how near it comes.

Real architectures as their published configurations have them, with random weights. Live bytes are counted on torch's
meta device, from the shapes of the real calls; what a large picture needs with its maps on the host is the library's
own estimate. Time and the distance from the untiled result are of real runs on this machine. Where that distance is
more than rounding should be, the result in float64 says which of the two is nearer to the truth.

All of it takes the better part of an hour on one core. ``--minutes`` ends it early and ``--resume`` goes on.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderTiny,
    VQModel,
)

from _common import (
    Candidate,
    add_common_options,
    add_device_options,
    cost_on_paper,
    interleaved,
    maximum_error,
    own_tiling,
    positive,
    prepare,
    print_table,
    psnr,
    ratio_of_medians,
    vae_pipeline,
    write_json,
)
from largerespatch import LargeResPatch

MIB = 2**20
UNTILED, OWN, DEFAULT, EXACT = "untiled", "own tiling", "default", "exact"
FOUR = (128, 256, 512, 512)
DOWN, UP = ("DownEncoderBlock2D",), ("UpDecoderBlock2D",)
SIX = (128, 256, 512, 512, 1024, 1024)
RES, VIT = ("ResBlock",) * 3, ("EfficientViTBlock",) * 3

# Class and configuration, channels of the latent, sample pixels of a latent pixel.
Published = tuple[type, dict[str, Any], int, int]
AUTOENCODERS: dict[str, Published] = {
    "AutoencoderKL (SD)": (
        AutoencoderKL,
        {"block_out_channels": FOUR, "down_block_types": DOWN * 4, "up_block_types": UP * 4, "layers_per_block": 2},
        4,
        8,
    ),
    "AutoencoderKLFlux2": (AutoencoderKLFlux2, {}, 32, 8),
    "AutoencoderKLQwenImage": (AutoencoderKLQwenImage, {}, 16, 8),
    "AutoencoderKLWan": (AutoencoderKLWan, {}, 16, 8),
    "AutoencoderKLWan (2.2)": (
        AutoencoderKLWan,
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "in_channels": 12,
            "out_channels": 12,
            "is_residual": True,
            "patch_size": 2,
            "scale_factor_spatial": 16,
        },
        48,
        16,
    ),
    "AutoencoderKLHunyuanImage": (
        AutoencoderKLHunyuanImage,
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 64,
            "block_out_channels": SIX,
            "layers_per_block": 2,
            "spatial_compression_ratio": 32,
            "sample_size": 384,
        },
        64,
        32,
    ),
    "AutoencoderDC (Sana)": (
        AutoencoderDC,
        {
            "latent_channels": 32,
            "encoder_block_types": RES + VIT,
            "decoder_block_types": RES + VIT,
            "encoder_block_out_channels": SIX,
            "decoder_block_out_channels": SIX,
            "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
            "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
            "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
            "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
            "downsample_block_type": "Conv",
            "upsample_block_type": "interpolate",
        },
        32,
        32,
    ),
    "AutoencoderTiny": (AutoencoderTiny, {}, 4, 8),
    "AsymmetricAutoencoderKL": (
        AsymmetricAutoencoderKL,
        {
            "down_block_types": DOWN * 4,
            "down_block_out_channels": FOUR,
            "layers_per_down_block": 2,
            "up_block_types": UP * 4,
            "up_block_out_channels": (192, 384, 768, 768),
            "layers_per_up_block": 3,
        },
        4,
        8,
    ),
    "VQModel (Kandinsky)": (
        VQModel,
        {
            "block_out_channels": (128, 256, 256, 512),
            "down_block_types": (*DOWN * 3, "AttnDownEncoderBlock2D"),
            "up_block_types": ("AttnUpDecoderBlock2D", *UP * 3),
            "layers_per_block": 2,
            "latent_channels": 4,
            "num_vq_embeddings": 16384,
            "vq_embed_dim": 4,
            "norm_type": "spatial",
        },
        4,
        8,
    ),
}
WITH_FRAMES = (AutoencoderKLQwenImage, AutoencoderKLWan)
HALVES = ("decode", "encode")
EXACT_TO = 1e-4  # of the largest value, in float32


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoders", choices=AUTOENCODERS, nargs="+", default=list(AUTOENCODERS), help="(all)")
    parser.add_argument("--halves", choices=HALVES, nargs="+", default=list(HALVES), help="(both)")
    parser.add_argument("--size", type=positive, default=512, metavar="N", help="side of the picture (%(default)s)")
    parser.add_argument("--large", type=positive, default=4096, metavar="N", help="of the estimate (%(default)s)")
    parser.add_argument("--tile", type=positive, default=256, metavar="N", help="of sample pixels (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=1, help="(%(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep what --out has of this size, and measure the rest")
    parser.add_argument("--minutes", type=positive, metavar="N", help="begin nothing more after so long (no limit)")
    add_device_options(parser)
    add_common_options(parser, "autoencoders")
    return parser.parse_args()


def build(name: str, device: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, configuration, _, _ = AUTOENCODERS[name]
    torch.manual_seed(0)
    with torch.device(device):
        vae = kind(**configuration)
    torch.nn.Module.to(vae, dtype)
    return vae.eval().requires_grad_(False)


def source(name: str, half: str, vae: Any, size: int) -> torch.Tensor:
    """What goes in, of a picture of ``size x size`` sample pixels."""
    kind, _, channels, factor = AUTOENCODERS[name]
    frames = (1,) if kind in WITH_FRAMES else ()
    cells = (channels, *frames, size // factor, size // factor) if half == "decode" else (3, *frames, size, size)
    return torch.randn((1, *cells), device=vae.device, dtype=vae.dtype, generator=_generator(vae.device))


def run(half: str, vae: Any, given: torch.Tensor) -> torch.Tensor:
    """As pipelines call it."""
    if half == "decode":
        as_called = {"force_not_quantize": True} if isinstance(vae, VQModel) else {}
        decoded: torch.Tensor = vae.decode(given, **as_called).sample
        return decoded
    encoded = vae.encode(given)
    result: torch.Tensor = encoded.latent_dist.mode() if "latent_dist" in encoded else next(iter(encoded.values()))
    return result


def _generator(device: torch.device) -> torch.Generator | None:
    return None if device.type == "meta" else torch.Generator(device).manual_seed(0)


Ways = dict[str, Callable[[], AbstractContextManager[Any]]]


def ways(name: str, vae: Any, size: int, tile: int) -> Ways:
    factor, pipe = AUTOENCODERS[name][3], vae_pipeline(vae)
    chunk = max(tile // factor, 1)
    tiles = {"vae_chunk_size_x": chunk, "vae_chunk_size_y": chunk}
    found: Ways = {UNTILED: nullcontext}
    if hasattr(vae, "use_tiling"):
        found[OWN] = partial(own_tiling, vae, chunk, factor)
    for way, mode in ((DEFAULT, "two-pass"), (EXACT, "exact")):
        found[way] = partial(LargeResPatch, pipe, size, size, vae_mode=mode, memory_limit=None, **tiles)
    return found


def measure(name: str, half: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way."""
    vae, shadow = build(name, options.device), build(name, "meta")
    given, unseen = (source(name, half, each, options.size) for each in (vae, shadow))
    results: dict[str, torch.Tensor] = {}

    def note(way: str) -> None:
        results[way] = run(half, vae, given)

    found = ways(name, shadow, options.size, options.tile)
    peaks, failures = {}, {}
    for way, context in found.items():
        try:
            peaks[way] = cost_on_paper(Candidate(partial(run, half, shadow, unseen), context)).peak_live_bytes
        except Exception as failure:
            if way != OWN:
                raise
            failures[way] = f"{type(failure).__name__}: {failure}"
    contexts = ways(name, vae, options.size, options.tile)
    timed = {way: Candidate(partial(note, way), contexts[way]) for way in peaks}
    samples = interleaved(timed, options.rounds, options.device, options.clock)
    reference, about = results[UNTILED], {"autoencoder": name, "half": half, "size": options.size, "tile": options.tile}
    rows = [about | {"way": way, "fails": why} for way, why in failures.items()]
    for way in timed:
        if results[way].shape != reference.shape or not results[way].isfinite().all():
            rows.append(about | {"way": way, "fails": "gives another size, or what is no number"})
            continue
        row = about | {
            "way": way,
            "seconds": samples[way],
            "median_seconds": statistics.median(samples[way]),
            "time_ratio": ratio_of_medians(samples[way], samples[UNTILED]),
            "peak_live_bytes": peaks[way],
            "psnr": psnr(results[way], reference, float(reference.max() - reference.min())),
            "relative_error": relative_error(results[way], reference),
        }
        if way == EXACT and row["relative_error"] > EXACT_TO:
            truth = run(half, vae.to(torch.float64), given.double())
            row["to_float64"] = {each: relative_error(results[each], truth) for each in (UNTILED, EXACT)}
        rows.append(row)
    return rows


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest error, to the largest value."""
    return maximum_error(result, reference) / float(reference.abs().max())


def simulate(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a large picture needs beside the weights in half precision, its maps on the host."""
    pipe, size = vae_pipeline(build(name, "meta", torch.float16)), options.large
    needs = {
        mode: LargeResPatch(pipe, size, size, vae_mode=mode, vae_offload=True, memory_limit=None).estimate()
        for mode in ("two-pass", "exact")
    }
    needs[UNTILED] = LargeResPatch(pipe, size, size).estimate(patched=False)
    return {
        "autoencoder": name,
        "large": size,
        **{f"{half}_bytes": {way: getattr(each, half) for way, each in needs.items()} for half in HALVES},
    }


def kept(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that are there already."""
    if not options.resume or not options.out.exists():
        return []
    rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if (row["size"], row["tile"]) == (options.size, options.tile)]


def main() -> None:
    options = parse_arguments()
    start, rows = time.monotonic(), kept(options)
    report: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        "environment": prepare(options),
        "note": options.note,
        "rows": rows,
        "simulated": [simulate(name, options) for name in options.autoencoders],
    }
    done = {(row["autoencoder"], row["half"]) for row in rows}
    left = [pair for pair in product(options.autoencoders, options.halves) if pair not in done]
    for name, half in left:
        if options.minutes and time.monotonic() - start > 60 * options.minutes:
            break
        with torch.no_grad():
            rows += measure(name, half, options)
        done.add((name, half))
        write_json(options.out, report)
    order = list(product(AUTOENCODERS, HALVES))
    rows.sort(key=lambda row: order.index((row["autoencoder"], row["half"])))
    write_json(options.out, report)
    print_rows(report)
    missing = sum(pair not in done for pair in left)
    print(
        f"written to {options.out}; " + (f"{missing} more to measure with --resume" if missing else "nothing is left")
    )


def print_rows(report: dict[str, Any]) -> None:
    print_table(
        ("autoencoder", "half", "way", "seconds", "of untiled", "MiB", "PSNR", "relative error"),
        [[row["autoencoder"], row["half"], row["way"], *_figures(row)] for row in report["rows"]],
    )
    for row in report["simulated"]:
        for half in HALVES:
            needs = ", ".join(f"{way} {size / 2**30:.2f} GiB" for way, size in row[f"{half}_bytes"].items())
            print(f"{row['autoencoder']}, {half}, {row['large']}²: {needs}")


def _figures(row: dict[str, Any]) -> list[str]:
    if "fails" in row:
        return ["fails", "", "", "", ""]
    return [
        f"{row['median_seconds']:.1f}",
        f"{row['time_ratio']:.2f}",
        f"{row['peak_live_bytes'] / MIB:.0f}",
        "" if row["psnr"] is None else f"{row['psnr']:.0f} dB",  # without end, as it was written
        f"{row['relative_error']:.0e}",
    ]


if __name__ == "__main__":
    main()
