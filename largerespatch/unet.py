"""What is swapped into a U-Net, a ControlNet or a transformer as a whole: the step it notes, its batch in turns, its
skip connections off the device."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from .attention import StepNote
from .offload import Joined, Link, OffMap, Waiting
from .rehearsal import rehearsing


def step_index(timestep: object, scheduler: Any) -> int:
    """The place of `timestep` in the scheduler's present schedule, counted in distinct timesteps.

    A function of the two alone, never of how often a model was called: guidance in two calls, two pipelines in
    turns and a second image see the same steps. Schedulers that visit a timestep twice (Heun) count it once.
    """
    value = float(torch.as_tensor(timestep).flatten()[0])
    schedule = getattr(scheduler, "timesteps", None)
    if schedule is None:
        return int(value)
    return int((torch.unique(torch.as_tensor(schedule)) > value).sum())


class StepNoting:
    """Takes the place of a denoiser's ``forward`` and notes the step for the attentions inside it.

    `scheduler` is asked for at each call, since pipelines let users put in another one at any time.
    """

    def __init__(self, note: StepNote, scheduler: Callable[[], Any]) -> None:
        self.note = note
        self.scheduler = scheduler

    def __call__(self, original: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        arguments = inspect.signature(original).bind_partial(*args, **kwargs).arguments
        if arguments.get("timestep") is not None and not rehearsing():
            self.note.step = step_index(arguments["timestep"], self.scheduler())
        return original(*args, **kwargs)


class SerialBatch:
    """Takes the place of a denoiser's ``forward`` and runs the samples of a batch one after another.

    Exact, since nothing in these models looks from one sample at another. The first parameter, ``[B, ...]``, says
    how many there are. Where an attention processor may look across samples (perturbed-attention guidance does, and
    one that diffusers' models do not define might), the batch stays whole and a warning names the processor.
    Pipelines put such processors in while they run, hence the question at each call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, original: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        arguments = inspect.signature(original).bind_partial(*args, **kwargs).arguments
        samples = next(iter(arguments.values()), None)
        if not isinstance(samples, torch.Tensor) or samples.ndim == 0 or len(samples) <= 1:
            return original(*args, **kwargs)
        if foreign := sorted({type(each).__name__ for each in _processors(self.model) if not _is_per_sample(each)}):
            if not rehearsing():
                warnings.warn(
                    f"unet_serial: {', '.join(foreign)} may look across the samples of a batch, so {len(samples)} "
                    f"samples go through {type(self.model).__name__} at once and need as much memory",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return original(*args, **kwargs)
        batch = len(samples)
        joined = None
        for index in range(batch):
            own_args, own_kwargs = take_sample((args, kwargs), index, batch)
            joined = put_sample(joined, original(*own_args, **own_kwargs), index, batch)
        return joined


def _processors(model: nn.Module) -> list[object]:
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


def _is_per_sample(processor: object) -> bool:
    kind = type(processor)
    return kind.__module__.startswith("diffusers.models.") and not kind.__name__.startswith("PAG")


def take_sample(value: Any, index: int, batch: int, key: object = None) -> Any:
    """What concerns sample `index` of `batch` in an argument, however nested.

    Tensors ``[k * batch, ...]`` hold k rows for each sample in order (frames of a video, often k = 1). Any other
    tensor, like one with a first dimension of 1, concerns all samples. So does a tensor of IP-Adapter masks, which
    counts adapters (a list of them holds tensors that are read like all others).
    """
    match value:
        case torch.Tensor():
            if value.ndim == 0 or len(value) % batch or key == "ip_adapter_masks":
                return value
            rows = len(value) // batch
            return value[index * rows : (index + 1) * rows]
        case dict():
            return {each: take_sample(value[each], index, batch, each) for each in value}
        case list() | tuple():
            return type(value)([take_sample(each, index, batch) for each in value])
    return value


def put_sample(joined: Any, result: Any, index: int, batch: int) -> Any:
    """The inverse of `take_sample`, one result after another into tensors that are allocated once.

    Returns `joined`, which is None before the first result. What is not a tensor is taken from the first one.
    """
    match result:
        case OffMap():
            before = joined.parts if isinstance(joined, Joined) else [] if joined is None else [joined]
            return Joined.of([*before, result], 0)
        case torch.Tensor() if result.ndim:
            rows = len(result)
            if joined is None:
                joined = result.new_empty(rows * batch, *result.shape[1:])
            joined[index * rows : (index + 1) * rows] = result
            return joined
        case dict():  # a ModelOutput is one
            parts = {each: put_sample(joined and joined[each], result[each], index, batch) for each in result}
            return type(result)(**parts)
        case list() | tuple():
            before = joined or [None] * len(result)
            return type(result)(put_sample(*each, index, batch) for each in zip(before, result, strict=True))
    return result if joined is None else joined


class Offloading:
    """Takes the place of the ``forward`` of a module that makes or reads maps which leave the device. Exact.

    Where it `makes` a skip connection, or the input of an up block (which the U-Net holds on to until that block is
    done), it returns a `Waiting` map. The map leaves when the module that reads it next is done. `at_once` is for
    what nothing else reads soon: the residuals that a ControlNet makes.
    """

    def __init__(self, link: Link, makes: bool = False, at_once: bool = False) -> None:
        self.link = link
        self.makes = makes
        self.at_once = at_once

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args and isinstance(args[0], OffMap) else None
        if given is not None and self.at_once:
            args = (given.fetched(), *args[1:])  # for this reader alone, not to stay
        result = original(*args, **kwargs)
        if given is not None:
            given.leave()
        if not self.makes:
            return result
        if isinstance(result, tuple):  # a transformer's
            return (self._waiting(result[0]), *result[1:])
        return self._waiting(result)

    def _waiting(self, plane: Any) -> Any:
        if not self.link.moves(plane):
            return plane
        waiting = Waiting.on_device(plane, self.link)
        if self.at_once:
            waiting.leave()
        return waiting


def offloadings(model: nn.Module, link: Link) -> Iterator[tuple[str, nn.Module, Offloading]]:
    """Path, module and `Offloading` of all that makes or reads a skip connection in a U-Net or a ControlNet."""
    from diffusers import UNet2DConditionModel  # here, not above: it brings transformers along
    from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, DownBlock2D

    makers: dict[nn.Module, Offloading] = {}
    owners: list[Any] = list(model.modules())
    for owner in owners:
        match owner:
            case UNet2DConditionModel():
                makers |= dict.fromkeys([owner.conv_in, *owner.up_blocks[:-1]], Offloading(link, makes=True))
            case CrossAttnDownBlock2D() | DownBlock2D():
                last = owner.resnets if isinstance(owner, DownBlock2D) else owner.attentions
                makers |= dict.fromkeys([*last, *(owner.downsamplers or ())], Offloading(link, makes=True))
            case _ if hasattr(owner, "controlnet_down_blocks"):
                makers |= dict.fromkeys(owner.controlnet_down_blocks, Offloading(link, makes=True, at_once=True))
    for path, module in model.named_modules():
        if module in makers:
            yield path, module, makers[module]
        elif isinstance(module, ResnetBlock2D | Downsample2D):
            yield path, module, Offloading(link)
