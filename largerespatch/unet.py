"""What is swapped into a U-Net, a ControlNet or a transformer as a whole: noting the denoising step."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .attention import StepNote


def step_index(timestep: object, scheduler: Any) -> int:
    """The place of `timestep` in the scheduler's present schedule, counted in distinct timesteps.

    A function of the two alone, never of how often a model was called: guidance in two calls, two pipelines in
    turns and a second image see the same steps. Schedulers that visit a timestep twice (Heun) count it once.
    """
    value = float(torch.as_tensor(timestep).flatten()[0])
    schedule = getattr(scheduler, "timesteps", None)
    if schedule is None:
        return int(value)
    return int((torch.unique(torch.as_tensor(schedule)) > value).sum())


class StepNoting:
    """Takes the place of a denoiser's ``forward`` and notes the step for the attentions inside it.

    `scheduler` is asked for at each call, since pipelines let users put in another one at any time.
    """

    def __init__(self, note: StepNote, scheduler: Callable[[], Any]) -> None:
        self.note = note
        self.scheduler = scheduler

    def __call__(self, original: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        arguments = inspect.signature(original).bind_partial(*args, **kwargs).arguments
        if arguments.get("timestep") is not None:
            self.note.step = step_index(arguments["timestep"], self.scheduler())
        return original(*args, **kwargs)
