"""The calls that a pipeline makes to its models, on empty inputs of the right shapes."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import nn

# Component names by what they are called for.
DENOISERS = ("unet", "transformer")
RESIDUALS = ("controlnet", "adapter")
VAES = ("vae", "movq")
COMPONENTS = DENOISERS + RESIDUALS + VAES

PROMPT_TOKENS = 77
FRAMES = 16  # that AnimateDiff makes, unless told otherwise
TIMESTEP = 500

New = Callable[..., torch.Tensor]


def _component(pipe: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None), None)


def _takes(callee: Any) -> set[str]:
    return set(inspect.signature(callee).parameters)


def _new_like(model: Any) -> New:
    """What makes empty tensors in the dtype of `model`, on its device."""
    like = next(model.parameters())

    def new(*shape: int, dtype: torch.dtype = like.dtype) -> torch.Tensor:
        return torch.empty(shape, device=like.device, dtype=dtype)

    return new


def guidance_batch(pipe: Any) -> int:
    """Samples that the denoiser sees for one image with guidance on."""
    scales = {"guidance_scale", "image_guidance_scale", "pag_scale"} & _takes(type(pipe).__call__)
    denoiser = _component(pipe, DENOISERS)
    if getattr(denoiser.config, "time_cond_proj_dim", None) is not None or "guidance" in _takes(denoiser.forward):
        scales.discard("guidance_scale")  # a number that the model is told, not another sample
    return 1 + len(scales)


def encodes(pipe: Any) -> bool:
    """Whether the pipeline's VAE encodes images: image-to-image, inpainting, InstructPix2Pix and the like."""
    functions = (each for kind in type(pipe).__mro__ for each in vars(kind).values() if inspect.isfunction(each))
    return any({"vae", "encode"} <= set(function.__code__.co_names) for function in functions)


def held(pipe: Any, height: int, width: int) -> list[torch.Tensor]:
    """What is on the host all through a call: a picture that was given, as it came and as the models want it."""
    if getattr(pipe, "adapter", None) is not None or not (encodes(pipe) or _sees_image(pipe)):
        return []  # an adapter's picture is not copied
    picture = torch.empty(1, 3, height, width)
    tensors = [picture, torch.empty_like(picture)]
    if "mask_image" in _takes(type(pipe).__call__):
        tensors += [torch.empty_like(picture), torch.empty_like(picture[:, :1])]
    return tensors


def _sees_image(pipe: Any) -> bool:
    """Whether something beside the VAE looks at a picture at each step: a ControlNet, a T2I-Adapter."""
    denoiser = _component(pipe, DENOISERS)
    within = denoiser is not None and "controlnet_cond" in _takes(denoiser.forward)
    return within or _component(pipe, RESIDUALS) is not None


def _seen_image(pipe: Any, height: int, width: int) -> torch.Tensor | None:
    if not _sees_image(pipe):
        return None
    batch = 1 if getattr(pipe, "adapter", None) is not None else guidance_batch(pipe)
    return _new_like(_component(pipe, DENOISERS))(batch, 3, height, width)


def _latent_size(pipe: Any, height: int, width: int, factor: int) -> tuple[int, int]:
    if hasattr(pipe, "movq_scale_factor"):  # Kandinsky's pipelines round up to whole cells of the coarsest map
        return ceil(height / factor**2) * factor, ceil(width / factor**2) * factor
    return height // factor, width // factor


@contextmanager
def upcast(pipe: Any, *dtypes: torch.dtype) -> Iterator[int]:
    """What a pipeline does that runs its VAE in float32 where it has one of `dtypes`; yields how much weights grow."""
    vae = _component(pipe, VAES)
    before = getattr(vae, "dtype", None)
    if before not in dtypes or not (hasattr(pipe, "upcast_vae") and vae.config.force_upcast):
        yield 0
        return
    # Not by `Module.to`, which cannot exchange tensors that hold no data.
    replaced = []
    for module in vae.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None and weight.is_floating_point():
                replaced.append((module, name, weight))
                module._parameters[name] = nn.Parameter(weight.detach().float(), requires_grad=False)
    try:
        yield sum(module._parameters[name].nbytes - weight.nbytes for module, name, weight in replaced)
    finally:
        for module, name, weight in replaced:
            module._parameters[name] = weight


def decode(pipe: Any, height: int, width: int, factor: int) -> None:
    """The decoding of one image of ``height x width`` sample pixels, and its way to numbers from 0 to 1."""
    vae = _component(pipe, VAES)
    if vae is None:
        return
    _seen = _seen_image(pipe, height, width)  # still there, as is what else the pipeline's frame holds
    latents = _new_like(vae)(1, vae.config.latent_channels, *_latent_size(pipe, height, width, factor))
    options = {"force_not_quantize": True} if "force_not_quantize" in _takes(vae.decode) else {}
    image = vae.decode(latents, return_dict=False, **options)[0]
    if hasattr(pipe, "image_processor"):
        pipe.image_processor.postprocess(image, output_type="pt")


def encode(pipe: Any, height: int, width: int) -> None:
    """The encoding of one image of ``height x width`` sample pixels."""
    vae = _component(pipe, VAES)
    if vae is None:
        return
    image = _new_like(vae)(1, vae.config.in_channels, height, width)
    encoded = vae.encode(image)
    if hasattr(encoded, "latent_dist"):
        encoded.latent_dist.sample()


def step(pipe: Any, height: int, width: int, factor: int) -> None:
    """A denoising step for one image of ``height x width`` sample pixels, `factor` of them to a latent pixel.

    Raises:
        ValueError: `pipe` has a denoiser that cannot be called without knowing more about it.
    """
    denoiser = _component(pipe, DENOISERS)
    if denoiser is None:
        return
    known: dict[str, Callable[..., _Call]] = {
        "UNet2DConditionModel": _UNet,
        "UNetControlNetXSModel": _UNet,
        "UNetMotionModel": _MotionUNet,
        "PixArtTransformer2DModel": _PixArt,
        "SD3Transformer2DModel": _SD3,
        "FluxTransformer2DModel": _Flux,
    }
    name = type(denoiser).__name__
    if name not in known:
        raise ValueError(
            f"pipe must have a denoiser whose memory can be estimated ({', '.join(known)}) or none; got {name}"
        )
    if hasattr(pipe, "pag_applied_layers"):  # perturbed-attention guidance brings processors of its own for a call
        pipe._set_pag_attn_processor(pipe.pag_applied_layers, do_classifier_free_guidance=True)
    latent = _latent_size(pipe, height, width, factor)
    call = known[name](pipe, denoiser, guidance_batch(pipe), height, width, latent)
    kept = call.sample()[:1].clone()  # what the scheduler works on
    parts = call.predict().chunk(call.batch)
    guided = parts[0] + 7.5 * (parts[-1] - parts[0])
    kept[:, : guided.shape[1]] - guided[:, : kept.shape[1]]


@dataclass
class _Call(ABC):
    """A call of a denoiser for `batch` samples, with what its configuration and the pipeline's other models ask for."""

    pipe: Any
    model: Any
    batch: int
    height: int
    width: int
    latent: tuple[int, int]

    @abstractmethod
    def predict(self) -> torch.Tensor:
        """What the denoiser makes of `sample`."""

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        new = _new_like(self.model)
        return new(*shape) if dtype is None else new(*shape, dtype=dtype)

    def sample(self) -> torch.Tensor:
        return self.new(self.batch, self.model.config.in_channels, *self.latent)

    def result(self, *args: object, **kwargs: object) -> torch.Tensor:
        result: torch.Tensor = self.model(*args, return_dict=False, **kwargs)[0]
        return result

    def prompt_tokens(self) -> int:
        parameter = inspect.signature(type(self.pipe).__call__).parameters.get("max_sequence_length")
        return PROMPT_TOKENS if parameter is None else int(parameter.default)


class _UNet(_Call):
    def predict(self) -> torch.Tensor:
        conditions = self.conditions(self.batch)
        conditions["controlnet_cond"] = _seen_image(self.pipe, self.height, self.width)
        return self.call(conditions | self.residuals(conditions))

    def call(self, conditions: dict[str, Any]) -> torch.Tensor:
        return self.result(self.sample(), TIMESTEP, **_taken(self.model, conditions))

    def conditions(self, batch: int) -> dict[str, Any]:
        config = self.model.config
        width = getattr(config, "encoder_hid_dim", None) or config.cross_attention_dim
        width = width[0] if isinstance(width, list | tuple) else width
        told = getattr(config, "time_cond_proj_dim", None)
        return {
            "encoder_hidden_states": None if width is None else self.new(batch, PROMPT_TOKENS, width),
            "timestep_cond": None if told is None else self.new(batch, told),
            "class_labels": self._class_labels(batch),
            "added_cond_kwargs": self._added(batch),
        }

    def _class_labels(self, batch: int) -> torch.Tensor | None:
        config = self.model.config
        match getattr(config, "class_embed_type", None):
            case None if getattr(config, "num_class_embeds", None) is None:
                return None
            case None:
                return self.new(batch, dtype=torch.long)
            case "timestep":
                return self.new(batch)
            case "identity":
                return self.new(batch, self.model.time_embedding.linear_2.out_features)
        return self.new(batch, config.projection_class_embeddings_input_dim)

    def _added(self, batch: int) -> dict[str, Any]:
        config = self.model.config
        embedding: Any = getattr(self.model, "add_embedding", None)
        projection: Any = getattr(self.model, "encoder_hid_proj", None)
        added: dict[str, Any] = {}
        match getattr(config, "addition_embed_type", None):
            case "text_time":
                ids = 5 if getattr(self.pipe.config, "requires_aesthetics_score", False) else 6
                width = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
                added = {"text_embeds": self.new(batch, width), "time_ids": self.new(batch, ids)}
            case "text_image":
                added["text_embeds"] = self.new(batch, embedding.text_proj.in_features)
                added["image_embeds"] = self.new(batch, embedding.image_proj.in_features)
            case "image" | "image_hint":
                added["image_embeds"] = self.new(batch, embedding.image_proj.in_features)
                added["hint"] = self.new(batch, 3, *(8 * side for side in self.latent))
        match getattr(config, "encoder_hid_dim_type", None):
            case "ip_image_proj":
                added["image_embeds"] = [self._image_embeds(each, batch) for each in projection.image_projection_layers]
            case "image_proj" | "text_image_proj":
                added["image_embeds"] = self.new(batch, projection.image_embeds.in_features)
        return added

    def _image_embeds(self, layer: Any, batch: int) -> torch.Tensor:
        """For one IP-Adapter: one image, as one vector or (where a resampler takes them) as one per patch of CLIP's."""
        if hasattr(layer, "proj_in"):
            return self.new(batch, 1, 257, layer.proj_in.in_features)
        first = next(each for each in layer.modules() if isinstance(each, nn.Linear))
        return self.new(batch, 1, first.in_features)

    def residuals(self, conditions: dict[str, Any]) -> dict[str, Any]:
        """What ControlNets or T2I-Adapters add to the U-Net's maps."""
        image = conditions["controlnet_cond"]
        if getattr(self.pipe, "controlnet", None) is not None and "controlnet_cond" not in _takes(self.model.forward):
            down, middle = self._control(self.pipe.controlnet, image, conditions)
            return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        if getattr(self.pipe, "adapter", None) is not None:
            maps = self.pipe.adapter([image[:1]] * len(getattr(self.pipe.adapter, "adapters", ())) or image[:1])
            repeated = [torch.cat([each] * self.batch) for each in maps]
            return {"down_intrablock_additional_residuals": repeated}
        return {}

    def _control(self, controlnet: Any, image: torch.Tensor, conditions: dict[str, Any]) -> Any:
        conditions = conditions | {"conditioning_scale": 1.0}
        if hasattr(controlnet, "nets"):
            several = [image] * len(controlnet.nets)
            conditions |= {"controlnet_cond": several, "conditioning_scale": [1.0] * len(several)}
        elif "control_type" in _takes(controlnet.forward):
            kinds = self.new(self.batch, controlnet.config.num_control_type)
            conditions |= {"controlnet_cond": [image], "control_type": kinds, "control_type_idx": [0]}
        return controlnet(self.sample(), TIMESTEP, return_dict=False, **_taken(controlnet, conditions))


def _taken(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    taken = _takes(model.forward)
    return {name: value for name, value in arguments.items() if value is not None and name in taken}


class _MotionUNet(_UNet):
    """AnimateDiff's: a film is one sample with a batch of prompts."""

    def predict(self) -> torch.Tensor:
        return self.call(self.conditions(self.batch * FRAMES))

    def sample(self) -> torch.Tensor:
        return self.new(self.batch, self.model.config.in_channels, FRAMES, *self.latent)


class _PixArt(_Call):
    def predict(self) -> torch.Tensor:
        config, tokens = self.model.config, self.prompt_tokens()
        sizes = {"resolution": self.new(self.batch, 2), "aspect_ratio": self.new(self.batch, 1)}
        return self.result(
            self.sample(),
            self.new(self.batch, tokens, config.caption_channels or config.cross_attention_dim),
            timestep=self.new(self.batch),
            added_cond_kwargs=sizes if self.model.use_additional_conditions else None,
            encoder_attention_mask=self.new(self.batch, tokens),
        )


class _SD3(_Call):
    def predict(self) -> torch.Tensor:
        config = self.model.config
        return self.result(
            self.sample(),
            self.new(self.batch, PROMPT_TOKENS + self.prompt_tokens(), config.joint_attention_dim),
            self.new(self.batch, config.pooled_projection_dim),
            self.new(self.batch),
        )


class _Flux(_Call):
    """Its tokens are squares of four latent pixels, packed by the pipeline."""

    def sample(self) -> torch.Tensor:
        height, width = self.latent
        return self.new(self.batch, height // 2 * (width // 2), self.model.config.in_channels)

    def predict(self) -> torch.Tensor:
        config, sample, tokens = self.model.config, self.sample(), self.prompt_tokens()
        return self.result(
            sample,
            self.new(self.batch, tokens, config.joint_attention_dim),
            self.new(self.batch, config.pooled_projection_dim),
            self.new(self.batch),
            self.new(sample.shape[1], 3),
            self.new(tokens, 3),
            self.new(self.batch, dtype=torch.float32) if config.guidance_embeds else None,
        )
