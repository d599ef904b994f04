"""Training by the clock: as many steps as a device makes in the seconds that it is lent for."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .loop import _groups, orthogonal

WARM_UP = 100  # steps
FALLS_AT = 0.5  # share of the training after which the rate falls
LOG_SECONDS = 5


class Clock:
    """The share of a whole training that is done, when this run takes it from `begin` to `until` by `end`."""

    def __init__(self, end: float, begin: float = 0.0, until: float = 1.0) -> None:
        self.start, self.end, self.begin, self.until = time.time(), end, begin, until

    def progress(self) -> float:
        share = (time.time() - self.start) / max(1e-3, self.end - self.start)
        return self.begin + (self.until - self.begin) * min(1.0, share)

    def over(self) -> bool:
        return time.time() >= self.end


class Log:
    """Rows of JSON that several processes append to one file."""

    def __init__(self, path: Path, start: float) -> None:
        self.path, self.start = path, start

    def __call__(self, **row: object) -> None:
        row = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
        line = json.dumps({"at": round(time.time() - self.start, 1), **row})
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        print(line, flush=True)


class BatchedMuon(torch.optim.Optimizer):
    """`loop.Muon` with all matrices of one shape in one batch: few kernels, since launching them is what takes time."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in parameters:
            shapes.setdefault(tuple(parameter.flatten(1).shape), []).append(parameter)
        super().__init__([{"params": each} for each in shapes.values()], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters = group["params"]
            if any(parameter.grad is None for parameter in parameters):
                continue
            # `reshape`: kernels may lie with their channels last.
            gradient = torch.stack([parameter.grad.reshape(len(parameter), -1) for parameter in parameters])
            state = self.state[parameters[0]]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            ahead = gradient.lerp(state["momentum"], group["momentum"])
            size = 0.2 * max(ahead.shape[1:]) ** 0.5
            moves = batched_orthogonal(ahead)
            views = [move.view(parameter.shape) for move, parameter in zip(moves, parameters, strict=True)]
            torch._foreach_add_(parameters, views, alpha=-group["lr"] * size)


def batched_orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """`loop.orthogonal` of `[N, R, C]`, in half the precision where the device is fast at that."""
    if not matrices.is_cuda:
        return torch.stack([orthogonal(each) for each in matrices])
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = (wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    wide = wide if matrices.shape[1] <= matrices.shape[2] else wide.mT
    return wide.to(matrices.dtype).contiguous()


def rate(step: int, progress: float, peak: float) -> float:
    """Linear warm-up in each run, a plateau, a cosine down to a hundredth of the peak."""
    fallen = max(0.0, (progress - FALLS_AT) / (1 - FALLS_AT))
    falling = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, fallen)))
    return peak * falling * min(1.0, (step + 1) / WARM_UP)


def train_by_clock(
    name: str,
    model: nn.Module,
    average: nn.Module,
    loss_at: Callable[[int, float, float], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    clock: Clock,
    log: Log,
    *,
    peak_rate: float,
    rate_factor: Callable[[str, nn.Parameter], float] = lambda name, parameter: 1.0,
    inner: Callable[[str], bool],
    decay: float,
    save: Callable[[float], None],
    save_seconds: float = 45,
) -> int:
    """Train until the clock is over; return the number of steps. `save(progress)` keeps the averaged weights.

    `loss_at(step, progress, batch_share)` gives the loss and what to log of it, all left on the device: nothing waits
    for it but a row of the log every few seconds.
    """
    matrices = {key: p for key, p in model.named_parameters() if p.requires_grad and p.ndim > 1 and inner(key)}

    def optimizers_for(peak: float) -> list[torch.optim.Optimizer]:
        others = _groups(model, lambda key, parameter: 0.0 if key in matrices else rate_factor(key, parameter))
        fused = next(model.parameters()).is_cuda
        adam = torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.99), weight_decay=1e-3, fused=fused)
        return [adam, BatchedMuon(list(matrices.values()), lr=peak)] if matrices else [adam]

    optimizers = optimizers_for(peak_rate)
    parameters, kept = list(model.parameters()), list(average.parameters())
    good = [each.detach().clone() for each in kept]
    running: dict[str, torch.Tensor] = {}
    step, since, batch_share, counted = 0, 0, 1.0, 0
    logged = saved = time.time()
    while not clock.over():
        progress = clock.progress()
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group.get("factor", 1.0) * rate(since, progress, peak_rate)
        try:
            loss, parts = loss_at(step, progress, batch_share)
            model.zero_grad(set_to_none=True)
            loss.backward()
        except torch.OutOfMemoryError:
            if batch_share < 0.1:
                raise
            batch_share /= 2
            loss = parts = None
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            log(stage=name, step=step, out_of_memory=True, batch_share=batch_share)
            continue
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(kept, parameters, 1 - min(decay, (1 + since) / (10 + since)))
        for key, value in parts.items():
            running[key] = running.get(key, 0) + value.detach()
        step, since, counted = step + 1, since + 1, counted + 1
        now = time.time()
        if now - logged > LOG_SECONDS:
            losses = {key: float(value) / counted for key, value in running.items()}
            log(stage=name, step=step, progress=progress, ms=1000 * (time.time() - logged) / counted, **losses)
            running, counted, logged = {}, 0, time.time()
            if not all(math.isfinite(value) for value in losses.values()):
                # Back to the last weights that were good, more carefully.
                peak_rate, since = peak_rate / 2, 0
                with torch.no_grad():
                    torch._foreach_copy_(kept, good)
                    torch._foreach_copy_(parameters, good)
                optimizers = optimizers_for(peak_rate)
                log(stage=name, step=step, not_finite=True, peak_rate=peak_rate)
        if now - saved > save_seconds and finite(kept):
            good = [each.detach().clone() for each in kept]
            save(progress)
            saved = now
    if not finite(kept):
        with torch.no_grad():
            torch._foreach_copy_(kept, good)
    save(clock.progress())
    return step


def finite(tensors: list[torch.Tensor]) -> bool:
    return bool(torch.stack([each.isfinite().all() for each in tensors]).all())
