"""One image over several processes: a U-Net step's time and live bytes in each, and the bytes that they send for it.

Measured on this machine's CPUs, one thread a process; the architecture is the real one, the weights are random. What
would be sent between up to eight GPUs is counted without running anything, and the time of a step there is arithmetic
alone: its floating-point operations and its bytes at the speeds that are given. Nothing of that was measured.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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
from largerespatch.core.families import family_of, install
from largerespatch.core.patching import PatchStack
from largerespatch.core.pieces import rehearsal
from largerespatch.options import Options

PROMPT_TOKENS = 77
TIMESTEP = 500
LINKS = {"NVLink": 200e9, "PCIe": 20e9}  # bytes a second that one GPU sends
FLOPS = 200e12  # a second, of one GPU in half precision
GUIDANCE = 2  # samples


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
        choices=MODELS,
        nargs="+",
        default=["sd15", "sdxl"],
        help="(%(default)s)",
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


def measure(rank: int, options: argparse.Namespace, store: str, out: str) -> None:
    """In one of several processes: a step by one of them alone, and by all, in turns."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.processes)
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
    everyone: list[Any] = [None] * options.processes
    dist.all_gather_object(everyone, found)
    if rank == 0:
        torch.save(everyone, out)
    dist.barrier()
    dist.destroy_process_group()


def measured(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found"
        mp.spawn(measure, (options, str(Path(folder) / "store"), str(out)), options.processes)
        everyone = torch.load(out)
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


def projected(model: str, size: int) -> dict[str, Any]:
    """Bytes of a step with guidance that the process with the tallest band sends, by number of processes and kind.

    Counted on ``meta``; times follow by arithmetic, as if work were dealt evenly and nothing else took any.
    """
    pipe = build_pipeline(model, "meta", torch.float16)
    told = arguments_of(pipe.unet, GUIDANCE, size)
    patch = LargeResPatch(pipe, size, size, memory_limit=None)
    flops = cost_on_paper(Candidate(lambda: pipe.unet(**told), lambda: patch)).flops
    rows = []
    for count in (2, 4, 8):
        alike = Options(memory_limit=None, process_group=dist.ProcessGroup(0, count))  # which nobody is a member of
        with PatchStack() as stack, rehearsal(), counting_sent() as sent:
            install(stack, family_of(pipe.unet).sites(pipe.unet, "unet", alike, pipe))
            pipe.unet(**told)
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
    report: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        "environment": environment(),
        "note": options.note,
        "model": options.model,
        "measured": measured(options),
        "projected": [],
    }
    with torch.no_grad():
        for model in options.projected_models:
            report["projected"] += [projected(model, size) for size in options.projected]
    write_json(options.out, report)
    print_results(report)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
