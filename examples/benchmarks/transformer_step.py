"""What does a step of a joint-attention transformer cost, dense and in blocks with context, up to 8192 sample pixels?

Arithmetic is counted from the shapes of the real calls of the published architectures, on tensors that have no data;
the peak of activations is the library's own estimate, in bfloat16, as for a pipeline's call with guidance. Blocks of a
kind are alike, so one of each kind and two more of one kind are counted, and the rest is multiplied. Whether time
follows arithmetic is measured on a CPU, on one block of each kind of Flux.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import diffusers
import torch

from _common import (
    Arithmetic,
    AttentionByFormula,
    Candidate,
    add_blocking_options,
    add_clock_options,
    add_common_options,
    blocking,
    cost_on_paper,
    interleaved,
    positive,
    prepare,
    print_table,
    ratio_of_medians,
    values_unread,
    write_json,
)
from largerespatch import LargeResPatch
from largerespatch.core.families import families_in
from largerespatch.denoisers import joint
from largerespatch.memory.estimate import play

GIB, TERA = 2**30, 1e12
MORE = 2  # blocks of a kind: one with wide bricks, one with tall ones
TEXT_TOKENS = 512


class Model(NamedTuple):
    """A published architecture: which classes, what differs from their defaults, how many blocks of each kind."""

    transformer: str
    pipeline: str
    config: dict[str, Any]
    blocks: dict[str, int]


MODELS = {
    "flux": Model(
        "FluxTransformer2DModel",
        "FluxPipeline",
        {"guidance_embeds": True},
        {"num_layers": 19, "num_single_layers": 38},
    ),
    "qwen-image": Model("QwenImageTransformer2DModel", "QwenImagePipeline", {}, {"num_layers": 60}),
    "z-image": Model("ZImageTransformer2DModel", "ZImagePipeline", {}, {"n_layers": 30}),
    "sd3.5-large": Model(
        "SD3Transformer2DModel",
        "StableDiffusion3Pipeline",
        {
            "pos_embed_max_size": 192,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "qk_norm": "rms_norm",
        },
        {"num_layers": 38},
    ),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=positive, nargs="+", default=[1024, 2048, 4096, 8192], metavar="N", help="(%(default)s)"
    )
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS), help="(%(default)s)")
    add_blocking_options(parser, context=3072)
    parser.add_argument("--timed-side", type=positive, default=64, metavar="N", help="in tokens (%(default)s)")
    parser.add_argument("--timed-slice", type=positive, default=16, metavar="N", help="in tokens (%(default)s)")
    parser.add_argument("--timed-context", type=positive, default=1024, metavar="N", help="in tokens (%(default)s)")
    parser.add_argument("--timed-heads", type=positive, default=24, metavar="N", help="of 128 channels (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="of timing (%(default)s)")
    add_clock_options(parser)
    add_common_options(parser, "transformers")
    return parser.parse_args()


def build_pipeline(model: Model, blocks: dict[str, int], device: str = "meta", **changes: Any) -> Any:
    """With nothing but a transformer of so many blocks of each kind."""
    kind = getattr(diffusers, model.pipeline)
    with torch.device(device):
        transformer = getattr(diffusers, model.transformer)(**model.config | blocks | changes)
    torch.nn.Module.to(transformer, torch.bfloat16 if device == "meta" else torch.float32)
    transformer.eval().requires_grad_(False)
    parts = dict.fromkeys(kind._get_signature_keys(kind)[0]) | {"transformer": transformer}
    return kind(**parts | {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()})


# --- on paper -----------------------------------------------------------------------------------------------------


# Puts a patch on a pipeline, or nothing.
Way = Callable[[Any], AbstractContextManager[Any]]


def counted(model: Model, blocks: dict[str, int], size: int, way: Way) -> tuple[int, int]:
    """Of attention and of all else."""
    pipe = build_pipeline(model, blocks)
    with way(pipe), values_unread(), torch.no_grad(), AttentionByFormula() as attention, Arithmetic() as other:
        play("step", list(families_in(pipe).values()), pipe, size, size)
    return attention.flops, other.flops


def arithmetic(model: Model, size: int, way: Way) -> dict[str, float]:
    """Of a whole step, in floating-point operations."""
    one = dict.fromkeys(model.blocks, 1)
    found = counted(model, one, size, way)
    totals = [float(each) for each in found]
    for kind, count in model.blocks.items():
        more = counted(model, one | {kind: 1 + MORE}, size, way)
        totals = [total + (count - 1) * (a - b) / MORE for total, a, b in zip(totals, more, found, strict=True)]
    return dict(zip(("attention", "other"), totals, strict=True))


def on_paper(name: str, size: int, blocks: dict[str, int]) -> dict[str, Any]:
    model, row = MODELS[name], {"model": name, "size": size}
    whole = build_pipeline(model, model.blocks)
    patched = partial(LargeResPatch, width=size, height=size, memory_limit=None, **blocks)
    try:
        patch = patched(whole)
    except ValueError as error:  # it has no positions for so many tokens
        return row | {"refused": str(error)}
    started = time.perf_counter()
    for named, way in (("dense", nullcontext), ("in blocks", patched)):
        flops = arithmetic(model, size, way)
        peak = patch.estimate(patched=way is patched).step
        row[named] = {"flops": sum(flops.values()), "attention_flops": flops["attention"], "activations": peak}
    flat = patched(whole, unet_offload="maps").estimate()
    row["maps on the host"] = {"activations": flat.step, "host": flat.host}
    ratio = row["dense"]["flops"] / row["in blocks"]["flops"]
    return row | {"arithmetic_ratio": ratio, "seconds_to_count": time.perf_counter() - started}


def print_paper(rows: list[dict[str, Any]]) -> None:
    def cells(row: dict[str, Any]) -> list[str]:
        if "refused" in row:
            return ["refused", *[""] * 5]
        ways = ("dense", "in blocks")
        tera = [f"{row[way]['flops'] / TERA:.0f}" for way in ways]
        peaks = [f"{row[way]['activations'] / GIB:.2f}" for way in (*ways, "maps on the host")]
        return [*tera, f"{row['arithmetic_ratio']:.2f}", *peaks]

    headings = ("model", "image", "TFLOP dense", "in blocks", "ratio", "GiB dense", "in blocks", "maps on the host")
    print_table(headings, [[row["model"], f"{row['size']}²", *cells(row)] for row in rows])


# --- on the CPU ---------------------------------------------------------------------------------------------------


def one_block(kind: str, device: str, options: argparse.Namespace) -> tuple[Any, Callable[[], Any]]:
    """Flux with a single block, and a call of it; what is around the block is a hundredth of it or less."""
    blocks = dict.fromkeys(MODELS["flux"].blocks, 0) | {kind: 1}
    pipe = build_pipeline(MODELS["flux"], blocks, device, num_attention_heads=options.timed_heads)
    model, side = pipe.transformer, options.timed_side
    like = partial(torch.randn if device == "cpu" else torch.empty, device=device, dtype=model.dtype)
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(1, side, side, device, model.dtype)
    given = {
        "hidden_states": like(1, side**2, model.config.in_channels),
        "encoder_hidden_states": like(1, TEXT_TOKENS, model.config.joint_attention_dim),
        "pooled_projections": like(1, model.config.pooled_projection_dim),
        "timestep": torch.full((1,), 0.5, device=device, dtype=model.dtype),
        "guidance": torch.full((1,), 3.5, device=device, dtype=model.dtype),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT_TOKENS, 3, device=device),
    }
    return pipe, lambda: model(**given)


def time_blocks(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds of one block of each kind, dense and in blocks, beside what arithmetic says, and with the defaults."""
    side, width = options.timed_side, options.timed_slice
    sizes = {"attn_slice_x": width, "attn_slice_y": width, "attn_full_tokens": width**2}
    sizes["attn_context"] = options.timed_context
    for kind in MODELS["flux"].blocks:
        ways: dict[str, dict[str, Candidate]] = {}
        for device in ("meta", "cpu"):
            pipe, call = one_block(kind, device, options)
            patch = partial(LargeResPatch, pipe, 16 * side, 16 * side, memory_limit=None)
            ways[device] = {"dense": Candidate(call), "in blocks": Candidate(call, partial(patch, **sizes))}
            ways[device]["defaults"] = Candidate(call, patch)  # of which so few tokens are attended whole
        with joint.asked_for((side, side)):
            flops = {name: cost_on_paper(way).flops for name, way in ways["meta"].items()}
        seconds = interleaved(ways["cpu"], options.rounds, clock=options.clock)
        yield {
            "kind": kind,
            "tokens": side**2,
            "seconds": seconds,
            "time_ratio": ratio_of_medians(seconds["in blocks"], seconds["dense"]),
            "arithmetic_ratio": flops["in blocks"] / flops["dense"],
            "defaults_ratio": ratio_of_medians(seconds["defaults"], seconds["dense"]),
        }


def main() -> None:
    options = parse_arguments()
    report: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        "environment": prepare(options),
        "note": options.note,
        "counted": f"one block of each kind, and {MORE} more of one kind at a time; the rest is multiplied",
        "activations": "bfloat16, estimated, guidance's samples at once where the pipeline has them so",
        "options": blocking(options),
        "timed_with": {name: getattr(options, f"timed_{name}") for name in ("side", "slice", "context", "heads")},
        "rows": [],
        "times": [],
    }
    for name in options.models:
        for size in options.sizes:
            report["rows"].append(on_paper(name, size, blocking(options)))
            write_json(options.out, report)  # after every row: the next one may take long
    print_paper(report["rows"])
    for row in time_blocks(options):
        report["times"].append(row)
        write_json(options.out, report)
        dense, blocks = (statistics.median(row["seconds"][way]) for way in ("dense", "in blocks"))
        print(
            f"{row['kind']}, {row['tokens']} tokens: {dense:.1f} s dense, {blocks:.1f} s in blocks: "
            f"{row['time_ratio']:.3f}, by arithmetic {row['arithmetic_ratio']:.3f}; with the defaults "
            f"{row['defaults_ratio']:.3f}"
        )
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
