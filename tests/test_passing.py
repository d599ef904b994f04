"""What blocks may write over."""

import pytest
import torch
from torch import nn

from largerespatch.core.hosts import Host
from largerespatch.core.maps import StoredMap
from largerespatch.techniques.joint.passing import Passing


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedder = nn.Identity()

    def forward(self, x, others=()):
        return self.embedder(x)


@pytest.fixture
def given():
    return {"x": torch.zeros(2, 3), "others": [torch.zeros(4), {"deep": torch.zeros(5)}]}


def begun(model, given, forward=None):
    passing = Passing(model)
    with torch.no_grad():
        passing.begin(forward or model.forward, given)
    return passing


def test_what_the_model_made_is_free_and_what_it_was_given_is_not(given):
    passing = begun(Model(), given)
    assert passing.is_free(torch.zeros(2, 3))
    for tensor in (given["x"], given["x"][:, 1:], given["others"][0], given["others"][1]["deep"]):
        assert not passing.is_free(tensor)


@pytest.mark.parametrize("passing", [False, True])
def test_a_map_is_free_where_it_was_made_for_one_reader(given, passing):
    made = StoredMap.empty((1, 2, 3, 3), given["x"], Host("cpu:0"), passing)
    assert begun(Model(), given).is_free(made) == passing
    assert not Passing(Model()).is_free(made)


def test_nothing_is_free_where_it_may_be_wanted_again(given):
    made = torch.zeros(1)
    model = Model()
    assert not Passing(model).is_free(made)
    passing = Passing(model)
    with torch.enable_grad():
        passing.begin(model.forward, given)
    assert not passing.is_free(made)
    with model.embedder.register_forward_hook(lambda *_: None):
        assert not begun(model, given).is_free(made)
    with model.register_forward_pre_hook(lambda *_: None):
        assert not begun(model, given).is_free(made)
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not begun(model, given).is_free(made)
    assert not begun(model, given, forward=lambda x, others=(): x).is_free(made)
    assert begun(model, given).is_free(made)


def test_hooks_that_keep_nothing_are_told_from_others(given):
    from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading

    model, made = nn.Sequential(nn.Linear(2, 2)), torch.zeros(1)
    HookRegistry.check_if_exists_or_initialize(model[0]).register_hook(ModelHook(), "keeps")
    assert not begun(model, given).is_free(made)
    model[0]._diffusers_hook.remove_hook("keeps")
    apply_group_offloading(model, torch.device("cpu"), offload_type="leaf_level")
    assert begun(model, given).is_free(made)
