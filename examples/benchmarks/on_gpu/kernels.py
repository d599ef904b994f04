"""Which attention kernel runs, with the log-weights of a context as a mask, as extra channels, as a score modification.

`largerespatch.techniques.attention.log_weights` says how they become channels.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from _common import Candidate
from largerespatch.techniques.attention.log_weights import in_channels

from .copies import profiled
from .lab import Lab, Row

Attend = Callable[[], torch.Tensor]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ROUNDS = 15
CHECKED_QUERIES = 64


class Case(NamedTuple):
    """A tile of queries and its keys: its own, and a context with log-weights."""

    name: str
    batch: int
    heads: int
    queries: int
    context: int
    channels: int
    dtype: torch.dtype = torch.float16


CASES = (
    Case("sd15, brick", 2, 8, 8192, 512, 40),
    Case("sdxl, brick", 2, 10, 8192, 512, 64),
    Case("sd15, middle level", 2, 8, 8192, 512, 80),
    Case("flux, brick", 1, 24, 8192, 1024, 128, torch.bfloat16),
)
SMALL_CASES = (Case("toy", 1, 2, 64, 16, 8, torch.float32),)
# Queries of a chunk of the VAE's mid-block attention, against all keys of a picture of 2048 and 4096 sample pixels.
CHUNKS = (2**12, 2**13, 2**14, 2**15, 2**16)
VAE_KEYS, VAE_CHANNELS = (2**16, 2**18), 512


def rows(lab: Lab) -> Iterator[Row]:
    for case in SMALL_CASES if lab.small else CASES:
        yield from compared(lab, case)
    for keys in (2**8,) if lab.small else VAE_KEYS:
        for chunk in (2**6, 2**7) if lab.small else CHUNKS:
            if lab.clock.affords(("chunk", keys), 1.2) and chunk <= keys:
                since = time.monotonic()
                yield chunk_of_queries(lab, keys, chunk)
                lab.clock.took(("chunk", keys), since)


def compared(lab: Lab, case: Case) -> Iterator[Row]:
    generator = torch.Generator(lab.device).manual_seed(0)
    place = {"device": lab.device, "dtype": case.dtype, "generator": generator}
    keys = case.queries + case.context
    query = torch.randn(case.batch, case.heads, case.queries, case.channels, **place)
    key, value = (torch.randn(case.batch, case.heads, keys, case.channels, **place) for _ in range(2))
    weights = torch.zeros(case.batch, keys, device=lab.device)
    weights[:, case.queries :] = math.log(1000 / case.context * 250)  # each stands for some hundreds
    weights[:, -7:] = -torch.inf  # some of a context lie inside the tile
    expected = reference(query, key, value, weights)
    for name, attend in ways(lab, query, key, value, weights).items():
        row: Row = {"case": case.name, "way": name}
        try:
            with torch.no_grad():
                result = attend()[:, :, :CHECKED_QUERIES]
                error = (result.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
                row |= {"relative_error": float(error), "milliseconds": medians(lab, attend), "kernel": kernel(attend)}
        except RuntimeError as failure:  # no kernel does it in this way
            row["failed"] = str(failure).splitlines()[0][:120]
        yield row


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """In float64, of the first queries."""
    scores = query[:, :, :CHECKED_QUERIES].double() @ key.double().transpose(-1, -2) / math.sqrt(query.shape[-1])
    if weights is not None:
        scores += weights[:, None, None].double()
    return scores.softmax(dim=-1) @ value.double()


def ways(
    lab: Lab, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weights: torch.Tensor
) -> dict[str, Attend]:
    mask = weights[:, None, None].to(query.dtype)
    plain: Attend = lambda: F.scaled_dot_product_attention(query, key, value)  # noqa: E731
    masked: Attend = lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # noqa: E731

    def wide() -> torch.Tensor:
        return in_channels(F.scaled_dot_product_attention, query, key, value, log_weights=weights[:, None, None])

    found = {"no weights (wrong)": plain, "mask": masked, "channels": wide}
    if lab.cuda:
        for name, backend in BACKENDS.items():
            found |= {f"{way}, {name}": forced(found[way], backend) for way in ("mask", "channels")}
        if query.shape[-1] == 64:  # compiling takes long
            found["flex"] = flexible(query, key, value, weights)
    return found


def forced(attend: Attend, backend: Any) -> Attend:
    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return attend()

    return run


def flexible(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weights: torch.Tensor) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def weighted(score: Any, batch: Any, head: Any, row: Any, column: Any) -> Any:
        return score + weights[batch, column]

    return lambda: compiled(query, key, value, score_mod=weighted)


def medians(lab: Lab, attend: Attend) -> float:
    """Milliseconds."""
    for _ in range(2):
        attend()
    if not lab.cuda:
        since = time.perf_counter()
        attend()
        return 1000 * (time.perf_counter() - since)
    times = []
    for _ in range(ROUNDS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        attend()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times)


def kernel(attend: Attend) -> str | None:
    """The name of the kernel that takes longest."""
    if not torch.cuda.is_available():
        return None
    longest = max(profiled(Candidate(attend)), key=lambda each: each.time_range.elapsed_us(), default=None)
    return None if longest is None else longest.name[:100]


def chunk_of_queries(lab: Lab, keys: int, chunk: int) -> Row:
    """Attention of one head of 512 channels, for which there is no flash kernel: time for each query."""
    place = {"device": lab.device, "dtype": lab.dtype}
    query = torch.randn(1, 1, chunk, VAE_CHANNELS, **place)
    key, value = (torch.randn(1, 1, keys, VAE_CHANNELS, **place) for _ in range(2))
    attend: Attend = lambda: F.scaled_dot_product_attention(query, key, value)  # noqa: E731
    with torch.no_grad():
        attend()
        if lab.cuda:
            torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated() if lab.cuda else 0
        took = medians(lab, attend)
        peak = torch.cuda.max_memory_allocated() - base if lab.cuda else None
    return {
        "case": f"vae, {keys} keys",
        "way": f"chunks of {chunk}",
        "milliseconds": took,
        "microseconds_a_query": 1000 * took / chunk,
        "bytes": peak,
        "kernel": kernel(attend),
    }
