"""What both trainings share: learning rate, running average of weights, checkpoints that survive being killed."""

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


def learning_rate(step: int, total: int, peak: float, warm_up: int = 100) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, total - warm_up)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Exponential moving average of the weights; short memory in the first steps, when weights still travel far."""
    decay = min(decay, (1 + step) / (10 + step))
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def _groups(model: nn.Module, rate_factor: Callable[[str, nn.Parameter], float]) -> list[dict[str, Any]]:
    """The optimizer's parameter groups, one for each factor on the learning rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(rate_factor(name, parameter), []).append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]


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
    schedule: Callable[[int, int, float], float] = learning_rate,
    rate_factor: Callable[[str, nn.Parameter], float] = lambda name, parameter: 1.0,
    decay: float,
    report: Callable[[int], dict[str, float]],
    report_every: int,
    save_seconds: float,
) -> float:
    """Train `model` for `steps` optimizer steps, resuming from `folder`; return the seconds spent, all runs together.

    `loss_at(step)` must draw all its randomness from the step number, so that an interrupted run equals a whole one.
    """
    checkpoint, log = folder / f"{name}.pt", folder / f"{name}.jsonl"
    optimizer = torch.optim.AdamW(_groups(model, rate_factor), lr=peak_rate, betas=(0.95, 0.99), weight_decay=1e-3)
    first, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]

    def save(step: int, seconds: float) -> None:
        state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        save_atomically({**state, "step": step, "seconds": seconds}, checkpoint)

    started = saved = time.monotonic()
    running: dict[str, float] = {}
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * schedule(step, steps, peak_rate)
        loss, parts = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
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
