"""Weights that come to a device for each call of a module and leave it afterwards, as hooks of accelerate (sequential
offload) and diffusers (group offload) have it; and how they stay for as long as pieces of a map go through. Exact.

A loop over pieces calls a module once for each. Its weights would come and go as often; and a group whose coming the
group before it sees to, on a stream of its own, would not come a second time at all (in diffusers 0.36).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from .patching import PatchStack
from .pieces import alike, rehearsing

# What holding weights must know the inside of: that accelerate's hook moves weights where it has `offload`, and looks
# that up at each call; that diffusers' calls ``group.onload_`` and ``group.offload_``, and has the next group's wait
# for its own; that what notes the order of calls does so by a callback.
LEANS_ON = (
    "accelerate.hooks.AlignDevicesHook.pre_forward",
    "accelerate.hooks.AlignDevicesHook.post_forward",
    "diffusers.hooks.group_offloading.GroupOffloadingHook.pre_forward",
    "diffusers.hooks.group_offloading.GroupOffloadingHook.post_forward",
    "diffusers.hooks.group_offloading.LayerExecutionTrackerHook.pre_forward",
)


def offload_hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's and diffusers' hooks on `module`, those that move weights for its calls among them."""
    hook = vars(module).get("_hf_hook")
    yield from getattr(hook, "hooks", (hook,) if hook is not None else ())
    registry = vars(module).get("_diffusers_hook")
    yield from registry.hooks.values() if registry is not None else ()


@contextmanager
def weights_held(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, what comes to the device for a call of one of the `modules` stays there until the end.

    So hooks see many calls as if they were one. What is not called is not brought; what was there before and is not
    called leaves when it would. One may be inside another. Afterwards, also after an exception, the hooks are as they
    were, and all that was brought or should have left has left.
    """
    modules = list(modules)
    groups: dict[int, _HeldGroup] = {}  # several modules may share one
    with ExitStack() as leaving, PatchStack() as stack:
        for module in modules:
            for hook in offload_hooks(module):
                if getattr(hook, "offload", False):
                    _hold_layer(hook, module, stack, leaving)
                elif hasattr(hook, "execution_order_update_callback"):
                    stack.wrap(hook, "execution_order_update_callback", _Once(), f"{type(hook).__name__}'s callback")
                for name in ("group", "next_group"):  # the last one's next is of a module that is called afterwards
                    if (group := getattr(hook, name, None)) is not None and id(group) not in groups:
                        groups[id(group)] = _HeldGroup(group, stack, leaving)
        with weights_found(modules):
            yield


@contextmanager
def weights_found(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, every call of one of the `modules` finds its weights there, though no group before foresaw the call."""
    with PatchStack() as stack:
        for module in modules:
            for hook in offload_hooks(module):
                if (group := getattr(hook, "group", None)) is not None:
                    stack.wrap(hook.fn_ref, "pre_forward", partial(_bring, group), f"{type(hook).__name__}.pre_forward")
        yield


def _bring(group: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a hook does before its module, and then what diffusers 0.36 leaves out."""
    given = original(*args, **kwargs)
    first = next(chain(group.parameters, *(module.parameters() for module in group.modules)), None)
    if first is not None and first.device == group.offload_device != group.onload_device:
        group.onload_()
        if group.stream is not None:
            group.stream.synchronize()
    return given


def _hold_layer(hook: Any, module: nn.Module, stack: PatchStack, leaving: ExitStack) -> None:
    """accelerate's hook of one module: from its first call on it moves nothing but what the module is given."""

    def bring(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = original(*args, **kwargs)
        if hook.offload:
            leaving.callback(hook.post_forward, module, None)
            stack.set(hook, "offload", False, f"{type(hook).__name__}.offload")
        return given

    stack.wrap(hook, "pre_forward", bring, f"{type(hook).__name__}.pre_forward")


class _HeldGroup:
    """A group of diffusers' group offload that, once it has come, does not leave before the end."""

    def __init__(self, group: Any, stack: PatchStack, leaving: ExitStack) -> None:
        self.group = group
        self.came = self.leaves = False
        stack.wrap(group, "onload_", self.onload, "group.onload_")
        stack.wrap(group, "offload_", self.offload, "group.offload_")
        leaving.callback(self.leave)

    def onload(self, original: Callable[[], None]) -> None:
        if not self.came:
            original()
        elif self.group.stream is not None:
            self.group.stream.synchronize()  # as the original does, for the group before
        self.came, self.leaves = True, False

    def offload(self, original: Callable[[], None]) -> None:
        self.came = self.leaves = True

    def leave(self) -> None:
        if self.leaves:
            self.group.offload_()


class _Once:
    """Takes the place of something that is to be called once."""

    def __init__(self) -> None:
        self.called = False

    def __call__(self, original: Callable[[], None]) -> None:
        if not self.called:
            self.called = True
            original()


class Holding:
    """`technique` with the weights of `module` held for the length of a call."""

    def __init__(self, module: nn.Module, technique: Callable[..., Any]) -> None:
        self.module = module
        self.technique = technique
        self.applies: Callable[..., bool] | None = getattr(technique, "applies", None)
        self.repeats: bool = getattr(getattr(technique, "strips", None), "repeats", False)

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # hooks are not traced into a graph
            return self.technique(original, *args, **kwargs)
        if rehearsing():  # no weights come and go
            if self.repeats:
                return alike(self, partial(self.technique, original), *args, **kwargs)
            return self.technique(original, *args, **kwargs)
        with weights_held(self.module.modules()):
            return self.technique(original, *args, **kwargs)
