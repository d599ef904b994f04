"""Denoisers of whatever kind: all of their modules that a technique knows, and the frame of a step's call."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from ..core.calls import (
    PROMPT_TOKENS,
    current_timestep,
    default_of,
    guidance_batch,
    latent_size,
    nets_of,
    new_like,
    schedulers_of,
    sees_image,
)
from ..core.families import Family, Order, Site, factor_of, register, unknown_call
from ..core.modules import modules_of
from ..techniques.attention.sites import attends_cells, attends_map, attention_sites
from ..techniques.chunks import chunk_sites
from ..techniques.notes import StepNote, StepNoting
from ..techniques.padding import padding_sites, reflection_sites
from ..techniques.serial import SerialBatch
from ..techniques.shared_maps import bands_of
from ..techniques.strips.cuts import Strips
from ..techniques.strips.strips import strip_sites


@dataclass(frozen=True)
class Call:
    """A denoiser's call for one image: `batch` samples with guidance, on a latent of ``(height, width)`` cells."""

    pipe: Any
    model: Any
    batch: int
    height: int
    width: int
    latent: tuple[int, int]

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An empty tensor for the model."""
        new = new_like(self.model)
        return new(*shape) if dtype is None else new(*shape, dtype=dtype)

    def prompt_tokens(self) -> int:
        return int(default_of(self.pipe, "max_sequence_length", PROMPT_TOKENS))

    def adapter_images(self, batch: int) -> list[torch.Tensor]:
        """For each IP-Adapter one image, as a vector or (where a resampler takes them) as one per patch of CLIP's."""
        images = []
        for layer in getattr(getattr(self.model, "encoder_hid_proj", None), "image_projection_layers", ()):
            if hasattr(layer, "proj_in"):
                images.append(self.new(batch, 1, 257, layer.proj_in.in_features))
            else:
                first = next(each for each in layer.modules() if isinstance(each, nn.Linear))
                images.append(self.new(batch, 1, first.in_features))
        return images


@register
class AnyDenoiser(Family):
    """Models that are told a timestep and hold self-attention to the cells of a map.

    A family of denoisers inherits from this one and says how pipelines call it: `sample` and `predict`, and whether
    once for each half of guidance, `in_turns`.
    """

    rank = -1
    stages: tuple[str, ...] = ("step",)
    in_turns = False

    def matches(self, model: nn.Module) -> bool:
        told = "timestep" in signature(type(model).forward).parameters
        return told and any(attends_cells(module) or attends_map(module) for module in modules_of(model))

    def sites(self, model: Any, name: str, options: Any, pipe: Any) -> Iterator[Site]:
        step_note = StepNote()
        noting = StepNoting(step_note, partial(schedulers_of, pipe), current=partial(current_timestep, pipe))
        yield Site(model, name, Order.STEP_NOTED, noting)
        yield from attention_sites(model, name, options, step_note, bands_of(options))
        yield from chunk_sites(model, name, options.ff_chunk_size)
        if options.unet_strip_rows is not None:
            strips = Strips(options.unet_strip_rows, wrap=options.padding_mode == "circular")
            yield from strip_sites(model, name, strips)
        if options.unet_serial:
            yield Site(model, name, Order.BATCH_IN_TURNS, SerialBatch(model), says="one sample at a time")
        least = 2 ** self.halvings(model) + 1
        yield from reflection_sites(model, name, options.padding_mode, least, factor_of(pipe))
        yield from padding_sites(model, name, options.padding_mode)

    def halvings(self, model: Any) -> int:
        configs = [getattr(part, "config", None) for part in nets_of(model)]
        return max(0, *(len(getattr(config, "block_out_channels", ())) - 1 for config in configs))

    def repeated(self, model: nn.Module) -> Iterator[nn.Module]:
        return (module for module in modules_of(model) if isinstance(module, BasicTransformerBlock))

    def call(self, stage: str, model: Any, pipe: Any, height: int, width: int) -> None:
        if hasattr(pipe, "pag_applied_layers"):  # perturbed-attention guidance brings processors of its own for a call
            pipe._set_pag_attn_processor(pipe.pag_applied_layers, do_classifier_free_guidance=True)
        latent = latent_size(pipe, factor_of(pipe), height, width)
        call = Call(pipe, model, guidance_batch(pipe, model), height, width, latent)
        kept = self.sample(call)[:1].clone()  # what the scheduler works on
        if self.in_turns:
            parts = [self.predict(replace(call, batch=1)) for _ in range(call.batch)]
        else:
            parts = list(self.predict(call).chunk(call.batch))
        guided = parts[0] + 7.5 * (parts[-1] - parts[0])
        # Of the channels that the denoiser is given and of those that it gives, whichever are fewer are of the latent.
        both = tuple(slice(min(sizes)) for sizes in zip(kept.shape, guided.shape, strict=True))
        kept[both] - guided[both]

    def held(self, stage: str, model: Any, pipe: Any, height: int, width: int) -> list[torch.Tensor]:
        """While the image is decoded, the picture is still there that was looked at in every step."""
        steps = "step" in self.stages  # not a ControlNet, which looks at the same picture
        picture = seen_picture(pipe, model, height, width) if steps and stage == "decode" else None
        return [] if picture is None else [picture]

    def sample(self, call: Call) -> torch.Tensor:
        """What the denoiser is given to look at."""
        return call.new(call.batch, call.model.config.in_channels, *call.latent)

    def predict(self, call: Call) -> torch.Tensor:
        """What the denoiser makes of `sample`, with what else the pipeline tells it.

        Raises:
            ValueError: that is not known.
        """
        raise unknown_call(call.model)


def seen_picture(pipe: Any, denoiser: Any, height: int, width: int) -> torch.Tensor | None:
    """What a ControlNet or an adapter looks at, if there is one."""
    if not sees_image(pipe):
        return None
    batch = 1 if getattr(pipe, "adapter", None) is not None else guidance_batch(pipe, denoiser)
    return new_like(denoiser)(batch, 3, height, width)
