"""Where the models of a pipeline run, and which weights are on a device at once."""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..core.families import families_in, models_of
from ..core.modules import modules_of
from ..core.weights import offload_hooks

HOST = "cpu"


def host_bytes() -> int | None:
    """The memory that the machine has; None where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _device_of_hook(hook: Any) -> torch.device | None:
    device = getattr(hook, "execution_device", None)
    group = getattr(hook, "group", None)
    device = getattr(group, "onload_device", device)
    return None if device is None else torch.device(device if not isinstance(device, int) else f"cuda:{device}")


def device_of(model: nn.Module) -> torch.device:
    """Where a model runs."""
    for module in modules_of(model):
        for hook in offload_hooks(module):
            device = _device_of_hook(hook)
            if device is not None:
                return device
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device(HOST) if first is None else first.device


def execution_device(pipe: Any) -> torch.device:
    """Where the denoiser runs, else the VAE. (What diffusers says depends on where text encoders wait.)"""
    staged = [(model, family.stages) for model, family in families_in(pipe).values()]
    models = [model for model, stages in staged if "step" in stages] or [model for model, stages in staged if stages]
    models += models_of(pipe).values()
    return device_of(models[0]) if models else torch.device(HOST)


def _bytes(tensors: Iterator[torch.Tensor]) -> int:
    """Of the storages that tensors lie in; shared ones count once. Storages on ``meta`` count what they stand for."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _weights(*modules: nn.Module, recurse: bool = True) -> Iterator[torch.Tensor]:
    """Parameters and buffers; what several modules share comes several times."""
    for module in modules:
        for each in modules_of(module) if recurse else (module,):
            held = (*each._parameters.values(), *each._buffers.values())
            yield from (tensor for tensor in held if tensor is not None)


def _come_with(group: Any) -> Iterator[torch.Tensor]:
    """What a group of diffusers' group offload consists of."""
    return chain(_weights(*group.modules), group.parameters, group.buffers)


def _come_for(module: nn.Module) -> Iterator[torch.Tensor]:
    """What hooks bring to the device for a call of `module`."""
    for hook in offload_hooks(module):
        if (group := getattr(hook, "group", None)) is not None:  # diffusers' group offload
            yield from _come_with(group)
        elif type(hook).__name__ == "CpuOffload":  # accelerate's, of whole models
            yield from _weights(module)
        elif getattr(hook, "offload", False):  # accelerate's, of single layers
            yield from _weights(module, recurse=getattr(hook, "place_submodules", False))


def _is_visitor(model: nn.Module) -> bool:
    """Whether anything of it comes to the device only for a call."""
    return any(next(_come_for(module), None) is not None for module in modules_of(model))


def _visitors(model: nn.Module, holds: Sequence[Sequence[nn.Module]] = ()) -> list[int]:
    """Bytes of the pieces of a model that come to the device only while they run.

    What comes for a module is there with what came for the modules that it is in. What comes for all modules of one of
    `holds` is there at once, at most: see `Site.holds`. With streams the next group comes while one runs.
    """
    come = {module: list(_come_for(module)) for module in modules_of(model)}
    outer = {module: inside for *inside, module in _chains(model)}

    def at_once(called: Sequence[nn.Module]) -> int:
        there = {*called, *chain.from_iterable(outer[module] for module in called)}
        return _bytes(chain.from_iterable(come[module] for module in there))

    groups = (getattr(hook, "group", None) for module in come for hook in offload_hooks(module))
    ahead = [_bytes(_come_with(group)) for group in groups if getattr(group, "stream", None) is not None]
    calls = ([module] for module, weights in come.items() if weights)
    return [at_once(called) + max(ahead, default=0) for called in (*calls, *holds)]


def _chains(model: nn.Module, outer: tuple[nn.Module, ...] = ()) -> Iterator[tuple[nn.Module, ...]]:
    """Of each module in `model`, the modules that it is in, from the outside in, and itself."""
    yield (*outer, model)
    for child in model.children():
        yield from _chains(child, (*outer, model))


def _exactly(device: torch.device) -> tuple[str, int]:
    """Type and number of a device; one without a number is the current one of its type."""
    if device.index is not None or device.type == HOST:
        return device.type, device.index or 0
    try:
        backend = torch.get_device_module(device)
    except RuntimeError:  # there is none for fake devices
        return device.type, 0
    current = getattr(backend, "current_device", None)
    return device.type, current() if current is not None and backend.is_available() else 0


def weights_now(pipe: Any, device: torch.device) -> int:
    """Bytes of weights on `device` at this moment."""
    weights = chain.from_iterable(map(_weights, models_of(pipe).values()))
    return _bytes(_on(device, weights))


def _on(device: torch.device, weights: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    place = _exactly(device)
    exactly = cache(_exactly)  # for the length of this: which one is current may change
    return (weight for weight in weights if exactly(weight.device) == place)


def weights_on(pipe: Any, device: torch.device, options: Any = None) -> int:
    """Bytes of weights on `device` at once: all that stay there and the largest piece that visits it.

    `options` are those of a patch that is on, which has some visitors stay longer (see `Site.holds`); None: there is no
    patch.
    """
    models = models_of(pipe)
    here = {name: model for name, model in models.items() if _exactly(device_of(model)) == _exactly(device)}
    visiting = {name: model for name, model in here.items() if _is_visitor(model)}
    holds = _holds(pipe, options) if visiting else {}
    visitors = {name: _visitors(model, holds.get(name, ())) for name, model in visiting.items()}
    staying = (_on(device, _weights(model)) for name, model in models.items() if name not in visiting)
    return _bytes(chain.from_iterable(staying)) + max(chain.from_iterable(visitors.values()), default=0)


def _holds(pipe: Any, options: Any) -> dict[str, list[Sequence[nn.Module]]]:
    """By component name, what all sites of a patch with these `options` hold."""
    if options is None:
        return {}
    return {
        name: [held for site in family.sites(model, name, options, pipe) for held in site.holds]
        for name, (model, family) in families_in(pipe).items()
    }
