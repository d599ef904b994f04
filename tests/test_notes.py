"""What is noted on the way in: the step, whatever else was generated, and the size of the map."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from largerespatch.core.patching import PatchStack
from largerespatch.core.pieces import rehearsal
from largerespatch.techniques.notes import MapNote, MapNoting, StepNote, StepNoting


class Denoiser(torch.nn.Module):
    def forward(self, sample, timestep, encoder_hidden_states=None):
        return sample


def noted(timestep, *schedulers):
    note = StepNote()
    StepNoting(note, lambda: schedulers)(Denoiser().forward, 0, timestep)
    return note.step


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler])
def test_steps_count_up_by_one_per_distinct_timestep(kind):
    scheduler = kind()
    scheduler.set_timesteps(7)
    steps = [noted(timestep, scheduler) for timestep in scheduler.timesteps]
    assert sorted(set(steps)) == list(range(len(set(steps))))
    assert steps == sorted(steps)
    # asking again, in another order, for a whole batch, or in another dtype, changes nothing
    for change in (lambda t: t.expand(2), lambda t: t.clone(), lambda t: t.double(), float):
        assert [noted(change(timestep), scheduler) for timestep in scheduler.timesteps.flip(0)] == steps[::-1]


def test_without_a_schedule_the_timestep_itself_counts():
    assert noted(torch.tensor(41)) == 41
    assert noted(7.0) == 7


def test_a_schedule_that_changes_is_read_again():
    scheduler, note = DDIMScheduler(), StepNote()
    noting = StepNoting(note, lambda: [scheduler])
    for steps in (10, 25):
        scheduler.set_timesteps(steps)
        for index in (3, 7):
            noting(Denoiser().forward, 0, scheduler.timesteps[index])
            assert note.step == index
    scheduler.timesteps -= 1  # in its own memory
    noting(Denoiser().forward, 0, float(scheduler.timesteps[7]))
    assert note.step == 7
    scheduler.timesteps[8] = scheduler.timesteps[0] + 1
    noting(Denoiser().forward, 0, scheduler.timesteps[8])
    assert note.step == 0


def test_timesteps_of_the_schedule_are_not_read_one_by_one():
    """A number that comes from a device makes the host wait for all that was asked of the device before."""
    scheduler, note, reads = HeunDiscreteScheduler(), StepNote(), Reads()
    noting = StepNoting(note, lambda: [scheduler])
    scheduler.set_timesteps(9)
    with reads:
        for timestep in scheduler.timesteps[2:]:
            noting(Denoiser().forward, 0, timestep)
            noting(Denoiser().forward, 0, timestep.expand(4))
    assert note.step == 8 and reads.count == 0
    with reads:
        noting(Denoiser().forward, 0, scheduler.timesteps[5].clone())
    assert note.step == 3 and reads.count == 1


def test_where_the_host_would_wait_the_pipelines_own_timestep_counts():
    """Flux's pipelines, among others, divide a timestep by 1000 on the device, and say which it was. Numbers on torch's
    meta device cannot be read at all."""
    scheduler, note, current = DDIMScheduler(), StepNote(), []
    noting = StepNoting(note, lambda: [scheduler], scheduled=lambda part: 1000 * part, current=lambda: current[-1])
    scheduler.set_timesteps(9)
    for step, timestep in enumerate(scheduler.timesteps):
        current.append(timestep)
        noting(Denoiser().forward, 0, torch.empty(2, device="meta"))
        assert note.step == step
    noting(Denoiser().forward, 0, scheduler.timesteps[3] / 1000)  # which can be read, so it is
    assert note.step == 3
    for unknown in (None, scheduler.timesteps[4].clone()):
        current.append(unknown)
        with pytest.raises(RuntimeError, match="meta"):
            noting(Denoiser().forward, 0, torch.empty(2, device="meta"))


class Reads(TorchDispatchMode):
    """Counts single numbers that Python asks of tensors."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "call", [lambda m, t: m(0, t), lambda m, t: m(timestep=t, sample=0), lambda m, t: m(0, t, None)]
)
def test_the_timestep_is_found_positional_or_by_keyword(call):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    note, model = StepNote(), Denoiser()
    with PatchStack() as stack:
        stack.wrap(model, "forward", StepNoting(note, lambda: [scheduler]), "unet.forward")
        assert call(model, scheduler.timesteps[6]) == 0
    assert note.step == 6


def test_of_several_schedulers_the_one_counts_that_visits_the_timestep():
    """unCLIP's pipelines have one for each of their denoisers and none called `scheduler`."""
    coarse, fine = DDIMScheduler(), DDIMScheduler()
    coarse.set_timesteps(4)
    fine.set_timesteps(25)
    note, model = StepNote(), Denoiser()
    for schedulers in ([coarse, fine], [fine, coarse]):
        noting = StepNoting(note, lambda schedulers=schedulers: schedulers)
        noting(model.forward, 0, fine.timesteps[20])
        assert note.step == 20
        noting(model.forward, 0, torch.tensor(3))  # nobody's: the first one's
        assert note.step == len(schedulers[0].timesteps) - 1
    StepNoting(note, list)(model.forward, 0, 7)
    assert note.step == 7


def test_a_rehearsal_notes_no_step():
    note = StepNote(3)
    with rehearsal():
        StepNoting(note, list)(Denoiser().forward, 0, 500)
    assert note.step == 3


@pytest.mark.parametrize(("patch_size", "size"), [(1, (10, 6)), (2, (5, 3))])
def test_a_transformer_notes_the_map_that_it_is_given(patch_size, size):
    note = MapNote()
    noting = MapNoting(note, patch_size)
    assert noting(lambda hidden_states, scale: hidden_states * scale, torch.ones(1, 2, 10, 6), scale=3).mean() == 3
    assert note.size == size
