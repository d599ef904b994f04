"""Stable Diffusion's U-Nets (1, 2, XL) and those built like them, with ControlNets, T2I-Adapters, IP-Adapters."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ..core.bands import Bands
from ..core.calls import PROMPT_TOKENS, nets_of, taken, takes
from ..core.families import Order, Site, register
from ..core.hosts import LEAST_BYTES, Host
from ..core.modules import named_modules
from ..techniques.attention.blocked import BlockedAttention
from ..techniques.attention.host_tokens import token_sites
from ..techniques.shared_batch import batch_sites
from ..techniques.shared_maps import InBands, bands_of, shared_map_sites
from ..techniques.skips import OffDevice
from ..techniques.strips.host_strips import HostStrips, host_sites
from .any import AnyDenoiser, Call, seen_picture

TIMESTEP = 500


class WithSkips(AnyDenoiser):
    """Those that make or read skip connections, which may wait off the device, as may all of their large maps."""

    rank = 0
    joins = True

    def sites(self, model: Any, name: str, options: Any, pipe: Any) -> Iterator[Site]:
        if options.process_group is not None:
            yield from self._shared(model, name, bands_of(options))
        if options.unet_offload != "maps":
            yield from super().sites(model, name, options, pipe)
            if options.unet_offload:
                yield from skip_sites(model, name, Host(), "skip connections off the device")
            return
        own = list(super().sites(model, name, replace(options, unet_strip_rows=None), pipe))
        blocked = {site.module: site.technique for site in own if isinstance(site.technique, BlockedAttention)}
        host = Host(least=LEAST_BYTES)
        strips = HostStrips(options.unet_strip_rows, options.padding_mode == "circular", host)
        yield from own
        yield from host_sites(model, name, strips)
        yield from token_sites(model, name, strips, blocked)
        yield from skip_sites(model, name, host)  # of what runs whole

    def _shared(self, model: Any, name: str, bands: Bands) -> Iterator[Site]:
        """Several processes share its maps, and perhaps the samples of a batch."""
        yield from batch_sites(model, name, bands, self.joins)
        bands = replace(bands, others=None)
        for net in nets_of(model):
            path = next(path for path, module in named_modules(model, name) if module is net)
            embedding = getattr(net, "controlnet_cond_embedding", nn.Module())
            steps = (each.stride[0] for each in embedding.modules() if isinstance(each, nn.Conv2d))
            sizes = {"halvings": self.halvings(net), "doublings": prod(steps).bit_length() - 1}
            says = f"maps in {bands}"
            yield Site(net, path, Order.IN_BANDS, InBands(net, path, bands, sizes, self.joins), says=says)
        yield from shared_map_sites(model, name, bands)


@register
class UNets(WithSkips):
    """`UNet2DConditionModel` and `UNetControlNetXSModel`."""

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ in ("UNet2DConditionModel", "UNetControlNetXSModel")

    shared = "U-Nets as Stable Diffusion 1, 2 and XL have them"

    def can_be_shared(self, model: Any) -> bool:
        return type(model).__name__ == "UNet2DConditionModel" and _looks_at_rows_in_leaves(model)

    def predict(self, call: Call) -> torch.Tensor:
        conditions = self.conditions(call, call.batch)
        conditions["controlnet_cond"] = seen_picture(call.pipe, call.model, call.height, call.width)
        return self.run(call, conditions | self.residuals(call, conditions))

    def run(self, call: Call, conditions: dict[str, Any]) -> torch.Tensor:
        told = taken(call.model, conditions)
        result: torch.Tensor = call.model(self.sample(call), TIMESTEP, return_dict=False, **told)[0]
        return result

    def conditions(self, call: Call, batch: int) -> dict[str, Any]:
        """What the model's configuration asks for beside the sample, for `batch` prompts."""
        config = call.model.config
        width = getattr(config, "encoder_hid_dim", None) or config.cross_attention_dim
        width = width[0] if isinstance(width, list | tuple) else width
        told = getattr(config, "time_cond_proj_dim", None)
        return {
            "encoder_hidden_states": None if width is None else call.new(batch, PROMPT_TOKENS, width),
            "timestep_cond": None if told is None else call.new(batch, told),
            "class_labels": self._class_labels(call, batch),
            "added_cond_kwargs": self.added(call, batch),
        }

    def _class_labels(self, call: Call, batch: int) -> torch.Tensor | None:
        config = call.model.config
        match getattr(config, "class_embed_type", None):
            case None if getattr(config, "num_class_embeds", None) is None:
                return None
            case None:
                return call.new(batch, dtype=torch.long)
            case "timestep":
                return call.new(batch)
            case "identity":
                return call.new(batch, call.model.time_embedding.linear_2.out_features)
        return call.new(batch, config.projection_class_embeddings_input_dim)

    def added(self, call: Call, batch: int) -> dict[str, Any]:
        """SDXL's sizes and pooled text, and the picture of an IP-Adapter."""
        config = call.model.config
        added: dict[str, Any] = {}
        if getattr(config, "addition_embed_type", None) == "text_time":
            ids = 5 if getattr(call.pipe.config, "requires_aesthetics_score", False) else 6
            width = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
            added = {"text_embeds": call.new(batch, width), "time_ids": call.new(batch, ids)}
        if getattr(config, "encoder_hid_dim_type", None) == "ip_image_proj":
            added["image_embeds"] = call.adapter_images(batch)
        return added

    def residuals(self, call: Call, conditions: dict[str, Any]) -> dict[str, Any]:
        """What ControlNets or T2I-Adapters add to the U-Net's maps."""
        image, pipe = conditions["controlnet_cond"], call.pipe
        if getattr(pipe, "controlnet", None) is not None and "controlnet_cond" not in takes(call.model.forward):
            down, middle = self._control(call, image, conditions)
            return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        if getattr(pipe, "adapter", None) is not None:
            maps = pipe.adapter([image[:1]] * len(getattr(pipe.adapter, "adapters", ())) or image[:1])
            repeated = [torch.cat([each] * call.batch) for each in maps]
            return {"down_intrablock_additional_residuals": repeated}
        return {}

    def _control(self, call: Call, image: torch.Tensor, conditions: dict[str, Any]) -> Any:
        controlnet, conditions = call.pipe.controlnet, conditions | {"conditioning_scale": 1.0}
        if hasattr(controlnet, "nets"):
            several = [image] * len(controlnet.nets)
            conditions |= {"controlnet_cond": several, "conditioning_scale": [1.0] * len(several)}
        elif "control_type" in takes(controlnet.forward):
            kinds = call.new(call.batch, controlnet.config.num_control_type)
            conditions |= {"controlnet_cond": [image], "control_type": kinds, "control_type_idx": [0]}
        return controlnet(self.sample(call), TIMESTEP, return_dict=False, **taken(controlnet, conditions))


@register
class ControlNets(WithSkips):
    """`ControlNetModel` and its kin, alone or several. A U-Net's step calls them: they have no stage of their own."""

    stages = ()
    shared = "ControlNets of such U-Nets"
    joins = False

    def can_be_shared(self, model: Any) -> bool:
        nets = nets_of(model)
        alike = all(type(net).__name__ == "ControlNetModel" and _looks_at_rows_in_leaves(net) for net in nets)
        return alike and not any(net.config.global_pool_conditions for net in nets)

    def matches(self, model: nn.Module) -> bool:
        return "controlnet_cond" in takes(type(model).forward) and super().matches(model)


def _looks_at_rows_in_leaves(model: Any) -> bool:
    """Whether only leaves of a U-Net or ControlNet look from one row of a map at others, in ways that are known."""
    blocks = [*model.down_blocks, model.mid_block, *getattr(model, "up_blocks", ())]
    known = {"CrossAttnDownBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D", "UpBlock2D"}
    free = any(getattr(block, "s1", None) is not None for block in blocks)  # FreeU, which takes Fourier transforms
    gated = getattr(model, "position_net", None) is not None  # GLIGEN, whose objects attend together with the map
    return known.issuperset(type(block).__name__ for block in blocks) and not free and not gated


def skip_sites(model: nn.Module, name: str, host: Host, says: str = "") -> Iterator[Site]:
    """All that makes or reads a skip connection in a U-Net or a ControlNet."""
    from diffusers import UNet2DConditionModel  # here, not above: it brings transformers along
    from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, DownBlock2D

    makers: dict[nn.Module, OffDevice] = {}
    modules = named_modules(model, name)
    for _, owner in modules:
        match owner:
            case UNet2DConditionModel():
                makers |= dict.fromkeys([owner.conv_in, *owner.up_blocks[:-1]], OffDevice(host, makes=True))
            case CrossAttnDownBlock2D() | DownBlock2D():
                last = owner.resnets if isinstance(owner, DownBlock2D) else owner.attentions
                makers |= dict.fromkeys([*last, *(owner.downsamplers or ())], OffDevice(host, makes=True))
            case _ if hasattr(owner, "controlnet_down_blocks"):
                makers |= dict.fromkeys(
                    owner.controlnet_down_blocks, OffDevice(host, makes=True, at_once=not host.least)
                )
    for path, module in modules:
        if module in makers:
            yield Site(module, path, Order.OFF_DEVICE, makers[module], says=says)
        elif isinstance(module, ResnetBlock2D | Downsample2D):
            yield Site(module, path, Order.OFF_DEVICE, OffDevice(host))
