"""One image over several processes: a step's time and live bytes in each, and the bytes that they send for it.

Measured on this machine's CPUs, one thread a process; the architecture is the real one, the weights are random. What
would be sent between up to eight GPUs is counted without running anything, and the time of a step there is arithmetic
alone: its floating-point operations and its bytes at the speeds that are given. Nothing of that was measured.
Transformers of a small size are compared with diffusers' own context parallelism.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _parallel
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformer_step
from memory import MODELS, build_pipeline

from _common import (
    FACTOR,
    Candidate,
    add_common_options,
    cost_on_paper,
    environment,
    mebibytes,
    peak_live_bytes,
    positive,
    print_table,
    write_json,
)
from largerespatch import LargeResPatch
from largerespatch.core.bands import counting_sent
from largerespatch.core.families import families_in, install
from largerespatch.core.patching import PatchStack
from largerespatch.core.pieces import rehearsal
from largerespatch.memory.estimate import play
from largerespatch.options import Options

PROMPT_TOKENS = 77
TIMESTEP = 500
LINKS = {"NVLink": 200e9, "PCIe": 20e9}  # bytes a second that one GPU sends
FLOPS = 200e12  # a second, of one GPU in half precision
GUIDANCE = 2  # samples
PARTS = ("measured", "compared", "projected")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("sd15", "tiny"), default="sd15", help="(%(default)s)")
    parser.add_argument("--size", type=positive, default=1024, metavar="N", help="in sample pixels (%(default)s)")
    parser.add_argument("--processes", type=positive, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="of one process and of all, in turns (%(default)s)")
    parser.add_argument(
        "--projected", type=positive, nargs="*", default=[4096, 8192], metavar="N", help="sides (%(default)s)"
    )
    parser.add_argument(
        "--projected-models",
        choices=[*MODELS, *transformer_step.MODELS],
        nargs="+",
        default=["sd15", "sdxl", "flux"],
        help="(%(default)s)",
    )
    parser.add_argument("--compared-side", type=positive, default=48, metavar="N", help="in tokens (%(default)s)")
    parser.add_argument(
        "--parts", choices=PARTS, nargs="+", default=list(PARTS), help="others stay as they are in the file (all)"
    )
    add_common_options(parser, "bands")
    return parser.parse_args()


def arguments_of(unet: Any, batch: int, size: int) -> dict[str, Any]:
    place = {"device": unet.device, "dtype": unet.dtype}
    generator = torch.Generator(unet.device).manual_seed(0) if unet.device.type != "meta" else None
    told = {
        "sample": torch.randn(batch, 4, size // FACTOR, size // FACTOR, generator=generator, **place),
        "timestep": TIMESTEP,
        "encoder_hidden_states": torch.randn(batch, PROMPT_TOKENS, unet.config.cross_attention_dim, **place),
    }
    if unet.config.addition_embed_type == "text_time":
        added = {"text_embeds": torch.zeros(batch, 1280, **place), "time_ids": torch.zeros(batch, 6, **place)}
        told["added_cond_kwargs"] = added
    return told


def in_processes(work: Callable[[argparse.Namespace], Any], options: argparse.Namespace) -> list[Any]:
    """What each of several processes found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found"
        mp.spawn(in_one, (work, options, str(Path(folder) / "store"), str(out)), options.processes)
        return torch.load(out)  # type: ignore[no-any-return]


def in_one(
    rank: int, work: Callable[[argparse.Namespace], Any], options: argparse.Namespace, store: str, out: str
) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.processes)
    everyone: list[Any] = [None] * options.processes
    dist.all_gather_object(everyone, work(options))
    if rank == 0:
        torch.save(everyone, out)
    dist.barrier()
    dist.destroy_process_group()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """In one of several processes: a step by one of them alone, and by all, in turns."""
    rank = dist.get_rank()
    pipe = build_pipeline(options.model, "cpu", torch.float32)
    told = arguments_of(pipe.unet, 1, options.size)
    steps = {
        "one": LargeResPatch(pipe, options.size, options.size),
        "all": LargeResPatch(pipe, options.size, options.size, process_group=dist.group.WORLD),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks, sent, results = {}, {}, {}
    for round_ in range(options.rounds + 1):  # the first one is not timed: its bytes are counted, and its result kept
        for name, patch in steps.items():
            dist.barrier()
            if name == "one" and rank:
                continue  # the others wait, without taking time, at the next barrier
            if round_ == 0:
                with counting_sent() as counter:
                    peaks[name] = peak_live_bytes(Candidate(lambda: pipe.unet(**told), lambda patch=patch: patch))
                sent[name] = dict(counter)
                with patch:
                    results[name] = pipe.unet(**told).sample
                continue
            with patch:
                start = time.perf_counter()
                pipe.unet(**told)
                times[name].append(time.perf_counter() - start)
    found = {"times": times, "peaks": peaks, "sent": sent}
    if rank == 0:
        difference = (results["all"] - results["one"]).abs().max() / results["one"].abs().max()
        found["relative_difference"] = difference.item()
    return found


def measured(options: argparse.Namespace) -> dict[str, Any]:
    everyone = in_processes(measure, options)
    first = everyone[0]
    medians = {name: statistics.median(times) for name, times in first["times"].items()}
    return {
        "size": options.size,
        "processes": options.processes,
        "seconds": first["times"],
        "median_seconds": medians,
        "speedup": medians["one"] / medians["all"],
        "peak_live_bytes": {"one": first["peaks"]["one"], "all": [each["peaks"]["all"] for each in everyone]},
        "sent": [each["sent"]["all"] for each in everyone],
        "relative_difference": first["relative_difference"],
    }


def compare(options: argparse.Namespace) -> dict[str, Any]:
    return {name: _parallel.compared(name, options.compared_side, options.rounds) for name in _parallel.MODELS}


def compared(options: argparse.Namespace) -> list[dict[str, Any]]:
    everyone = in_processes(compare, options)
    return [
        _parallel.by_way([each[name] for each in everyone], name, options.compared_side) for name in _parallel.MODELS
    ]


def on_paper(model: str, size: int) -> tuple[Any, Callable[[], Any], float]:
    """A pipeline with a weightless model, a step of it, and that one's floating-point operations in blocks."""
    if model in MODELS:
        pipe = build_pipeline(model, "meta", torch.float16)
        told = arguments_of(pipe.unet, GUIDANCE, size)
        patch = LargeResPatch(pipe, size, size, memory_limit=None)
        return pipe, lambda: pipe.unet(**told), cost_on_paper(Candidate(lambda: pipe.unet(**told), lambda: patch)).flops
    published = transformer_step.MODELS[model]
    pipe = transformer_step.build_pipeline(published, published.blocks)
    way = partial(LargeResPatch, width=size, height=size, memory_limit=None)
    flops = sum(transformer_step.arithmetic(published, size, way).values())
    return pipe, lambda: play("step", list(families_in(pipe).values()), pipe, size, size), flops


def projected(model: str, size: int) -> dict[str, Any]:
    """Bytes of a step with guidance that the process with the tallest band sends, by number of processes and kind.

    Counted on ``meta``; times follow by arithmetic, as if work were dealt evenly and nothing else took any.
    """
    pipe, step, flops = on_paper(model, size)
    rows = []
    for count in (2, 4, 8):
        alike = Options(memory_limit=None, process_group=dist.ProcessGroup(0, count))  # which nobody is a member of
        with PatchStack() as stack, rehearsal(), counting_sent() as sent:
            for name, (denoiser, family) in families_in(pipe).items():
                if "step" in family.stages:
                    install(stack, family.sites(denoiser, name, alike, pipe))
            step()
        total = sum(sent.values())
        rows.append(
            {
                "processes": count,
                "sent": dict(sent),
                "computing_ms": 1e3 * flops / count / FLOPS,
                "sending_ms": {link: 1e3 * total / speed for link, speed in LINKS.items()},
            }
        )
    return {"model": model, "size": size, "flops": flops, "rows": rows}


def print_results(report: dict[str, Any]) -> None:
    found = report["measured"]
    print(f"{found['speedup']:.2f} times as fast in {found['processes']} processes as in one, one thread each")
    print(f"{found['relative_difference']:.1e} of the largest value is the largest difference")
    one, everyone = found["peak_live_bytes"].values()
    kinds = sorted({kind for sent in found["sent"] for kind in sent})
    print_table(
        ("process", "live bytes", "of one alone", *(f"sent: {kind}" for kind in kinds)),
        [
            [
                str(rank),
                mebibytes(peak),
                f"{peak / one:.2f}",
                *(f"{sent.get(kind, 0) / 2**20:.2f} MiB" for kind in kinds),
            ]
            for rank, (peak, sent) in enumerate(zip(everyone, found["sent"], strict=True))
        ],
    )
    for case in report.get("compared", {"cases": []})["cases"]:  # another run may have them
        print(f"{case['model']}, {case['tokens']} tokens, dense attention; refused: {case['refused'] or 'nothing'}")
        print_table(
            ("way", "seconds", "live bytes", "sent by each", "largest difference"),
            [
                [
                    way,
                    f"{found['median_seconds']:.2f}",
                    mebibytes(max(found["peak_live_bytes"])),
                    mebibytes(max(found["sent"])),
                    f"{found['relative_difference']:.0e}",
                ]
                for way, found in case["ways"].items()
            ],
        )
    print("by arithmetic, a step with guidance on GPUs (milliseconds), none of it measured:")
    print_table(
        ("model", "image", "GPUs", "computing", *(f"sending, {link}" for link in LINKS)),
        [
            [
                case["model"],
                f"{case['size']}²",
                str(row["processes"]),
                f"{row['computing_ms']:.0f}",
                *(f"{row['sending_ms'][link]:.1f}" for link in LINKS),
            ]
            for case in report["projected"]
            for row in case["rows"]
        ],
    )


def main() -> None:
    options = parse_arguments()
    report = json.loads(options.out.read_text()) if set(options.parts) < set(PARTS) else {}
    if "measured" in options.parts:
        told = {"question": (__doc__ or "").splitlines()[0], "environment": environment(), "note": options.note}
        report |= told | {"model": options.model, "measured": measured(options)}
    if "compared" in options.parts:
        report["compared"] = {"environment": environment(), "cases": compared(options)}
    if "projected" in options.parts:
        with torch.no_grad():
            cases = [projected(model, size) for model in options.projected_models for size in options.projected]
        asked = {(case["model"], case["size"]) for case in cases}
        kept = [case for case in report.get("projected", ()) if (case["model"], case["size"]) not in asked]
        report["projected"] = kept + cases
    write_json(options.out, report)
    print_results(report)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
