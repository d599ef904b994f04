"""Autoencoders of whatever kind: left as they are, but it is known how pipelines call them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.calls import latent_size, new_like, takes
from ..core.families import Family, Site, factor_of, register, warn_of_unknown
from ..techniques.padding import padding_sites

# In which a pipeline would rather not run an autoencoder that overflows in half precision. (All encode in float32.)
UPCAST = {"encode": (torch.float16, torch.bfloat16), "decode": (torch.float16,)}


@register
class AnyAutoencoder(Family):
    """Models that encode images and decode latents. A family of autoencoders inherits from this one.

    Of those that no other family knows, autoencoders of films among them, a warning tells.
    """

    rank = -1
    stages = ("encode", "decode")
    known = False
    entries = ("encode", "decode")
    ends_in_picture = True  # whether what comes out of the last module of a decoder is the picture

    def matches(self, model: nn.Module) -> bool:
        return hasattr(model, "encode") and hasattr(model, "decode") and hasattr(model, "config")

    def sites(self, model: Any, name: str, options: Any, pipe: Any) -> Iterator[Site]:
        yield from padding_sites(model, name, options.padding_mode)

    def check(self, model: Any, pipe: Any, height: int, width: int) -> None:
        if not self.known:
            warn_of_unknown(model, "an autoencoder")

    def call(self, stage: str, model: Any, pipe: Any, height: int, width: int) -> None:
        if stage == "encode":
            encoded = model.encode(self.image(model, height, width))
            if hasattr(encoded, "latent_dist"):
                encoded.latent_dist.sample()
            return
        options = {"force_not_quantize": True} if "force_not_quantize" in takes(model.decode) else {}
        image = model.decode(self.latent(model, pipe, height, width), return_dict=False, **options)[0]
        if hasattr(pipe, "image_processor"):  # which brings the image to numbers from 0 to 1
            pipe.image_processor.postprocess(image, output_type="pt")

    def image(self, model: Any, height: int, width: int) -> torch.Tensor:
        """What is encoded."""
        return new_like(model)(1, model.config.in_channels, height, width)

    def latent(self, model: Any, pipe: Any, height: int, width: int) -> torch.Tensor:
        """What is decoded."""
        size = latent_size(pipe, factor_of(pipe), height, width)
        return new_like(model)(1, model.config.latent_channels, *size)

    @contextmanager
    def as_called(self, stage: str, model: Any, pipe: Any) -> Iterator[int]:
        """In float32 where the pipeline would turn it to that."""
        forced = hasattr(pipe, "upcast_vae") and model.config.force_upcast
        if not forced or model.dtype not in UPCAST.get(stage, ()):
            yield 0
            return
        # Not by `Module.to`, which cannot exchange tensors that hold no data.
        replaced = []
        for module in model.modules():
            for name, weight in list(module._parameters.items()):
                if weight is not None and weight.is_floating_point():
                    replaced.append((module, name, weight))
                    module._parameters[name] = nn.Parameter(weight.detach().float(), requires_grad=False)
        try:
            yield sum(module._parameters[name].nbytes - weight.nbytes for module, name, weight in replaced)
        finally:
            for module, name, weight in replaced:
                module._parameters[name] = weight
