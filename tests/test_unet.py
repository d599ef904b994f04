import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler

from largerespatch.attention import StepNote
from largerespatch.patching import PatchStack
from largerespatch.unet import StepNoting, step_index


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
        stack.wrap(model, "forward", StepNoting(note, lambda: scheduler), "unet.forward")
        assert call(model, scheduler.timesteps[6]) == 0
    assert note.step == 6
