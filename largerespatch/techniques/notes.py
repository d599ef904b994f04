"""What is noted on the way in for the techniques further inside: which denoising step it is, how large the map."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.pieces import rehearsing


@dataclass
class StepNote:
    """Which denoising step a model was last called for."""

    step: int = 0


@dataclass
class MapNote:
    """(height, width), in tokens, of the feature map that a transformer was last given."""

    size: tuple[int, int] | None = None


def step_index(timestep: object, scheduler: Any) -> int:
    """The place of `timestep` in the scheduler's present schedule, counted in distinct timesteps.

    A function of the two alone, never of how often a model was called: guidance in two calls, two pipelines in
    turns and a second image see the same steps. Schedulers that visit a timestep twice (Heun) count it once.
    """
    value = _number(timestep)
    schedule = getattr(scheduler, "timesteps", None)
    if schedule is None:
        return int(value)
    return int((torch.unique(torch.as_tensor(schedule)) > value).sum())


class StepNoting:
    """Takes the place of a denoiser's ``forward`` and notes the step for the attentions inside it.

    `schedulers` are asked for at each call, since pipelines let users put in another one at any time. Of several the
    one counts that visits the timestep.
    """

    def __init__(self, note: StepNote, schedulers: Callable[[], Sequence[Any]]) -> None:
        self.note = note
        self.schedulers = schedulers

    def __call__(self, original: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        arguments = inspect.signature(original).bind_partial(*args, **kwargs).arguments
        timestep = arguments.get("timestep")
        if timestep is not None and not rehearsing():
            schedulers = self.schedulers()
            visiting = (each for each in schedulers if _visits(each, timestep))
            self.note.step = step_index(timestep, next(visiting, schedulers[0] if schedulers else None))
        return original(*args, **kwargs)


def _visits(scheduler: Any, timestep: object) -> bool:
    schedule = getattr(scheduler, "timesteps", None)
    return schedule is not None and bool((torch.as_tensor(schedule) == _number(timestep)).any())


def _number(timestep: object) -> float:
    return float(torch.as_tensor(timestep).flatten()[0])


class MapNoting:
    """Takes the place of a transformer's ``forward`` and notes the map's size for the attentions inside it.

    They receive ``[B, height * width, C]`` and could not tell the shape. The note is kept after the call, so that
    blocks recomputed by gradient checkpointing still find it.
    """

    def __init__(self, note: MapNote, patch_size: int) -> None:
        self.note = note
        self.patch_size = patch_size

    def __call__(
        self, original: Callable[..., Any], hidden_states: torch.Tensor, *args: object, **kwargs: object
    ) -> Any:
        height, width = hidden_states.shape[-2:]
        self.note.size = (height // self.patch_size, width // self.patch_size)
        return original(hidden_states, *args, **kwargs)
