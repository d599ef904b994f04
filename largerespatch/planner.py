"""Peak memory, told beforehand, and settings that fit a budget."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from . import stages
from .memory import gibibytes
from .patching import PatchStack
from .shadow import Shadow, execution_device, models_of, weights_on


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the pipeline's device for one image with guidance on.

    `weights` are those that are on the device at once; `unet` (a denoising step), `encode` and `decode` are what the
    stages hold beside them. `encodes` says whether the pipeline encodes images at all.
    """

    weights: int
    unet: int
    encode: int
    decode: int
    encodes: bool = False

    @property
    def peak(self) -> int:
        """Weights and the largest stage; encoding counts where the pipeline encodes."""
        return self.weights + max(self.unet, self.decode, self.encode if self.encodes else 0)

    def __str__(self) -> str:
        rows = {
            "weights": gibibytes(self.weights),
            "denoising step": gibibytes(self.unet),
            "encode": gibibytes(self.encode) + ("" if self.encodes else "  (not done by this pipeline)"),
            "decode": gibibytes(self.decode),
            "peak": gibibytes(self.peak),
        }
        left = max(map(len, rows))
        right = max(len(row.split("  ")[0]) for row in rows.values())
        return "\n".join(
            f"{name:<{left}}  {row.split('  ')[0]:>{right}}{row[len(row.split('  ')[0]) :]}"
            for name, row in rows.items()
        )


class Estimator:
    """Estimates one pipeline's memory for any size and settings.

    `stacks` hold the replacements that are on the pipeline now; the estimate is of what is underneath them.
    """

    def __init__(self, pipe: Any, factor: int, stacks: list[PatchStack]) -> None:
        names = [name for name in models_of(pipe) if name in stages.COMPONENTS]
        self.shadow = Shadow(pipe, names, stacks)
        self.weights = weights_on(pipe, execution_device(pipe))
        self.encodes = stages.encodes(pipe)
        self.factor = factor

    def __call__(
        self, height: int, width: int, patched: Callable[[Any], AbstractContextManager[Any]]
    ) -> MemoryEstimate:
        """Inside `patched`, called with the pipeline's shadow, for an image of ``height x width`` sample pixels."""
        pipe = self.shadow.pipe
        with patched(pipe):
            unet = self.shadow.peak(lambda: stages.step(pipe, height, width, self.factor))
            # Pipelines upcast to encode whatever the dtype, to decode where half precision would overflow.
            with self.shadow.fake, stages.upcast(pipe, torch.float16, torch.bfloat16) as grown:
                encode = self.shadow.peak(lambda: stages.encode(pipe, height, width)) + grown
            with self.shadow.fake, stages.upcast(pipe, torch.float16) as grown:
                decode = self.shadow.peak(lambda: stages.decode(pipe, height, width, self.factor)) + grown
        return MemoryEstimate(self.weights, unet, encode, decode, self.encodes)
