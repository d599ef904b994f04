"""Autoencoders of today, decoding: in pieces, untiled, and by their own tiling; what each takes and how near it comes.

Real architectures as their published configurations have them, with random weights. Live bytes are counted on torch's
meta device, from the shapes of the real calls; what a large picture needs with its maps on the host is the library's
own estimate. Time and the distance from the untiled result are of real runs on this machine.
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoders", choices=AUTOENCODERS, nargs="+", default=list(AUTOENCODERS), help="(all)")
    parser.add_argument("--size", type=positive, default=512, metavar="N", help="side of the picture (%(default)s)")
    parser.add_argument("--large", type=positive, default=4096, metavar="N", help="of the estimate (%(default)s)")
    parser.add_argument("--tile", type=positive, default=256, metavar="N", help="of sample pixels (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=1, help="(%(default)s)")
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


def latent(name: str, vae: Any, size: int) -> torch.Tensor:
    kind, _, channels, factor = AUTOENCODERS[name]
    frames = (1,) if kind in WITH_FRAMES else ()
    shape = (1, channels, *frames, size // factor, size // factor)
    return torch.randn(shape, device=vae.device, dtype=vae.dtype, generator=_generator(vae.device))


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


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way."""
    vae, shadow = build(name, options.device), build(name, "meta")
    source, unseen = latent(name, vae, options.size), latent(name, shadow, options.size)
    results: dict[str, torch.Tensor] = {}

    def decode(way: str) -> None:
        results[way] = vae.decode(source).sample

    timed = {
        way: Candidate(partial(decode, way), context)
        for way, context in ways(name, vae, options.size, options.tile).items()
    }
    counted = {
        way: Candidate(lambda: shadow.decode(unseen).sample, context)
        for way, context in ways(name, shadow, options.size, options.tile).items()
    }
    samples = interleaved(timed, options.rounds, options.device, options.clock)
    reference = results[UNTILED]
    width = float(reference.max() - reference.min())
    return [
        {
            "autoencoder": name,
            "way": way,
            "size": options.size,
            "seconds": samples[way],
            "median_seconds": statistics.median(samples[way]),
            "time_ratio": ratio_of_medians(samples[way], samples[UNTILED]),
            "peak_live_bytes": cost_on_paper(counted[way]).peak_live_bytes,
            "psnr": psnr(results[way], reference, width),
            "relative_error": maximum_error(results[way], reference) / float(reference.abs().max()),
        }
        for way in timed
    ]


def simulate(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a large picture needs beside the weights in half precision, its maps on the host."""
    pipe, size = vae_pipeline(build(name, "meta", torch.float16)), options.large
    needs = {
        mode: LargeResPatch(pipe, size, size, vae_mode=mode, vae_offload=True, memory_limit=None).estimate().decode
        for mode in ("two-pass", "exact")
    }
    needs[UNTILED] = LargeResPatch(pipe, size, size).estimate(patched=False).decode
    return {"autoencoder": name, "large": size, "decode_bytes": needs}


def main() -> None:
    options = parse_arguments()
    report: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        "environment": prepare(options),
        "note": options.note,
        "rows": [],
        "simulated": [],
    }
    for name in options.autoencoders:
        with torch.no_grad():
            report["rows"] += measure(name, options)
            report["simulated"].append(simulate(name, options))
        write_json(options.out, report)
    print_rows(report)
    print(f"written to {options.out}")


def print_rows(report: dict[str, Any]) -> None:
    print_table(
        ("autoencoder", "way", "seconds", "of untiled", "MiB", "PSNR", "relative error"),
        [
            [
                row["autoencoder"],
                row["way"],
                f"{row['median_seconds']:.1f}",
                f"{row['time_ratio']:.2f}",
                f"{row['peak_live_bytes'] / MIB:.0f}",
                f"{row['psnr']:.0f} dB",
                f"{row['relative_error']:.0e}",
            ]
            for row in report["rows"]
        ],
    )
    for row in report["simulated"]:
        needs = ", ".join(f"{way} {size / 2**30:.2f} GiB" for way, size in row["decode_bytes"].items())
        print(f"{row['autoencoder']}, {row['large']}²: {needs}")


if __name__ == "__main__":
    main()
