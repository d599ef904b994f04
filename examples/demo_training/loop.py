"""What the trainings share: learning rate, optimizers, running average, checkpoints that survive being killed."""

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
from tqdm import tqdm

WARM_UP = 100
FALLS = 0.4


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up, a long plateau, a cosine down to a hundredth of the peak.

    Up to the fall nothing depends on the number of steps, so a run can still be shortened or prolonged there.
    """
    if step < WARM_UP:
        return peak * (step + 1) / WARM_UP
    fallen = max(0.0, (step / total - (1 - FALLS)) / FALLS)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, fallen))))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Exponential moving average of the weights; short memory in the first steps, when weights still travel far."""
    decay = min(decay, (1 + step) / (10 + step))
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is made orthogonal (Jordan et al. 2024): short trainings come further by it.

    For the matrices and kernels inside a network. A step's size is that of Adam at the same rate (Liu et al. 2025).
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                size = 0.2 * max(ahead.shape) ** 0.5
                parameter.add_(orthogonal(ahead).view_as(parameter), alpha=-group["lr"] * size)


def orthogonal(matrix: torch.Tensor, steps: int = 4) -> torch.Tensor:
    """Nearly the orthogonal matrix nearest to `matrix`, by a quintic Newton-Schulz iteration."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def _groups(model: nn.Module, rate_factor: Callable[[str, nn.Parameter], float]) -> list[dict[str, Any]]:
    """Adam's parameter groups, one for each factor on the learning rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(rate_factor(name, parameter), []).append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in groups.items() if factor]


def save_atomically(state: object, path: Path) -> None:
    """A run killed in the middle of saving keeps its previous checkpoint."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def train(
    name: str,
    model: nn.Module,
    average: nn.Module,
    loss_at: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    *,
    folder: Path,
    steps: int,
    peak_rate: float,
    rate_factor: Callable[[str, nn.Parameter], float] = lambda name, parameter: 1.0,
    inner: Callable[[str], bool] = lambda name: False,
    decay: float,
    report: Callable[[int], dict[str, float]],
    report_every: int,
    save_seconds: float,
) -> float:
    """Train `model` for `steps` optimizer steps, resuming from `folder`; return the seconds spent, all runs together.

    `loss_at(step)` must draw all its randomness from the step number, so that an interrupted run equals a whole one.
    `inner(name)` says which matrices and kernels `Muon` trains; Adam has the others.
    """
    checkpoint, log = folder / f"{name}.pt", folder / f"{name}.jsonl"
    matrices = {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1 and inner(name)}
    others = _groups(model, lambda name, parameter: 0.0 if name in matrices else rate_factor(name, parameter))
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=peak_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    ]
    if matrices:
        optimizers.append(Muon(list(matrices.values()), lr=peak_rate))
    first, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        first, spent = state["step"], state["seconds"]

    def save(step: int, seconds: float) -> None:
        state = {"model": model.state_dict(), "average": average.state_dict(), "step": step, "seconds": seconds}
        save_atomically({**state, "optimizers": [each.state_dict() for each in optimizers]}, checkpoint)

    started = saved = time.monotonic()
    running: dict[str, float] = {}
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=10)
    for step in bar:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group.get("factor", 1.0) * learning_rate(step, steps, peak_rate)
        loss, parts = loss_at(step)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        update_average(average, model, step, decay)
        for key, value in parts.items():
            running[key] = 0.98 * running.get(key, value) + 0.02 * value
        bar.set_postfix({key: f"{value:.4f}" for key, value in running.items()}, refresh=False)
        now = time.monotonic()
        if (step + 1) % report_every == 0 or step + 1 == steps:
            row = {"step": step + 1, "seconds": round(spent + now - started, 1), **running, **report(step + 1)}
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({k: round(v, 5) for k, v in row.items()}) + "\n")
        if now - saved > save_seconds:
            save(step + 1, spent + now - started)
            saved = now
    total = spent + time.monotonic() - started
    if first < steps:
        save(steps, total)
    return total
