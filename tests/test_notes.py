"""What is noted on the way in: the step, whatever else was generated, and the size of the map."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler

from largerespatch.core.patching import PatchStack
from largerespatch.core.pieces import rehearsal
from largerespatch.techniques.notes import MapNote, MapNoting, StepNote, StepNoting, step_index


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler])
def test_steps_count_up_by_one_per_distinct_timestep(kind):
    scheduler = kind()
    scheduler.set_timesteps(7)
    steps = [step_index(timestep, scheduler) for timestep in scheduler.timesteps]
    assert sorted(set(steps)) == list(range(len(set(steps))))
    assert steps == sorted(steps)
    # asking again, in another order and for a whole batch, changes nothing
    again = [step_index(timestep.expand(2), scheduler) for timestep in scheduler.timesteps.flip(0)]
    assert again == steps[::-1]


def test_without_a_schedule_the_timestep_itself_counts():
    assert step_index(torch.tensor(41), None) == 41
    assert step_index(7.0, object()) == 7


class Denoiser(torch.nn.Module):
    def forward(self, sample, timestep, encoder_hidden_states=None):
        return sample


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
