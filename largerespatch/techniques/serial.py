"""A batch in turns: exact, since nothing in these models looks from one sample at another."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..core.maps import JoinedMap
from ..core.modules import modules_of
from ..core.pieces import assemble, rehearsing
from ..core.planes import Map
from ..core.weights import weights_found


class SerialBatch:
    """Takes the place of a denoiser's ``forward`` and runs the samples of a batch one after another.

    The first parameter, ``[B, ...]``, says how many there are. Where an attention processor may look across samples
    (perturbed-attention guidance does, and one that diffusers' models do not define might), the batch stays whole and
    a warning names the processor. Pipelines put such processors in while they run, hence the question at each call.
    Weights that come to the device for a layer's call come again for each sample: not all of a model's can stay there.
    `why` is what asks for it.
    """

    def __init__(self, model: nn.Module, why: str = "unet_serial") -> None:
        self.model = model
        self.why = why

    def __call__(self, original: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        arguments = inspect.signature(original).bind_partial(*args, **kwargs).arguments
        samples = next(iter(arguments.values()), None)
        if not isinstance(samples, torch.Tensor) or samples.ndim == 0 or len(samples) <= 1:
            return original(*args, **kwargs)
        if foreign := looking_across(self.model):
            if not rehearsing():
                warnings.warn(
                    f"{self.why}: {', '.join(foreign)} may look across the samples of a batch, so {len(samples)} "
                    f"samples go through {type(self.model).__name__} at once and need as much memory",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return original(*args, **kwargs)
        batch = len(samples)
        structure: Any = None

        def run(index: int) -> tuple[Any, ...]:
            nonlocal structure
            own_args, own_kwargs = take_sample((args, kwargs), index, batch)
            leaves, structure = tree_flatten(original(*own_args, **own_kwargs))
            return tuple(leaves)

        with weights_found(self.model.modules()):
            rows = assemble(
                range(batch),
                run,
                place=lambda index: index,
                make=lambda leaves: tuple(_rows_for(leaf, batch) for leaf in leaves),
            )
        return tree_unflatten([_joined(each) for each in rows], structure)


def looking_across(model: nn.Module) -> list[str]:
    """The kinds of a model's attention processors that may look from one sample at another."""
    return sorted({type(each).__name__ for each in _processors(model) if not _is_per_sample(each)})


def _processors(model: nn.Module) -> list[object]:
    return [module.processor for module in modules_of(model) if hasattr(module, "processor")]


def _is_per_sample(processor: object) -> bool:
    kind = type(processor)
    return kind.__module__.startswith("diffusers.models.") and not kind.__name__.startswith("PAG")


def take_sample(value: Any, index: int, batch: int, key: object = None) -> Any:
    """What concerns sample `index` of `batch` in an argument, however nested.

    Tensors ``[k * batch, ...]`` hold k rows for each sample in order (frames of a video, often k = 1). Any other
    tensor, like one with a first dimension of 1, concerns all samples. So does a tensor of IP-Adapter masks, which
    counts adapters (a list of them holds tensors that are read like all others).
    """
    return take_samples(value, index, index + 1, batch, key)


def take_samples(value: Any, first: int, last: int, batch: int, key: object = None) -> Any:
    """The same for the samples from `first` to `last`."""
    match value:
        case torch.Tensor():
            if value.ndim == 0 or len(value) % batch or key == "ip_adapter_masks":
                return value
            rows = len(value) // batch
            return value[first * rows : last * rows]
        case dict():
            return {each: take_samples(value[each], first, last, batch, each) for each in value}
        case list() | tuple():
            return type(value)([take_samples(each, first, last, batch) for each in value])
    return value


def _rows_for(leaf: Any, batch: int) -> Any:
    """Where what each sample gives in the place of `leaf` goes; of a map that may wait elsewhere its parts are kept."""
    if isinstance(leaf, torch.Tensor) and leaf.ndim and not isinstance(leaf, Map):
        return leaf.new_empty(batch, *leaf.shape)
    return [leaf] * batch


def _joined(rows: Any) -> Any:
    """The inverse of `take_sample`. What is not a tensor is taken from the first sample."""
    if isinstance(rows, torch.Tensor):
        return rows.flatten(0, 1)
    return JoinedMap.of(rows, 0) if isinstance(rows[0], Map) else rows[0]
