"""A transformer's step in bands, beside diffusers' own context parallelism, in two or more processes."""

import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import diffusers
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from _common import Candidate, peak_live_bytes
from largerespatch import LargeResPatch
from largerespatch.core.bands import counting_sent

TEXT_TOKENS, TEXT_CHANNELS, CHANNELS = 128, 512, 64
HEADS, HEAD_CHANNELS, AXES = 8, 64, (16, 24, 24)
SHARED = {
    "in_channels": CHANNELS,
    "attention_head_dim": HEAD_CHANNELS,
    "num_attention_heads": HEADS,
    "joint_attention_dim": TEXT_CHANNELS,
    "axes_dims_rope": AXES,
}


def flux(side: int) -> tuple[Any, dict[str, Any]]:
    """Of a twelfth of the published width and depth, and what it is called with for ``side x side`` tokens."""
    own = {"num_layers": 2, "num_single_layers": 4, "pooled_projection_dim": TEXT_CHANNELS}
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    told = {"pooled_projections": noise(1, TEXT_CHANNELS), "img_ids": ids, "txt_ids": torch.zeros(TEXT_TOKENS, 3)}
    return diffusers.FluxTransformer2DModel(**SHARED, **own), told


def qwen_image(side: int) -> tuple[Any, dict[str, Any]]:
    return diffusers.QwenImageTransformer2DModel(**SHARED, num_layers=4), {"img_shapes": [[(1, side, side)]]}


MODELS: dict[str, Callable[[int], tuple[Any, dict[str, Any]]]] = {"flux": flux, "qwen-image": qwen_image}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def build(name: str, side: int) -> tuple[Any, Callable[[], torch.Tensor]]:
    """A model with random weights, the same in every process, and a call of it."""
    torch.manual_seed(0)
    model, told = MODELS[name](side)
    model.eval().requires_grad_(False)
    told |= {"hidden_states": noise(1, side**2, CHANNELS), "timestep": torch.full((1,), 0.5), "return_dict": False}
    told["encoder_hidden_states"] = noise(1, TEXT_TOKENS, TEXT_CHANNELS)
    return model, lambda: model(**told)[0]


class Collectives(TorchDispatchMode):
    """Counts what functional collectives, which diffusers uses, send to other processes."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "_c10d_functional" and func.__name__.startswith("all_"):
            whole = func.__name__.startswith("all_gather")  # which goes to each of the others as it is
            self.sent += args[0].nbytes * (dist.get_world_size() - 1) // (1 if whole else dist.get_world_size())
        return func(*args, **kwargs or {})


def in_context_parallel(model: Any, way: str) -> None:
    """By diffusers, for good. It looks for an accelerator, of which there is none on a CPU: one is made believe."""
    config = diffusers.ContextParallelConfig(**{f"{way}_degree": dist.get_world_size()})
    with mock.patch.object(torch.accelerator, "device_count", lambda: 1):
        model.enable_parallelism(config=config)


def compared(name: str, side: int, rounds: int) -> dict[str, Any]:
    """In each of several processes: seconds, live bytes, bytes sent, and how far from one process, by way.

    One process alone is the first. Attention is dense in all of them, so that they do the same work.
    """
    warnings.simplefilter("ignore", FutureWarning)  # of what diffusers calls in torch
    model, call = build(name, side)
    pipe = _Pipe(model)
    patch = LargeResPatch(pipe, 16 * side, 16 * side, attn_full_tokens=side**2, process_group=dist.group.WORLD)
    ways: dict[str, tuple[Callable[[], Any], Any]] = {"one": (call, nullcontext()), "bands": (call, patch)}
    refused = {}
    for way in ("ulysses", "ring"):
        parallel, call = build(name, side)
        try:
            in_context_parallel(parallel, way)
            call()
            ways[way] = call, nullcontext()
        except (ValueError, RuntimeError) as error:
            refused[way] = f"{type(error).__name__}: {error}"
    found: dict[str, Any] = {"refused": refused, "ways": {way: {"seconds": []} for way in ways}}
    results = {}
    for round_ in range(rounds + 1):  # the first one is not timed: its bytes are counted, and its result kept
        for way, (call, inside) in ways.items():
            dist.barrier()
            if way == "one" and dist.get_rank():
                continue  # the others wait, without taking time, at the next barrier
            if round_ == 0:
                with counting_sent() as ours, Collectives() as theirs:
                    peak = peak_live_bytes(Candidate(call, lambda inside=inside: inside))
                found["ways"][way] |= {"peak": peak, "sent": sum(ours.values()) + theirs.sent}
            with inside:
                start = time.perf_counter()
                results[way] = call()
                if round_:
                    found["ways"][way]["seconds"].append(time.perf_counter() - start)
    if not dist.get_rank():
        one = results["one"]
        for way, result in results.items():
            found["ways"][way]["relative_difference"] = ((result - one).abs().max() / one.abs().max()).item()
    return found


class _Pipe:
    """As much of a pipeline as there is."""

    vae_scale_factor = 8
    scheduler = None

    def __init__(self, model: Any) -> None:
        self.components = {"transformer": model}


def by_way(everyone: list[dict[str, Any]], name: str, side: int) -> dict[str, Any]:
    """What all processes found, by way."""
    first = everyone[0]
    rows = {}
    for way, found in first["ways"].items():
        of_all = [each["ways"][way] for each in everyone if "peak" in each["ways"][way]]
        rows[way] = {
            "seconds": found["seconds"],
            "median_seconds": statistics.median(found["seconds"]),
            "peak_live_bytes": [each["peak"] for each in of_all],
            "sent": [each["sent"] for each in of_all],
            "relative_difference": found["relative_difference"],
        }
    return {"model": name, "tokens": side**2, "text_tokens": TEXT_TOKENS, "ways": rows, "refused": first["refused"]}
