"""Decoding latents to an image of 8-bit pixels, as a pipeline would at its end."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from ..core.families import families_in
from ..techniques.vae.images import CHANNELS, writing, written


@torch.no_grad()
def decoded(pipe: Any, latents: torch.Tensor) -> Image.Image:
    """The image of a pipeline's `latents` ``[1, C, h, w]``. See `LargeResPatch.decode`."""
    vae, factor, at_once = _autoencoder(pipe)
    channels = vae.config.latent_channels
    accepted = f"latents must be a tensor [1, {channels}, height, width] of latent pixels, of one image; got "
    if not isinstance(latents, torch.Tensor):
        raise TypeError(f"{accepted}{type(latents).__name__}")
    if latents.ndim != 4 or latents.shape[:2] != (1, channels) or not latents.numel():
        raise ValueError(f"{accepted}{list(latents.shape)}")
    height, width = (factor * length for length in latents.shape[2:])
    with writing(width, height, at_once) as image, _as_pipelines_decode(pipe, vae):
        # As they were before they were scaled for the denoiser.
        given = _unscaled(latents, vae.config).to(next(vae.parameters()).device, _dtype(vae))
        written(vae.decode(given, return_dict=False)[0], image)
    if hasattr(pipe, "maybe_free_model_hooks"):
        pipe.maybe_free_model_hooks()
    return image


def _autoencoder(pipe: Any) -> tuple[Any, int, bool]:
    """The model that decodes, sample pixels to a latent pixel, and whether its last layer makes the picture.

    Raises:
        ValueError: there is none whose latents are maps, scaled by a number, and whose images have three channels.
    """
    for model, family in families_in(pipe).values():
        config = getattr(model, "config", None)
        maps = all(getattr(config, name, None) for name in ("latent_channels", "scaling_factor"))
        maps = maps and getattr(config, "out_channels", None) == CHANNELS
        if "decode" in family.stages and maps and (factor := family.factor(model)):
            return model, factor, getattr(family, "ends_in_picture", False)
    raise ValueError(
        "pipe must have an autoencoder that makes images of three channels of latents [B, C, height, width] that are "
        "scaled by a number of its configuration; "
        f"{type(pipe).__name__} has none"
    )


def _dtype(vae: Any) -> torch.dtype:
    """That of its weights."""
    dtype: torch.dtype = next(vae.parameters()).dtype
    return dtype


def _unscaled(latents: torch.Tensor, config: Any) -> Any:
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        mean, std = (torch.tensor(each).view(1, -1, 1, 1).to(latents.device, latents.dtype) for each in (mean, std))
        return latents * std / config.scaling_factor + mean
    return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)


@contextmanager
def _as_pipelines_decode(pipe: Any, vae: Any) -> Iterator[None]:
    """In float32, where pipelines would rather not decode in half precision."""
    dtype = _dtype(vae)
    if dtype != torch.float16 or not hasattr(pipe, "upcast_vae") or not vae.config.force_upcast:
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(dtype)
