"""What the benchmarks share: the environment, timing, live bytes, arithmetic, errors, tables, JSON."""

import argparse
import json
import math
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import largerespatch
from largerespatch.core.patching import PatchStack
from largerespatch.denoisers import joint
from largerespatch.techniques import notes

RESULTS = Path(__file__).parent / "results"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FACTOR = 8  # sample pixels along each axis of a latent pixel
PACKAGES = ("torch", "diffusers", "transformers")


class Candidate(NamedTuple):
    """One way to do the same work: `run` is timed, entering and leaving `context` is not."""

    run: Callable[[], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def positive(text: str) -> int:
    """A whole number of at least 1, as an argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1; got {text!r}")
    return int(text)


def add_common_options(parser: argparse.ArgumentParser, name: str, note: str = "") -> None:
    """``--out`` and ``--note``, which every benchmark has."""
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="the JSON to write (%(default)s)")
    parser.add_argument("--note", default=note, help="put into the JSON, for instance how busy the machine was")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """``--device``, ``--threads`` and ``--clock``; apply them with `prepare`."""
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu measures in float32, cuda in float16 (%(default)s)",
    )
    add_clock_options(parser)


def add_blocking_options(parser: argparse.ArgumentParser, context: int) -> None:
    """Sizes of blocks, in tokens; `blocking` makes them options of a patch."""
    parser.add_argument("--attn-slice", type=positive, default=64, metavar="N", help="in tokens (%(default)s)")
    parser.add_argument("--attn-full-tokens", type=positive, default=16384, metavar="N", help="(%(default)s)")
    parser.add_argument("--attn-context", type=int, default=context, metavar="N", help="in tokens (%(default)s)")


def blocking(options: argparse.Namespace) -> dict[str, int]:
    return {
        "attn_slice_x": options.attn_slice,
        "attn_slice_y": options.attn_slice,
        "attn_full_tokens": options.attn_full_tokens,
        "attn_context": options.attn_context,
    }


def add_clock_options(parser: argparse.ArgumentParser) -> None:
    """``--threads`` and ``--clock``, for what runs on a CPU alone; apply them with `prepare`."""
    parser.set_defaults(device=parser.get_default("device") or "cpu")
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="of torch on the CPU (torch's own choice, here %(default)s)",
        default=torch.get_num_threads(),
    )
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="what is timed on a CPU: wall is what users wait; on a shared machine cpu, together with --threads 1, "
        "leaves out the time that others take (%(default)s)",
    )


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Put ``--threads`` into effect; returns the environment to report."""
    torch.set_num_threads(options.threads)
    return environment(options.device) | {"clock": options.clock}


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if torch.device(device).type == "cpu" else torch.float16


# --- where it ran -----------------------------------------------------------------------------------------------


def environment(device: str = "cpu") -> dict[str, Any]:
    """Date, hardware and versions, as far as they are nobody's secret."""
    on_cpu = torch.device(device).type == "cpu"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "device_name": _cpu_name() if on_cpu else torch.cuda.get_device_name(device),
        "dtype": str(dtype_of(device)).removeprefix("torch."),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "largerespatch": largerespatch.__version__,  # which may be a checkout, that nobody has installed
    }


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


# --- time -------------------------------------------------------------------------------------------------------


def seconds(candidate: Candidate, device: str = "cpu", clock: str = "wall") -> float:
    """The duration of one run; `clock`, a key of `CLOCKS`, is for CPUs alone."""
    with candidate.context(), torch.no_grad():
        if torch.device(device).type == "cpu":
            start = CLOCKS[clock]()
            candidate.run()
            return CLOCKS[clock]() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        first.record()
        candidate.run()
        last.record()
        torch.cuda.synchronize(device)
        return first.elapsed_time(last) / 1000


def interleaved(
    candidates: Mapping[str, Candidate],
    rounds: int,
    device: str = "cpu",
    clock: str = "wall",
    budget: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds of every run, by candidate. Candidates take turns, each round in the opposite order of the one before.

    So a machine that slows down or is shared touches all of them alike. At least one round runs; none begins after
    `budget` seconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    start = time.perf_counter()
    for done in range(rounds):
        if done and time.perf_counter() - start > budget:
            break
        for name in order:
            samples[name].append(seconds(candidates[name], device, clock))
        order.reverse()
    return samples


def ratio_of_medians(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    return statistics.median(numerator) / statistics.median(denominator)


# --- memory -----------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that come to life inside the block; `peak` is the most alive at once.

    What existed before, weights and inputs, is not counted, nor are views of it. Kernels' private workspace is not
    seen. Storages are asked for their size at every operation, since one may be shrunk while it lives. Works on every
    device, also on ``meta``, where nothing is allocated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._born: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._older: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._note(self._older, (args, kwargs))
        result = func(*args, **kwargs)
        self._note(self._born, result)
        alive = [reference() for reference in list(self._born.values())]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive if storage is not None))
        return result

    def _note(self, storages: dict[int, Any], tree: Any) -> None:
        for key, storage in self._storages(tree).items():
            if key not in self._older and key not in self._born:
                # Forgotten when it dies: another one may come to life at its address.
                storages[key] = weakref.ref(storage, lambda _, key=key: storages.pop(key, None))

    def _storages(self, tree: Any) -> dict[int, torch.UntypedStorage]:
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}


def peak_live_bytes(candidate: Candidate) -> int:
    """The most bytes of activations alive at once in one run, weights and inputs aside."""
    with candidate.context(), torch.no_grad(), LiveBytes() as count:
        candidate.run()
    return count.peak


# --- arithmetic -------------------------------------------------------------------------------------------------


class AttentionByFormula(TorchFunctionMode):
    """Counts attention as ``4 * queries * keys * channels`` for every head and computes none of it.

    torch's counter does not know every attention kernel, and the kernel taken depends on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
        heads = query.shape[:-2].numel()
        self.flops += 2 * heads * query.shape[-2] * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return query.new_empty(*query.shape[:-1], value.shape[-1])


class Arithmetic(TorchDispatchMode):
    """Counts what torch has a formula for. (Its own counter puts hooks on all modules, which the library respects.)"""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


class Cost(NamedTuple):
    """Floating-point operations of one run (a multiplication and an addition are two) and its peak of live bytes."""

    attention_flops: int
    other_flops: int
    peak_live_bytes: int

    @property
    def flops(self) -> int:
        return self.attention_flops + self.other_flops


@contextmanager
def values_unread() -> Iterator[None]:
    """Inside, nobody asks tensors without data which step it is, or where the tokens are."""
    with PatchStack() as stack:
        for room in (notes, joint):
            stack.set(room, "rehearsing", lambda: True, f"{room.__name__}.rehearsing")
        yield


def cost_on_paper(candidate: Candidate) -> Cost:
    """For models and inputs on ``meta``: nothing is computed or allocated, the shapes of the real calls are seen."""
    with values_unread(), AttentionByFormula() as attention, Arithmetic() as other:
        peak = peak_live_bytes(candidate)
    return Cost(attention.flops, other.flops, peak)


# --- fidelity ---------------------------------------------------------------------------------------------------


def psnr(result: torch.Tensor, reference: torch.Tensor, peak: float) -> float:
    """In dB; infinite where the two are equal. `peak` is the width of the range of values."""
    error = (result.double() - reference.double()).square().mean()
    return float(10 * torch.log10(peak**2 / error))


def maximum_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    return float((result.double() - reference.double()).abs().max())


def seam_error(
    result: torch.Tensor, reference: torch.Tensor, rows: Sequence[int], columns: Sequence[int], reach: int = 1
) -> dict[str, float]:
    """Mean absolute error next to the lines where tiles meet, and everywhere else.

    `rows` and `columns` are the first ones after each line, of maps ``[B, C, H, W]``; `reach` cells on both sides of
    a line count as next to it. A ratio near one says that a seam cannot be told from the rest.
    """
    error = (result.double() - reference.double()).abs().mean(dim=(0, 1))
    near = torch.zeros(error.shape, dtype=torch.bool)
    for row in rows:
        near[row - reach : row + reach] = True
    for column in columns:
        near[:, column - reach : column + reach] = True
    if not near.any() or near.all():
        return {"seam": float("nan"), "elsewhere": float(error.mean())}
    return {"seam": float(error[near].mean()), "elsewhere": float(error[~near].mean())}


# --- the VAE ----------------------------------------------------------------------------------------------------


def build_sized_vae(channels: Sequence[int], **others: Any) -> AutoencoderKL:
    """Stable Diffusion's architecture, of any width."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=2,
        norm_num_groups=min(32, channels[0] // 2),
        sample_size=512,
        **others,
    )


def vae_pipeline(vae: Any) -> StableDiffusionPipeline:
    """A pipeline that holds nothing else."""
    others = dict.fromkeys(("vae", "unet", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(**others, scheduler=scheduler, requires_safety_checker=False)
    pipe.register_modules(vae=vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def own_tiling(vae: Any, chunk: int | None, factor: int = FACTOR) -> Iterator[None]:
    """diffusers' tiling with tiles of `chunk` latent pixels, or none. A quarter overlaps, however that is called."""
    changed = {"use_tiling": chunk is not None}
    if chunk is not None:
        sizes = {"latent_min": chunk, "sample_min": chunk * factor, "sample_stride": chunk * factor * 3 // 4}
        sides = ("size", "height", "width")
        wanted = {f"tile_{name}_{side}": size for name, size in sizes.items() for side in sides}
        changed |= {name: size for name, size in wanted.items() if hasattr(vae, name)}
    before = {name: getattr(vae, name) for name in changed}
    vars(vae).update(changed)
    try:
        yield
    finally:
        vars(vae).update(before)


def run_vae(vae: AutoencoderKL, direction: str, source: torch.Tensor) -> torch.Tensor:
    return vae.decode(source).sample if direction == "decode" else vae.encode(source).latent_dist.mode()


# --- reports ----------------------------------------------------------------------------------------------------


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Plain text: the first column to the left, figures to the right."""
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    for row in (headings, ["-" * width for width in widths], *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """JSON knows neither infinity nor NaN: both become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
