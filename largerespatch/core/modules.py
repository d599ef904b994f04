"""A model's modules, each once, from the outside in.

As `torch.nn.Module.named_modules` has them, in half the time, since nothing is handed from level to level: all who look
for their sites walk over the whole model, once for each patch and again for each line of a plan.
"""

from typing import Any

from torch import nn


def named_modules(model: nn.Module, prefix: str = "") -> list[tuple[str, Any]]:
    """All modules of `model`, itself first, with their paths, which begin with `prefix`."""
    found: dict[nn.Module, str] = {}
    _visit(model, prefix, found)
    return [(path, module) for module, path in found.items()]


def modules_of(model: nn.Module) -> list[Any]:
    """The same without their paths."""
    return [module for _, module in named_modules(model)]


def _visit(module: nn.Module, path: str, found: dict[nn.Module, str]) -> None:
    if module in found:
        return
    found[module] = path
    for name, child in module._modules.items():
        if child is not None:
            _visit(child, f"{path}.{name}" if path else name, found)
