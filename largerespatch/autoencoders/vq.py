"""Kandinsky's `VQModel`: as `AutoencoderKL`, but for attention in blocks, too, and norms that look at the latent."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, SpatialNorm
from diffusers.models.resnet import ResnetBlockCondNorm2D
from torch import nn

from ..core.families import Order, Site, register
from ..core.maps import StoredMap
from ..core.modules import named_modules
from ..core.patching import PatchStack
from ..core.planes import whole
from ..core.statistics import GivenStatistics, GroupStatistics
from ..core.tilings import Tile
from ..techniques.attention.blocked import BlockedAttention, Blocking
from ..techniques.attention.chunked_attention import in_blocks_or_chunks
from ..techniques.strips.strips import Forward, TimeTerms, bare
from ..techniques.vae.alike import looking_there, piece
from ..techniques.vae.stages import Split, decoder_splits, encoder_splits
from ..techniques.vae.walk import CONTAINERS, Walk, register_way
from ..techniques.vae.walked import WalkedPointwise, WalkedResnet
from .kl import KL

# What strips must know the inside of: the order of such a block's layers, that blocks with attention call their
# children in turn, and that all which look at the latent are handed all of it.
LEANS_ON = (
    "diffusers.models.resnet.ResnetBlockCondNorm2D.forward",
    "diffusers.models.unets.unet_2d_blocks.AttnUpDecoderBlock2D.forward",
    "diffusers.models.unets.unet_2d_blocks.AttnDownEncoderBlock2D.forward",
    "diffusers.models.attention_processor.SpatialNorm.forward",
    "diffusers.models.autoencoders.vae.Decoder.forward",
    "diffusers.models.attention_processor.AttnProcessor2_0.__call__",
)

CONTAINERS |= {"AttnUpDecoderBlock2D", "AttnDownEncoderBlock2D"}


@register
class VQ(KL):
    """Those with a codebook."""

    rank = 1

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "VQModel"

    def splits(self, half: Any, encodes: bool) -> list[Split]:
        """Only what does not attend is in tiles."""
        splits = encoder_splits(half) if encodes else decoder_splits(half)
        stages = splits[0].stages
        attending = [i for i, stage in enumerate(stages) if any(map(_attends, stage.module.modules()))]
        if encodes:
            most = min(attending, default=len(stages))
            return [split for split in splits if split.tiled.stop <= most] or [Split(stages, range(1))]
        least = 1 + max(attending, default=0)
        fitting = [split for split in splits if split.tiled.start >= least]
        return fitting or [Split(stages, range(least, len(stages)))]

    def attention(self, half: Any, path: str, options: Any) -> Iterator[Site]:
        yield from super().attention(half, path, options)
        for place, module in named_modules(half, path):
            if isinstance(module, SpatialNorm):
                yield Site(module, place, Order.IN_BLOCKS, looking_there)

    def attends(self, module: nn.Module) -> bool:
        return _looks(module) or super().attends(module)

    def attending(self, module: Any, blocking: Blocking | None, layer: int, options: Any) -> Any:
        technique = in_blocks_or_chunks(module, blocking, layer)
        return LookingAttention(module, technique) if _looks(module) else technique


def _looks(module: nn.Module) -> bool:
    return getattr(module, "spatial_norm", None) is not None


def _attends(module: nn.Module) -> bool:
    return isinstance(module, Attention)


class LookingResnet(WalkedResnet):
    """Takes the place of ``ResnetBlockCondNorm2D.forward`` where the norms look at the latent."""

    def __init__(self, module: Any, walk: Walk) -> None:
        names = ("norm1", "conv1", "norm2", "conv2", "nonlinearity", "dropout", "conv_shortcut")
        layers = {name: getattr(module, name) for name in (*names, "out_channels", "output_scale_factor")}
        super().__init__(SimpleNamespace(**layers), walk)
        self.latent: torch.Tensor | None = None

    def __call__(
        self, original: Forward, input_tensor: torch.Tensor, temb: Any = None, *_: Any, **__: Any
    ) -> torch.Tensor:
        if self.strips.is_one(input_tensor):
            return original(input_tensor, temb)
        self.latent = temb
        return self.run(input_tensor, TimeTerms)

    def group_norm(self, norm: Any) -> nn.GroupNorm:
        return norm.norm_layer  # type: ignore[no-any-return]

    def normalized(self, norm: Any, block: torch.Tensor, statistics: GroupStatistics, top: int) -> torch.Tensor:
        height, width = block.shape[-2:]
        with GivenStatistics(statistics), piece([Tile(top, 0, top + height, width)], width):
            result: torch.Tensor = norm(block, self.latent)
        return result


class LookingNorm(WalkedPointwise):
    """Takes the place of the ``forward`` of a norm that looks at the latent."""

    def __call__(self, original: Forward, hidden_states: torch.Tensor, *latent: torch.Tensor) -> torch.Tensor:
        return super().__call__(lambda given: original(given, *latent), hidden_states)


class LookingAttention:
    """Puts attention in blocks or chunks into one whose norm looks at the latent: the whole map is normalized first."""

    def __init__(self, module: Any, technique: BlockedAttention) -> None:
        self.module = module
        self.technique = technique

    def applies(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> bool:
        return self.technique.applies(hidden_states)

    def __call__(self, original: Forward, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        plane = whole(hidden_states)
        normalized = self.module.spatial_norm(plane, temb)
        with PatchStack() as stack:
            for name, value in (("spatial_norm", None), ("residual_connection", False)):
                stack.set(self.module, name, value, name)
            result: torch.Tensor = self.technique(original, StoredMap.of(normalized, passing=True))
        return result + plane / self.module.rescale_output_factor if self.module.residual_connection else result


@register_way
def _of_vq(module: Any, walk: Walk) -> Any:
    match module:
        case ResnetBlockCondNorm2D(upsample=None, downsample=None, norm1=SpatialNorm(), norm2=SpatialNorm()):
            return LookingResnet(module, walk) if bare(module.conv2).out_channels == module.out_channels else None
        case SpatialNorm():
            return LookingNorm(walk, module.norm_layer)
    return None
