"""Hooks of the user on what runs in pieces: who listens, and how not to be heard."""

from collections import OrderedDict

from torch import nn

from ..core.patching import PatchStack


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
