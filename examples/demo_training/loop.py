"""Training by the clock: as many steps as a device makes in the seconds given, with checkpoints that survive a kill."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

WARM_UP = 100  # steps
FALLS_AT = 0.5  # share of the training after which the rate falls
SAVE_SECONDS = 20

Loss = Callable[[float], tuple[torch.Tensor, dict[str, torch.Tensor]]]
RateFactor = Callable[[str, nn.Parameter], float]


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Linear warm-up, a plateau, a cosine down to a hundredth of the peak.

    Up to the fall nothing depends on the length of the training, so a run can still be shortened or prolonged there.
    """
    fallen = max(0.0, (progress - FALLS_AT) / (1 - FALLS_AT))
    falling = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, fallen)))
    return peak * falling * min(1.0, (step + 1) / WARM_UP)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Exponential moving average of the weights; short memory in the first steps, when weights still travel far."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is made orthogonal (Jordan et al. 2024): short trainings come further by it.

    For the matrices and kernels inside a network, all of one shape in one batch: few kernels, since launching them is
    what takes time on a GPU. A step's size is that of Adam at the same rate (Liu et al. 2025).
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            shapes.setdefault(parameter.flatten(1).shape, []).append(parameter)
        super().__init__([{"params": each} for each in shapes.values()], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters = group["params"]
            # `reshape`: kernels may lie with their channels last.
            gradient = torch.stack([parameter.grad.reshape(len(parameter), -1) for parameter in parameters])
            state = self.state[parameters[0]]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            moves = orthogonal(gradient.lerp(state["momentum"], group["momentum"]))
            size = 0.2 * max(moves.shape[1:]) ** 0.5
            views = [move.view(parameter.shape) for move, parameter in zip(moves, parameters, strict=True)]
            torch._foreach_add_(parameters, views, alpha=-group["lr"] * size)


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly the orthogonal matrices nearest to `[N, R, C]`, by a quintic Newton-Schulz iteration.

    In half precision where the device is fast at that.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    wide = wide.bfloat16() if matrices.is_cuda else wide
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    wide = wide if matrices.shape[1] <= matrices.shape[2] else wide.mT
    return wide.to(matrices.dtype).contiguous()


def optimizers_for(
    model: nn.Module, peak: float, rate_factor: RateFactor, inner: Callable[[str], bool]
) -> list[torch.optim.Optimizer]:
    """AdamW, with a group for each factor on the learning rate; `Muon` for matrices and kernels that are `inner`."""
    matrices: list[nn.Parameter] = []
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and inner(name):
            matrices.append(parameter)
        else:
            groups.setdefault(rate_factor(name, parameter), []).append(parameter)
    others = [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]
    fused = next(model.parameters()).is_cuda
    adam = torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.99), weight_decay=1e-3, fused=fused)
    return [adam, Muon(matrices, lr=peak)] if matrices else [adam]


def save_atomically(state: object, path: Path) -> None:
    """A run killed in the middle of saving keeps its previous checkpoint."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def write_row(log: Path, row: dict[str, Any]) -> None:
    """A line of JSON at the end of `log`, and on the screen."""
    line = json.dumps({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()})
    print(f"{log.stem}: {line}", flush=True)
    with log.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def train(
    name: str,
    model: nn.Module,
    average: nn.Module,
    loss_at: Loss,
    *,
    folder: Path,
    seconds: float,
    seed: int,
    peak_rate: float,
    rate_factor: RateFactor = lambda name, parameter: 1.0,
    inner: Callable[[str], bool] = lambda name: False,
    decay: float,
    report: Callable[[], dict[str, float]],
) -> None:
    """Train `model` for `seconds`, all runs together, resuming from `folder`; `average` is what comes of it.

    `loss_at(progress)` gives the loss at a share of the training and what to log of it, all left on the device:
    nothing waits for it but a row of the log every few seconds. It draws from torch's generators, which each step
    seeds, so that an interrupted run sees what a whole one does. `report()` adds figures to the last row.

    Raises `FloatingPointError` where the loss is no number any more; the checkpoint is the last good one.
    """
    checkpoint, log = folder / f"{name}.pt", folder / f"{name}.jsonl"
    optimizers = optimizers_for(model, peak_rate, rate_factor, inner)
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        step, spent = state["step"], state["seconds"]
    if spent >= seconds:
        return

    sums: dict[str, torch.Tensor] = {}
    counted, kept_at, before = 0, spent, time.monotonic()

    def keep(figures: Callable[[], dict[str, float]] = dict) -> None:
        means = {key: float(value) / counted for key, value in sums.items()}
        if not all(math.isfinite(mean) for mean in means.values()):
            raise FloatingPointError(f"{name}: {means} at step {step}; {checkpoint} is from before")
        row = {"step": step, "seconds": spent, **means, **figures()}  # before the checkpoint: it says that all is done
        state = {"model": model.state_dict(), "average": average.state_dict(), "step": step, "seconds": spent}
        save_atomically({**state, "optimizers": [each.state_dict() for each in optimizers]}, checkpoint)
        write_row(log, row)

    while spent < seconds:
        progress = spent / seconds
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group.get("factor", 1.0) * learning_rate(step, progress, peak_rate)
        torch.manual_seed(seed * 1_000_003 + step)
        loss, parts = loss_at(progress)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        update_average(average, model, step, decay)
        for key, value in parts.items():
            sums[key] = sums.get(key, 0) + value.detach()
        step, counted = step + 1, counted + 1
        now = time.monotonic()
        spent, before = spent + now - before, now
        if spent - kept_at > SAVE_SECONDS and spent < seconds:
            keep()
            sums, counted, kept_at = {}, 0, spent
    keep(report)
