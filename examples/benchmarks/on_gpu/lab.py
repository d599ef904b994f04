"""What the parts share: the device, the time that is left, models, and figures that need no GPU."""

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from memory import build_pipeline

from _common import Candidate, build_sized_vae, cost_on_paper, seconds, write_json
from largerespatch import LargeResPatch
from largerespatch.core.families import families_in
from largerespatch.memory.estimate import as_called, play

GIB = 2**30
Row = dict[str, Any]
Settings = dict[str, Any]

LONG, VERY_LONG = 1.5, 20.0  # seconds

# Flux's own width with a few of its blocks, which are alike: enough to say what a block needs and takes.
FLUX = {"num_layers": 2, "num_single_layers": 4, "guidance_embeds": True}
FLUX_SMALL = {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32} | FLUX
FLUX_VAE = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1}


class Clock:
    """How much time is left, and what rows have taken so far."""

    def __init__(self, allowed: float) -> None:
        self.end = time.monotonic() + allowed
        self.last: dict[Any, float] = {}

    def until(self, share: float) -> "Clock":
        """A clock for `share` of what is left."""
        return Clock(share * self.left())

    def left(self) -> float:
        return self.end - time.monotonic()

    def affords(self, kind: Any, growth: float) -> bool:
        """Whether another row of a kind, `growth` times as long as its last one, still fits."""
        return self.left() > max(growth * self.last.get(kind, 0.0), 2.0)

    def took(self, kind: Any, since: float) -> None:
        self.last[kind] = time.monotonic() - since


class Paper:
    """Figures that need no GPU, each made once and kept in a file: minutes on a GPU are dear.

    `closed`: those that are not there are None and not made now.
    """

    def __init__(self, path: Path | None, closed: bool = False) -> None:
        self.path = path
        self.closed = closed
        self.known = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.known:
            if self.closed:
                return None
            self.known[key] = make()
            if self.path:
                write_json(self.path, self.known)
        return self.known[key]


@dataclass
class Lab:
    """`small` is for machines without a GPU: toy widths and sizes, which show that the script runs and nothing else."""

    device: str
    small: bool
    paper: Paper
    clock: Clock
    kept: list[Row] = field(default_factory=list)
    _held: tuple[Any, Any] = field(default=(None, None))

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.cuda else torch.float32

    @property
    def sizes(self) -> list[int]:
        return [128, 256] if self.small else [1024, 2048, 4096, 8192]

    def knows(self, **asked: Any) -> bool:
        """Whether an earlier run has made such a row of the part that is being made."""
        return any(asked.items() <= row.items() for row in self.kept)

    def pipeline(self, model: str) -> Any:
        """With random weights on the device; one model is kept at a time."""
        if self._held[0] != model:
            self._held = (None, None)
            self.clear()
            self._held = (model, self._build(model, self.device))
        return self._held[1]

    def on_paper(self, model: str) -> Any:
        return self._build(model, "meta")

    def _build(self, model: str, device: str) -> Any:
        if model == "flux":
            return build_flux(device, torch.bfloat16 if self.cuda or not self.small else torch.float32, self.small)
        return build_pipeline("tiny" if self.small else model, device, self.dtype if self.small else torch.float16)

    def clear(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def build_flux(device: str, dtype: torch.dtype, small: bool) -> Any:
    """Flux with a few blocks and no text encoders."""
    torch.manual_seed(0)
    with torch.device(device):
        transformer = FluxTransformer2DModel(**FLUX_SMALL if small else FLUX)
        vae = build_sized_vae((16, 16, 32, 32) if small else (128, 256, 512, 512), **FLUX_VAE)
    for each in (transformer, vae):
        torch.nn.Module.to(each, dtype).eval().requires_grad_(False)
    none = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, transformer=transformer, **none)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stage(pipe: Any, name: str, size: int, settings: Settings | None) -> Candidate:
    """The calls that a pipeline makes for one of `STAGES`; unpatched where settings are None."""
    run = partial(play, name, list(families_in(pipe).values()), pipe, size, size)
    if settings is None:
        return Candidate(run)
    return Candidate(run, partial(LargeResPatch, pipe, size, size, memory_limit=None, **settings))


def timed(lab: Lab, candidate: Candidate, rounds: int = 3) -> list[float]:
    """Seconds of each of `rounds` runs, or of one that takes very long.

    The first of all, which chooses kernels, counts where that is nothing to it.
    """
    with candidate.context():
        bare = Candidate(candidate.run)
        first = seconds(bare, lab.device)
        if first > VERY_LONG:
            return [first]
        kept = [first] if first > LONG else []
        return kept + [seconds(bare, lab.device) for _ in range(rounds - len(kept))]


def flops(lab: Lab, model: str, name: str, size: int, settings: Settings | None) -> int | None:
    """Arithmetic of a stage, counted from the shapes of its calls. Where maps are makes no difference to it."""
    if settings is not None:
        settings = {key: value for key, value in settings.items() if not key.endswith("_offload")}
    key = f"flops {model} {name} {size} {settings}"
    made: int | None = lab.paper.get(key, lambda: cost_on_paper(stage(lab.on_paper(model), name, size, settings)).flops)
    return made


def called(pipe: Any, name: str) -> Any:
    """What a pipeline does to its models for a stage (to a VAE that is cast to float32, say)."""
    return as_called(name, list(families_in(pipe).values()), pipe)


def attempts(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, and in the place of the rest what went wrong."""
    try:
        yield from rows
    except Exception as error:
        yield {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc().splitlines()[-6:]}
