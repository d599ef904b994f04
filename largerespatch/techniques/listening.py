"""Hooks on what runs in pieces: which are the user's, who listens, and how not to be heard."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..core.patching import PatchStack
from ..core.weights import offload_hooks

# Where hooks come from that see to a module's weights, and neither look at nor keep what goes through it.
_OF_WEIGHTS = ("accelerate.hooks", "diffusers.hooks.group_offloading", "diffusers.hooks.layerwise_casting")


def is_of_user(hook: object) -> bool:
    """Of a module's own hooks: not one by which torch makes a weight of others (``weight_norm``, pruning, ...)."""
    return not type(hook).__module__.startswith("torch.nn.utils.")


def lookers(modules: Iterable[nn.Module]) -> list[Any]:
    """accelerate's and diffusers' hooks on some modules, but for those that see to weights alone."""
    hooks = (hook for module in modules for hook in offload_hooks(module))
    return [hook for hook in hooks if type(hook).__module__ not in _OF_WEIGHTS]


def listeners(model: nn.Module) -> bool:
    """Whether a user's hook on any module of `model`, or on all modules there are, may keep what it is given."""
    return listen_everywhere() or any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def listen_everywhere() -> bool:
    """Whether there are hooks on all modules there are."""
    return bool(nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)


def silence(stack: PatchStack, paths: dict[str, nn.Module], kind: str = "_forward_hooks") -> list[str]:
    """Hooks of these modules are not called while `stack` is on. Returns the paths of those that have any."""
    hooked = {path: module for path, module in paths.items() if vars(module)[kind]}
    for path, module in hooked.items():
        stack.set(module, kind, OrderedDict(), f"{path}.{kind}")
    return list(hooked)
