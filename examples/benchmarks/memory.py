"""What whole pipelines need in memory, from 1024 to 32768 sample pixels, told beforehand: on the device, on the host.

Simulated rows come from the library's own estimate on models that have no data: real architectures, half precision,
guidance on, text encoders off the device (they are needed before the first step only; what they add is told, too).
`gpu.py` says how near that is to what a GPU allocates. On a CPU the estimate and the savers are proved on small models,
by counting live bytes. How a patched step grows with the image is counted from the shapes of real calls, and timed on a
U-Net narrow enough for a CPU. What a step moves between host and device is counted on models without data, too.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from on_host.costs import TRAVEL, goals, picture, travel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from _common import (
    Candidate,
    add_clock_options,
    add_common_options,
    build_sized_vae,
    cost_on_paper,
    interleaved,
    mebibytes,
    peak_live_bytes,
    positive,
    prepare,
    print_table,
    write_json,
)
from largerespatch import LargeResPatch
from largerespatch.core.families import families_in
from largerespatch.memory.estimate import Estimator, bare, play
from largerespatch.memory.planner import DENOISER_SAVERS, VAE_SAVERS
from largerespatch.options import Options

GIB = 2**30
STAGES = ("step", "decode")
MOST_TILED = 16384  # beyond which diffusers' loop over its tiles takes minutes
SPARE = 0.05  # of a limit, that the headline cases should leave
HEADLINES = (("sd15", 8192, 8), ("sdxl", 8192, 12), ("sdxl", 4096, 8))  # model, side, GiB

SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
TINY = SD15 | {"block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32, "attention_head_dim": 4}
MODELS = ("sd15", "sdxl", "tiny")

EVERY = {key: value for saver in DENOISER_SAVERS for key, value in saver.settings.items()}
WAYS: dict[str, dict[str, Any] | None] = {
    "unpatched": None,
    "diffusers' tiling": None,
    "patched": {},
    "every saver": EVERY | {key: value for saver in VAE_SAVERS["two-pass"] for key, value in saver.settings.items()},
    "every saver, exact VAE": EVERY
    | {"vae_mode": "exact"}
    | {key: value for saver in VAE_SAVERS["exact"] for key, value in saver.settings.items()},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes",
        type=positive,
        nargs="+",
        default=[1024, 2048, 4096, 8192, 16384, 32768],
        metavar="N",
        help="sides of square images in sample pixels (%(default)s)",
    )
    parser.add_argument("--models", choices=MODELS, nargs="+", default=["sd15", "sdxl"], help="(%(default)s)")
    parser.add_argument(
        "--growth-sizes",
        type=positive,
        nargs=2,
        default=[4096, 8192],
        metavar="N",
        help="sides between which the growth of a step is counted and timed (%(default)s)",
    )
    parser.add_argument(
        "--proof-size",
        type=positive,
        default=512,
        metavar="N",
        help="side of the real runs on the CPU, whose live bytes are counted (%(default)s)",
    )
    parser.add_argument(
        "--picture-size",
        type=positive,
        default=4096,
        metavar="N",
        help="side of the picture that is made on the host, in a process of its own (%(default)s)",
    )
    add_clock_options(parser)
    add_common_options(parser, "memory")
    return parser.parse_args()


# --- pipelines ----------------------------------------------------------------------------------------------------


def build_pipeline(model: str, device: str, dtype: torch.dtype) -> Any:
    """With random weights, and without the text encoders: they are needed before the first step only."""
    torch.manual_seed(0)
    tiny = model == "tiny"
    with torch.device(device):
        unet = UNet2DConditionModel(**{"sd15": SD15, "sdxl": SDXL, "tiny": TINY}[model])
        vae = build_sized_vae((16, 16, 32, 32) if tiny else (128, 256, 512, 512), force_upcast=model == "sdxl")
    for each in (unet, vae):
        torch.nn.Module.to(each, dtype).eval().requires_grad_(False)
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    common = {"vae": vae, "unet": unet, "text_encoder": None, "tokenizer": None, "scheduler": scheduler}
    if model == "sdxl":
        pipe = StableDiffusionXLPipeline(**common, text_encoder_2=None, tokenizer_2=None)
    else:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**common, **none)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_encoder_bytes(model: str) -> int:
    """What the text encoders of a model add in half precision."""
    with torch.device("meta"):
        encoders = {
            "sd15": lambda: [CLIPTextModel(CLIPTextConfig(**CLIP_L))],
            "sdxl": lambda: [
                CLIPTextModel(CLIPTextConfig(**CLIP_L)),
                CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, projection_dim=1280)),
            ],
            "tiny": list,
        }[model]()
    return sum(2 * weight.numel() for encoder in encoders for weight in encoder.parameters())


def tiled_by_diffusers(pipe: Any) -> Any:
    """With diffusers' own tiling on. Its blending works in place, pixel row by pixel row, and is left out."""
    pipe.vae.enable_tiling()
    vars(pipe.vae).update(blend_v=lambda above, tile, extent: tile, blend_h=lambda left, tile, extent: tile)
    return pipe


# --- simulated ----------------------------------------------------------------------------------------------------


def simulate(model: str, sizes: list[int]) -> Iterator[dict[str, Any]]:
    """A row for each size and way."""
    pipe = build_pipeline(model, "meta", torch.float16)
    unpatched = Estimator(pipe, [], bare)
    patched = Estimator(pipe, [], LargeResPatch(pipe, 512, 512)._on)
    tiled = Estimator(tiled_by_diffusers(pipe), [], bare)
    for size in sizes:
        for way, settings in WAYS.items():
            if way == "diffusers' tiling" and size > MOST_TILED:
                continue
            options = Options(**settings or {})
            estimator = unpatched if settings is None else patched
            step = estimator.peak("step", size, size, options)
            decode = (tiled if way == "diffusers' tiling" else estimator).peak("decode", size, size, options)
            yield {
                "kind": "simulated",
                "model": model,
                "size": size,
                "way": way,
                "weights": estimator.weights,
                "text_encoders": text_encoder_bytes(model),
                "step": step,
                "decode": decode,
                "peak": estimator.weights + max(step, decode),
                "host": max(patched.host_peak(stage, size, size, options) for stage in STAGES),
            }


def headline(row: dict[str, Any]) -> dict[str, Any] | None:
    """Whether a row is one of the headline cases, and how much of its limit it leaves."""
    for model, size, limit in HEADLINES:
        if (row["model"], row["size"]) == (model, size) and row["way"].startswith("every saver"):
            spare = 1 - row["peak"] / (limit * GIB)
            with_text = spare - row["text_encoders"] / (limit * GIB)
            case = {key: row[key] for key in ("kind", "model", "size", "way", "peak")}
            case |= {"limit": limit * GIB, "spare": spare, "spare_with_text_encoders": with_text}
            return case | {"met": spare >= SPARE, "met_with_text_encoders": with_text >= SPARE}
    return None


# --- proof on a CPU -----------------------------------------------------------------------------------------------

PROVED: dict[str, dict[str, Any] | None] = {
    "unpatched": None,
    "patched": {},
    "unet_serial": {"unet_serial": True},
    "unet_serial, unet_strip_rows": {"unet_serial": True, "unet_strip_rows": 8},
    "vae_mode exact": {"vae_mode": "exact"},
}


def prove(size: int) -> Iterator[dict[str, Any]]:
    """Live bytes of real runs of a small model on the CPU, in float32, next to what the estimate says."""
    pipe = build_pipeline("tiny", "cpu", torch.float32)
    small = {"attn_slice_x": 16, "attn_slice_y": 16, "attn_full_tokens": 512, "attn_context": 64, "ff_chunk_size": 512}
    small |= {"vae_chunk_size_x": 16, "vae_chunk_size_y": 16}
    for way, settings in PROVED.items():
        block = LargeResPatch(pipe, size, size, **small | (settings or {}))
        estimate = block.estimate(patched=settings is not None)
        with nullcontext() if settings is None else block:
            lived = {stage: peak_live_bytes(stage_of(pipe, stage, size)) for stage in STAGES}
        row = {"kind": "measured on the CPU", "model": "tiny", "size": size, "way": way, **lived}
        yield row | {"step_estimated": estimate.step, "decode_estimated": estimate.decode}


def stage_of(pipe: Any, stage: str, size: int, context: Callable[[], Any] = nullcontext) -> Candidate:
    """The calls that a pipeline makes to its models for a stage of its work."""
    return Candidate(partial(play, stage, list(families_in(pipe).values()), pipe, size, size), context)


# --- growth -------------------------------------------------------------------------------------------------------


def grow(models: list[str], small: int, large: int, clock: str) -> Iterator[dict[str, Any]]:
    """How a patched step grows between two sizes: the arithmetic of real U-Nets, and CPU seconds of a narrow one."""
    sizes = {"small": small, "large": large}
    for model in models:
        steps = patched_steps(build_pipeline(model, "meta", torch.float16), sizes)
        flops = {name: cost_on_paper(step).flops for name, step in steps.items()}
        yield sizes | {"of": "arithmetic of a step, counted", "model": model, "ratio": flops["large"] / flops["small"]}
    timed = interleaved(patched_steps(build_pipeline("tiny", "cpu", torch.float32), sizes), 1, clock=clock)
    ratio = timed["large"][0] / timed["small"][0]
    yield sizes | {"of": "seconds of a step, on the CPU", "model": "tiny", "seconds": timed, "ratio": ratio}


def patched_steps(pipe: Any, sizes: dict[str, int]) -> dict[str, Candidate]:
    return {
        name: stage_of(pipe, "step", size, partial(LargeResPatch, pipe, size, size)) for name, size in sizes.items()
    }


# --- report -------------------------------------------------------------------------------------------------------


def print_rows(rows: list[dict[str, Any]]) -> None:
    def cell(row: dict[str, Any], key: str) -> str:
        return mebibytes(row[key]) if row.get(key) is not None else "-"

    print_table(
        ("model", "image", "way", "kind", "weights", "step", "decode", "peak", "host"),
        [
            [row["model"], f"{row['size']}²", row["way"], row["kind"]]
            + [cell(row, key) for key in ("weights", "step", "decode", "peak", "host")]
            for row in rows
        ],
    )


def main() -> None:
    options = parse_arguments()
    report: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        "environment": prepare(options),
        "note": options.note,
        "ways": WAYS,
        "rows": [],
        "proof": [],
        "headlines": [],
        "goals": [],
        "travel": [],
        "picture": [],
        "growth": [],
    }
    report["proof"] = list(prove(options.proof_size))
    for model in options.models:
        for row in simulate(model, options.sizes):
            report["rows"].append(row)
            report["headlines"] += filter(None, [headline(row)])
            write_json(options.out, report)  # after every row: the next one may take long
    print_rows(report["rows"] + report["proof"])
    for case in report["headlines"]:
        verdict = "met" if case["met"] else "missed"
        text = "met" if case["met_with_text_encoders"] else "missed"
        print(
            f"{case['model']} {case['size']}² in {case['limit'] // GIB} GiB, {case['way']}: {verdict}, "
            f"with text encoders on the device {text}"
        )
    report["goals"] = list(goals(report["rows"]))
    for case in report["goals"]:
        found = f"{case['ratio']:.2f}" if "ratio" in case else f"{case['peak'] / GIB:.2f} of {case['most'] / GIB:g} GiB"
        print(f"{case['model']} {case['size']}², {case['way']}: {found}, {'met' if case['met'] else 'missed'}")
    for model in options.models:
        size = options.growth_sizes[0]
        pipe = build_pipeline(model, "meta", torch.float16)
        step = stage_of(pipe, "step", size, partial(LargeResPatch, pipe, size, size, **TRAVEL))
        for case in travel(pipe, size, cost_on_paper(step).flops):
            report["travel"].append({"model": model} | case)
            print(
                f"{model} {case['size']}², {case['way']} on the host: {mebibytes(case['to the device'])} come and "
                f"{mebibytes(case['to the host'])} go in a step: {case['seconds']:.2f} s at 25 GB/s. "
                f"Its arithmetic takes {case['arithmetic seconds']:.2f} s at 100 TFLOP/s"
            )
    report["picture"] = list(picture(options.picture_size))
    for case in report["picture"]:
        print(f"a picture of {case['size']}², {case['way']}: {mebibytes(case['bytes'])} of the host's memory")
    write_json(options.out, report)
    for case in grow(options.models, *options.growth_sizes, options.clock):
        report["growth"].append(case)
        write_json(options.out, report)
        print(f"{case['model']}, {case['small']}² to {case['large']}², {case['of']}: {case['ratio']:.2f}")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
