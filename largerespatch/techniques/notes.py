"""What is noted on the way in for the techniques further inside: which denoising step it is, how large the map."""

import inspect
from bisect import bisect_right
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


class Schedule:
    """The timesteps that a scheduler visits, read from its device once.

    `step` is a timestep's place among the distinct ones: a function of these alone, never of how often a model was
    called, so that guidance in two calls, two pipelines in turns and a second image see the same steps. What is visited
    twice (by Heun's method) counts once.
    """

    def __init__(self, timesteps: Any) -> None:
        self.timesteps = timesteps
        self.version = _version(timesteps)
        self._values: list[float] = torch.as_tensor(timesteps).flatten().tolist()
        self._distinct = sorted(set(self._values))

    def is_of(self, timesteps: Any) -> bool:
        return timesteps is self.timesteps and _version(timesteps) == self.version

    def number(self, timestep: torch.Tensor) -> float | None:
        """The first element of a part of the scheduler's own tensor, as pipelines pass on, without a wait for it."""
        whole = self.timesteps
        if not isinstance(whole, torch.Tensor) or not whole.is_contiguous() or timestep.dtype != whole.dtype:
            return None
        same = timestep.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        return self._values[timestep.storage_offset() - whole.storage_offset()] if same else None

    def visits(self, number: float) -> bool:
        return number in self._distinct

    def nearest(self, number: float) -> float:
        return min(self._distinct, key=lambda each: abs(each - number), default=number)

    def step(self, number: float) -> int:
        return len(self._distinct) - bisect_right(self._distinct, number)


def _known(timestep: Any, schedules: Sequence[Schedule]) -> float | None:
    """What any of `schedules` knows a timestep to be, without a wait for it."""
    told = (each.number(timestep) for each in schedules if isinstance(timestep, torch.Tensor))
    return next((number for number in told if number is not None), None)


def _version(timesteps: Any) -> int | None:
    """Changes when a tensor is written to, if anybody knows."""
    return timesteps._version if isinstance(timesteps, torch.Tensor) and not timesteps.is_inference() else None


class StepNoting:
    """Takes the place of a denoiser's ``forward`` and notes the step for the attentions inside it.

    `schedulers` are asked for at each call, since pipelines let users put in another one at any time. Of several the
    one counts that visits the timestep; without any the timestep is the step. `parameter` tells it, and `scheduled`
    makes it what the scheduler calls it; it may have been rounded on the way, so the nearest one counts. Where that
    would have the host wait for a device and the pipeline tells its `current` timestep, as many do, that one counts.
    """

    def __init__(
        self,
        note: StepNote,
        schedulers: Callable[[], Sequence[Any]],
        parameter: str = "timestep",
        scheduled: Callable[[float], float] | None = None,
        current: Callable[[], Any] = lambda: None,
    ) -> None:
        self.note = note
        self.schedulers = schedulers
        self.parameter = parameter
        self.scheduled = scheduled
        self.current = current
        self._known: list[Schedule] = []

    def __call__(self, original: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        timestep = inspect.signature(original).bind_partial(*args, **kwargs).arguments.get(self.parameter)
        if timestep is not None and not rehearsing():
            self._note(timestep)
        return original(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # values are for Python to see
    def _note(self, timestep: Any) -> None:
        visits = (getattr(each, "timesteps", None) for each in self.schedulers())
        self._known = schedules = [self._schedule(each) for each in visits if each is not None]
        number = self._number(timestep, schedules)
        visited = (each for each in schedules if each.visits(number))
        schedule = next(visited, schedules[0] if schedules else None)
        self.note.step = int(number) if schedule is None else schedule.step(number)

    def _number(self, timestep: Any, schedules: Sequence[Schedule]) -> float:
        """A timestep, in the scheduler's unit where there is one."""
        if isinstance(timestep, torch.Tensor):
            known = _known(timestep, schedules)
            current = _known(self.current(), schedules) if known is None and timestep.device.type != "cpu" else None
            if current is not None:
                return current
            timestep = timestep.flatten()[0] if known is None else known
        number = float(timestep)
        return schedules[0].nearest(self.scheduled(number)) if self.scheduled is not None and schedules else number

    def _schedule(self, timesteps: Any) -> Schedule:
        return next((each for each in self._known if each.is_of(timesteps)), None) or Schedule(timesteps)


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
