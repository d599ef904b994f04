"""One step of Stable Diffusion 1.5's U-Net, patched against unpatched: is the time saved the arithmetic saved?

The architecture is the real one, the weights are random: they change neither time nor memory. Arithmetic is counted
from the shapes of the real calls, memory from the tensors alive at once; both on torch's meta device, in seconds.
"""

import argparse
import statistics
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from _common import (
    Candidate,
    add_blocking_options,
    add_common_options,
    add_device_options,
    blocking,
    cost_on_paper,
    dtype_of,
    interleaved,
    mebibytes,
    positive,
    prepare,
    print_table,
    ratio_of_medians,
    write_json,
)
from largerespatch import LargeResPatch

SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TINY = SD15 | {"block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32, "attention_head_dim": 4}
ARCHITECTURES = {"sd15": SD15, "tiny": TINY}
FACTOR = 8  # sample pixels along each axis of a latent pixel
PROMPT_TOKENS = 77
TIMESTEP = 500


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes",
        type=positive,
        nargs="+",
        default=[1024, 1536, 2048],
        metavar="N",
        help="sides of square images in sample pixels (%(default)s)",
    )
    parser.add_argument("--rounds", type=positive, default=5, help="at most, for each size (%(default)s)")
    parser.add_argument(
        "--budget",
        type=float,
        default=300,
        metavar="SECONDS",
        help="no further round of a size begins after this time, so large sizes get fewer (%(default)s)",
    )
    add_blocking_options(parser, context=512)
    parser.add_argument(
        "--architecture", choices=ARCHITECTURES, default="sd15", help="tiny is for trying the script out (%(default)s)"
    )
    add_device_options(parser)
    add_common_options(parser, "unet_step")
    return parser.parse_args()


def build_pipeline(architecture: str, device: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    """A pipeline that holds a U-Net alone."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**ARCHITECTURES[architecture]).eval().requires_grad_(False)
    if dtype != unet.dtype:
        unet.to(dtype)
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)  # as Stable Diffusion has it
    others = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(**others, unet=unet, scheduler=scheduler, requires_safety_checker=False)


def candidates(pipe: StableDiffusionPipeline, size: int, options: argparse.Namespace) -> dict[str, Candidate]:
    """One step for one sample, unpatched and patched, on the device where the U-Net is."""
    unet = pipe.unet
    place = {"device": unet.device, "dtype": unet.dtype}
    latents = torch.randn(1, unet.config.in_channels, size // FACTOR, size // FACTOR, **place)
    prompt = torch.randn(1, PROMPT_TOKENS, unet.config.cross_attention_dim, **place)

    def step() -> None:
        unet(latents, TIMESTEP, encoder_hidden_states=prompt)

    def patch() -> LargeResPatch:
        return LargeResPatch(pipe, size, size, **blocking(options))

    return {"unpatched": Candidate(step), "patched": Candidate(step, patch)}


def compare(pipe: StableDiffusionPipeline, shadow: StableDiffusionPipeline, size: int, options: Any) -> dict[str, Any]:
    """Everything about one size; `shadow` is the same pipeline on ``meta``."""
    cost = {name: cost_on_paper(candidate) for name, candidate in candidates(shadow, size, options).items()}
    timed = candidates(pipe, size, options)
    if torch.device(options.device).type == "cuda":
        interleaved(timed, 1, options.device)  # kernels are chosen and compiled at the first sight of a shape
    samples = interleaved(timed, options.rounds, options.device, options.clock, options.budget)
    time_ratio = ratio_of_medians(samples["unpatched"], samples["patched"])
    arithmetic_ratio = cost["unpatched"].flops / cost["patched"].flops
    return {
        "size": size,
        "seconds": samples,
        "median_seconds": {name: statistics.median(times) for name, times in samples.items()},
        "cost": {name: each._asdict() | {"flops": each.flops} for name, each in cost.items()},
        "time_ratio": time_ratio,
        "arithmetic_ratio": arithmetic_ratio,
        "deviation": time_ratio / arithmetic_ratio - 1,
    }


def print_results(results: list[dict[str, Any]]) -> None:
    def row(result: dict[str, Any]) -> list[str]:
        size, median, cost = result["size"], result["median_seconds"], result["cost"]
        return [
            f"{size}x{size}",
            *(f"{cost[name]['flops'] / 1e12:.2f}" for name in cost),
            *(mebibytes(cost[name]["peak_live_bytes"]) for name in cost),
            *(f"{median[name]:.1f}" for name in cost),
            str(len(result["seconds"]["patched"])),
            f"{result['time_ratio']:.2f}",
            f"{result['arithmetic_ratio']:.2f}",
            f"{result['deviation']:+.1%}",
        ]

    headings = ("image", "TFLOP", "patched", "peak live", "patched", "seconds", "patched", "rounds")
    print_table((*headings, "time ratio", "of arithmetic", "deviation"), [row(result) for result in results])


def main() -> None:
    options = parse_arguments()
    described = prepare(options)
    pipe = build_pipeline(options.architecture, options.device, dtype_of(options.device))
    shadow = build_pipeline(options.architecture, "meta", dtype_of(options.device))
    with torch.no_grad():  # what happens once per process must not fall into the first sample
        candidates(pipe, 128, options)["unpatched"].run()
    report = {
        "question": __doc__.splitlines()[0],
        "environment": described,
        "note": options.note,
        "options": {
            name: getattr(options, name) for name in ("architecture", "attn_slice", "attn_full_tokens", "attn_context")
        },
        "batch": 1,
        "results": [],
    }
    for size in options.sizes:
        report["results"].append(compare(pipe, shadow, size, options))
        write_json(options.out, report)  # after every size: the next one may take long
    print_results(report["results"])
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
