"""What a pipeline's signatures tell about the calls that it makes to its models, for families that play these calls.

Everything here is asked, nothing is called: parameters of `__call__` and `forward`, and configurations.
"""

import inspect
from collections.abc import Callable
from math import ceil
from typing import Any

import torch

from .families import models_of

# Tokens of a prompt where the pipeline does not say: those of CLIP.
PROMPT_TOKENS = 77

New = Callable[..., torch.Tensor]


def takes(callee: Any) -> set[str]:
    """The names of a callable's parameters."""
    return set(inspect.signature(callee).parameters)


def taken(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the `arguments` that are not None and that ``model.forward`` takes."""
    names = takes(model.forward)
    return {name: value for name, value in arguments.items() if value is not None and name in names}


def asked_by(pipe: Any) -> dict[str, Any]:
    """What a pipeline's call can be given, by name, with what it takes otherwise; those made of blocks say so."""
    found: dict[str, Any] | None = getattr(pipe, "default_call_parameters", None)
    if found is None:
        parameters = inspect.signature(type(pipe).__call__).parameters
        found = {name: None if each.default is each.empty else each.default for name, each in parameters.items()}
    return found


def default_of(pipe: Any, parameter: str, otherwise: Any) -> Any:
    """What a pipeline takes for a parameter of its call that is not given."""
    found = asked_by(pipe).get(parameter)
    return otherwise if found is None else found


def new_like(model: Any) -> New:
    """What makes empty tensors in the dtype of `model`, on its device."""
    like = next(model.parameters())

    def new(*shape: int, dtype: torch.dtype = like.dtype) -> torch.Tensor:
        return torch.empty(shape, device=like.device, dtype=dtype)

    return new


def schedulers_of(pipe: Any) -> list[Any]:
    """What tells the steps, `scheduler` first; some pipelines have several, of other names, or none."""
    others = [each for each in pipe.components.values() if hasattr(each, "timesteps")]
    named = getattr(pipe, "scheduler", None)
    return [each for each in (named, *others) if each is not None]


def current_timestep(pipe: Any) -> Any:
    """Where a pipeline says that it is among its scheduler's timesteps; None between calls, or if it does not say."""
    return getattr(pipe, "_current_timestep", None)


def guidance_batch(pipe: Any, denoiser: Any) -> int:
    """Samples that a denoiser sees for one image with guidance on."""
    scales = {"guidance_scale", "image_guidance_scale", "pag_scale"} & asked_by(pipe).keys()
    if getattr(denoiser.config, "time_cond_proj_dim", None) is not None or "guidance" in takes(denoiser.forward):
        scales.discard("guidance_scale")  # a number that the model is told, not another sample
    return 1 + len(scales)


def latent_size(pipe: Any, factor: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) of the latent of an image, for an autoencoder of that many sample pixels to a latent pixel."""
    factor = getattr(pipe, "movq_scale_factor", factor)
    if hasattr(pipe, "movq_scale_factor"):  # Kandinsky's pipelines round up to whole cells of the coarsest map
        return ceil(height / factor**2) * factor, ceil(width / factor**2) * factor
    return height // factor, width // factor


def nets_of(model: Any) -> list[Any]:
    """The ControlNets that one which is several consists of; any other model alone."""
    return list(getattr(model, "nets", [model]))


def sees_image(pipe: Any) -> bool:
    """Whether something beside the VAE looks at a picture at each step: a ControlNet of a U-Net, a T2I-Adapter.

    (ControlNets of transformers are shown a latent.)
    """
    models = (model for each in models_of(pipe).values() for model in nets_of(each))
    shown = any(hasattr(model, "controlnet_cond_embedding") for model in models)
    return shown or getattr(pipe, "adapter", None) is not None


def encodes(pipe: Any) -> bool:
    """Whether the pipeline's VAE encodes images: image-to-image, inpainting, InstructPix2Pix and the like.

    Of the pictures that are given one is for the ControlNet or adapter, if there is any; the others are the VAE's, but
    what is given with a `noise_level` is the denoiser's.
    """
    names = asked_by(pipe).keys()
    pictures = len({"image", "control_image"} & names) - sees_image(pipe)
    return "noise_level" not in names and (pictures > 0 or bool({"mask_image", "video"} & names))


def held(pipe: Any, height: int, width: int) -> list[torch.Tensor]:
    """What is on the host all through a call: a picture that was given, as it came and as the models want it."""
    if getattr(pipe, "adapter", None) is not None or not (encodes(pipe) or sees_image(pipe)):
        return []  # an adapter's picture is not copied
    picture = torch.empty(1, 3, height, width)
    tensors = [picture, torch.empty_like(picture)]
    if "mask_image" in asked_by(pipe):
        tensors += [torch.empty_like(picture), torch.empty_like(picture[:, :1])]
    return tensors
