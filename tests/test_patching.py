"""Contract 1 at its root: what PatchStack replaces it puts back, whatever happens in between."""

import pytest
import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import nn

from largerespatch.core.patching import PatchStack


class Model:
    scale = 2

    def __init__(self):
        self.first = 1
        self.own = "own"
        self.last = 3

    def forward(self, x, *, offset=0):
        """Scale and shift."""
        return self.scale * x + offset


def state(target):
    return [(name, id(value)) for name, value in vars(target).items()]


def test_own_and_inherited_attributes_come_back_in_their_old_order():
    model = Model()
    before = state(model)
    with PatchStack() as stack:
        stack.set(model, "own", "ours", "model.own")
        stack.set(model, "scale", 5, "model.scale")
        stack.set(model, "own", "ours again", "model.own")
        assert (model.own, model.scale) == ("ours again", 5)
    assert state(model) == before
    assert (model.own, model.scale) == ("own", 2)


def test_wrap_hands_the_original_to_the_replacement_and_keeps_its_signature():
    model = Model()
    with PatchStack() as stack:
        stack.wrap(model, "forward", lambda original, x, **kwargs: -original(x + 1, **kwargs), "model.forward")
        assert model.forward(3, offset=10) == -(2 * 4 + 10)
        assert model.forward.__doc__ == "Scale and shift."
    assert model.forward(3) == 6
    assert "forward" not in vars(model)


def test_a_wrapper_that_was_kept_is_inert_after_undo():
    model = Model()
    stack = PatchStack()
    stack.wrap(model, "forward", lambda original, x: -original(x), "model.forward")
    kept = model.forward
    assert kept(3) == -6
    stack.undo()
    assert kept(3) == 6


def test_wrapping_an_own_attribute_sets_it_back():
    model = Model()
    model.forward = hooked = lambda x: 100 * x
    with PatchStack() as stack:
        stack.wrap(model, "forward", lambda original, x: original(x) + 1, "model.forward")
        assert model.forward(2) == 201
    assert vars(model)["forward"] is hooked


def test_undo_runs_after_an_exception_and_a_second_one_is_harmless():
    model, stack = Model(), PatchStack()
    before = state(model)
    with pytest.raises(KeyboardInterrupt), stack:
        stack.set(model, "own", "ours", "model.own")
        raise KeyboardInterrupt
    assert state(model) == before
    model.own = "somebody's"
    stack.undo()
    assert model.own == "somebody's"


@pytest.mark.parametrize("attribute", ["own", "scale"])
def test_an_undo_that_is_interrupted_can_be_finished(attribute):
    model, stack = Model(), PatchStack()
    before = state(model)
    stack.set(model, "first", "ours", "model.first")
    stack.set(model, attribute, "ours", f"model.{attribute}")
    # As if interrupted after the restoring write, before it was noted.
    if attribute == "own":
        model.own = "own"
    else:
        del model.scale
    stack.undo()
    assert state(model) == before


def test_what_others_put_over_a_replacement_stays_and_is_named():
    model, other = Model(), Model()
    before = state(other)
    stack = PatchStack()
    stack.set(model, "own", "ours", "model.own")
    stack.wrap(model, "forward", lambda original, x: original(x), "model.forward")
    stack.set(other, "own", "ours", "other.own")
    model.forward = theirs = lambda x: 0
    with pytest.raises(RuntimeError, match=r"by other code.*: model\.forward\."):
        stack.undo()
    assert vars(model)["forward"] is theirs
    assert model.own == "own"
    assert state(other) == before
    assert not stack.active
    stack.undo()


def test_an_overlaid_replacement_only_warns_when_another_exception_is_on_its_way():
    model, stack = Model(), PatchStack()
    with pytest.warns(RuntimeWarning, match=r"model\.own"), pytest.raises(ZeroDivisionError), stack:
        stack.set(model, "own", "ours", "model.own")
        model.own = "theirs"
        raise ZeroDivisionError
    assert model.own == "theirs"


class Halving(ModelHook):
    def post_forward(self, module, output):
        return output / 2


class Negating(ModelHook):
    def new_forward(self, module, x):
        return -self.fn_ref.original_forward(x)


@pytest.mark.parametrize("hooks", [[Halving], [Negating], [Negating, Halving], [Halving, Negating, Halving]])
@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("removed", [False, True])
def test_hooks_of_diffusers_may_come_and_go_while_a_replacement_is_on(hooks, share, removed):
    """One goes by putting back the forward that it found, over whatever is there now."""
    module, x = nn.Identity(), torch.ones(1)
    registry, before = HookRegistry.check_if_exists_or_initialize(module), int(share * len(hooks))
    outputs = [x]
    for i, hook in enumerate(hooks[:before]):
        registry.register_hook(hook(), str(i))
        outputs.append(module(x))
    with PatchStack() as stack:
        stack.wrap(module, "forward", lambda original, x: original(10 * x), "module.forward")
        assert torch.equal(module(x), 10 * outputs[-1])
        for i, hook in enumerate(hooks[before:], before):
            registry.register_hook(hook(), str(i))
            outputs.append(module(x) / 10)
        while removed and registry._hook_order:
            registry.remove_hook(registry._hook_order[-1])
            outputs.pop()
            assert torch.equal(module(x), 10 * outputs[-1])
    assert torch.equal(module(x), outputs[-1])
    held = [value for holder in (module, *registry._fn_refs) for value in vars(holder).values()]
    assert not any("PatchStack" in getattr(value, "__qualname__", "") for value in held)
