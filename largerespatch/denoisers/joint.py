"""What transformers share in which text and image tokens attend to one another: their blocks run tile by tile.

A family of these is one file with one class, which says

- `class_name`: the class of its models,
- `kinds`: the lists of blocks in its models, and where in these blocks' arguments and results tokens are,
- `told`: what pipelines tell it beside the sample, so that its memory can be told,

and where it is not as most are: `maps`, `sample`, `predict`, `timestep`, `scheduled`, `longest`, `cell`, `passes_on`;
`takes`, if several processes can share more than its blocks, and `ends`, if tokens can wait on the host.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.bands import Bands
from ..core.calls import current_timestep, schedulers_of
from ..core.checks import warn
from ..core.families import Order, Site, check_multiple, factor_of, unknown_call
from ..core.hosts import LEAST_BYTES, Host
from ..core.pieces import rehearsing
from ..techniques.joint.blocks import joint_sites
from ..techniques.joint.tokens import Kind, Size
from ..techniques.notes import StepNote, StepNoting
from ..techniques.padding import padding_sites
from ..techniques.shared_batch import batch_sites
from ..techniques.shared_maps import bands_of
from .any import AnyDenoiser, Call


class JointAttention(AnyDenoiser):
    """Those models of a family that several processes run together by means of diffusers are left as they are.

    `timestep` is the parameter that tells it. `passes_on` says whether the model uses the tokens that a block is given
    or gives for nothing but the next block, so that they need not be there twice; its ``forward`` is to be leaned on.
    `takes` are the arguments of a model in which image tokens have rows, and where (see `Tokens`). With the sample
    among them several processes share all that the model does, which must look from one token at others in its blocks
    alone; without it they share what these do. `of_all` are arguments that concern all samples, `joins` says whether
    what the model gives is a picture again, not what another model wants in bands. `ends` are the paths of modules that
    look at tokens of the image one by one, before its blocks and after them.
    """

    rank = 0
    class_name = ""
    timestep = "timestep"
    passes_on = False
    takes: Mapping[str, Any] = MappingProxyType({})
    of_all: Sequence[str] = ()
    joins = True
    ends: Sequence[str] = ()

    @property
    def shared(self) -> str:  # type: ignore[override]
        return self.class_name

    def can_be_shared(self, model: Any) -> bool:
        return not _is_shared(model)

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == self.class_name

    @abstractmethod
    def kinds(self, model: Any) -> Mapping[str, Kind]:
        """Where tokens are in the blocks of each list of blocks, by its path in the model."""

    def maps(self, model: Any, arguments: Mapping[str, Any]) -> Sequence[Size]:
        """(height, width), in tokens, of the image and of each reference after it; empty where that is not known.

        From the arguments of a model's call, by name. Here the patches of a latent ``[B, C, H, W]``.
        """
        return [patches(model, arguments)]

    def scheduled(self, timestep: float) -> float:
        """A timestep, as the model is told it, in the scheduler's unit."""
        return timestep

    def told(self, call: Call) -> dict[str, Any]:
        """What pipelines tell the model beside the sample, by name."""
        raise unknown_call(call.model)

    def predict(self, call: Call) -> torch.Tensor:
        result: torch.Tensor = call.model(self.sample(call), **self.told(call), return_dict=False)[0]
        return result

    def longest(self, model: Any) -> tuple[int, bool] | None:
        """The most latent pixels along an axis that positions are there for, and whether the model raises beyond."""
        return None

    def sites(self, model: Any, name: str, options: Any, pipe: Any) -> Iterator[Site]:
        if not _is_shared(model):
            note = StepNote()
            schedulers, current = partial(schedulers_of, pipe), partial(current_timestep, pipe)
            noting = StepNoting(note, schedulers, self.timestep, self.scheduled, current)
            yield Site(model, name, Order.STEP_NOTED, noting)
            maps = partial(self.maps, model)
            if options.process_group is not None:
                bands = bands_of(options)
                _check_heads(model, bands)
                yield from batch_sites(model, name, bands, self.joins, self.of_all)
            host = Host(least=LEAST_BYTES) if options.unet_offload == "maps" and self.joins else None
            kinds, ends = self.kinds(model), self.ends if self.joins else ()
            yield from joint_sites(
                model, name, options, note, kinds, maps, self.passes_on, self.takes, self.joins, host, ends
            )
        yield from padding_sites(model, name, options.padding_mode)

    def saves(self, option: str, value: Any) -> bool:
        """Blocks run tile by tile as it is, and no sample or skip connection waits for another."""
        return self.joins and (option, value) == ("unet_offload", "maps")

    def repeated(self, model: nn.Module) -> Iterator[nn.Module]:
        for path in self.kinds(model):
            blocks: Any = model.get_submodule(path)
            yield from blocks

    def cell(self, model: Any) -> int:
        """Latent pixels along each axis of which an image has to have whole multiples."""
        patch = getattr(model.config, "patch_size", 1)
        return patch if isinstance(patch, int) else 1

    def rows(self, model: Any) -> int:
        return self.cell(model)

    def check(self, model: Any, pipe: Any, height: int, width: int) -> None:
        for option, size in (("width", width), ("height", height)):
            check_multiple(option, size, self.cell(model) * factor_of(pipe))
        if _is_shared(model):
            warn(f"{type(model).__name__} is run by several processes together: it is left as it is")
        limit = self.longest(model)
        if limit is None or max(height, width) <= (most := limit[0] * factor_of(pipe)):
            return
        message = (
            f"width and height must be at most {most} sample pixels for {type(model).__name__}, which knows no "
            f"positions beyond; got {width}x{height}. Make the picture that large and enlarge it"
        )
        if limit[1]:
            raise ValueError(message)
        warn(message)


def patches(model: Any, arguments: Mapping[str, Any]) -> Size:
    """(height, width), in patches, of the latent ``[B, C, H, W]`` that a model is given."""
    height, width = arguments["hidden_states"].shape[-2:]
    return height // model.config.patch_size, width // model.config.patch_size


def _check_heads(model: Any, bands: Bands) -> None:
    """Where several heads share their keys a call may have more to say."""
    told = (getattr(model.config, name, None) for name in ("num_attention_heads", "n_heads"))
    heads = next((number for number in told if number is not None), bands.count)
    if heads < bands.count:
        raise ValueError(
            f"process_group must have at most {heads} processes for {type(model).__name__}, each of which does some of "
            f"as many heads of attention; got {bands.count}"
        )


def _is_shared(model: Any) -> bool:
    return getattr(model, "_parallel_config", None) is not None


_ASKED: ContextVar[Sequence[Size]] = ContextVar("asked", default=())


@contextmanager
def asked_for(*maps: Size) -> Iterator[None]:
    """Inside, ids that hold no data are those of the cells of these maps."""
    token = _ASKED.set(maps)
    try:
        yield
    finally:
        _ASKED.reset(token)


class Packed(JointAttention):
    """Those whose pipelines pack squares of four latent pixels into a token each, and tell the step from 0 to 1."""

    of_all: Sequence[str] = ("img_ids", "txt_ids")

    def scheduled(self, timestep: float) -> float:
        return 1000 * timestep

    def rows(self, model: Any) -> int:
        return 2

    def tokens(self, call: Call) -> int:
        """Of the image."""
        height, width = _packed(call)
        return height * width

    def sample(self, call: Call) -> torch.Tensor:
        return call.new(call.batch, self.tokens(call), call.model.config.in_channels)

    def predict(self, call: Call) -> torch.Tensor:
        with asked_for(_packed(call)):
            return super().predict(call)


def _packed(call: Call) -> Size:
    return call.latent[0] // 2, call.latent[1] // 2


def told_of_adapters(call: Call) -> dict[str, Any]:
    """What IP-Adapters look at, if the model has any."""
    images = call.adapter_images(call.batch)
    return {"joint_attention_kwargs": {"ip_adapter_image_embeds": images}} if images else {}


# By ids that are still there: at which version they were read, and the maps of each part of them.
_READ: MutableMapping[torch.Tensor, tuple[int, dict[Any, Sequence[Size]]]] = WeakTensorKeyDictionary()


def maps_of_ids(ids: torch.Tensor) -> Sequence[Size]:
    """The maps of tokens with ids ``[N, 3]`` of which (picture, row, column) each has; none where that is not so.

    Pipelines give the same ids, or a part of them, in every step. They are read anew only if they were written to
    since: the host has to wait for what it reads from a device.
    """
    if rehearsing():
        return _ASKED.get()
    if ids.is_inference():  # nobody knows whether these were written to
        return _read(ids)
    base = ids if ids._base is None else ids._base
    if base not in _READ or _READ[base][0] != ids._version:
        _READ[base] = ids._version, {}
    known = _READ[base][1]
    part = ids.storage_offset(), ids.shape, ids.stride()
    if part not in known:
        known[part] = _read(ids)
    return known[part]


def _read(ids: torch.Tensor) -> Sequence[Size]:
    pictures, *places = (ids[0] if ids.ndim == 3 else ids).detach().cpu().unbind(dim=-1)
    lengths = torch.unique_consecutive(pictures, return_counts=True)[1].tolist()
    maps = []
    for rows, columns in zip(*(torch.split(each, lengths) for each in places[-2:]), strict=True):
        width = int(torch.unique_consecutive(rows, return_counts=True)[1][0])
        if len(rows) % width:
            return ()
        rows, columns = rows.view(-1, width), columns.view(-1, width)
        if (rows != rows[:, :1]).any() or (columns != columns[:1]).any():
            return ()
        maps.append((len(rows), width))
    return maps
