"""`AutoencoderKLQwenImage` and `AutoencoderKLWan`, which are made for films, as autoencoders of single pictures."""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from math import ceil
from typing import Any

import torch
from torch import nn

from ..core.calls import latent_size, new_like
from ..core.families import Order, Site, factor_of, register
from ..core.modules import named_modules
from ..techniques.attention.blocked import Blocking
from ..techniques.attention.cell_attention import Projections
from ..techniques.shared_maps import bands_of
from ..techniques.strips.strips import reach
from ..techniques.vae.frames import (
    FrameAttention,
    Frames,
    OneFrame,
    PlaneConvolution,
    as_frame,
    frame_padding_sites,
    is_causal,
)
from ..techniques.vae.halves import InPieces
from ..techniques.vae.stages import Split, decoder_splits, encoder_splits, measure
from ..techniques.vae.walk import CONTAINERS, Walk, register_way
from ..techniques.vae.walked import WalkedPointwise, WalkedResample, WalkedWhole
from .kl import HALVES, KL

KINDS = ("QwenImage", "Wan")

# What pieces must know the inside of: that such a block is its convolutions, and a shortcut that moves cells within
# squares of four, of which a frame alone or the first has its own.
LEANS_ON = tuple(
    f"diffusers.models.autoencoders.autoencoder_kl_wan.{name}.forward"
    for name in ("WanResidualDownBlock", "WanResidualUpBlock", "AvgDown3D", "DupUp3D")
)

CONTAINERS |= {f"{kind}{name}" for kind in KINDS for name in ("Encoder3d", "Decoder3d", "MidBlock", "UpBlock")}

# What their encoders and decoders call in the end.
LAST = ("norm_out", "nonlinearity", "conv_out")


@register
class Causal(KL):
    """Norms of each cell, convolutions that see no later frame, and attention of each frame in the middle alone."""

    shared_classes = ("AutoencoderKLQwenImage", "AutoencoderKLWan")

    def matches(self, model: nn.Module) -> bool:
        halves = [getattr(model, half, None) for half in HALVES]
        return any(_is_kind(halves[0], f"{kind}Encoder3d") for kind in KINDS) and all(map(_is_known, halves))

    def sites(self, model: Any, name: str, options: Any, pipe: Any) -> Iterator[Site]:
        frames, left = Frames(model, name), "left as they are" if options.process_group is None else "refused"
        for method in ("_encode", "_decode"):
            yield Site(model, name, Order.IN_STAGES, frames, method)
        for site in super().sites(model, name, options, pipe):
            if isinstance(site.technique, InPieces):
                planes = _planes(site.module, site.path, options.padding_mode)
                one = OneFrame(site.technique, frames, planes)
                site = replace(site, technique=one, says=f"{site.says}; several frames are {left}")
            yield site
        yield from frame_padding_sites(model, name, options.padding_mode)

    def splits(self, half: Any, encodes: bool) -> list[Split]:
        if not encodes:
            return decoder_splits(half, LAST)
        # Before a map is halved it makes little sense to have it whole.
        return [split for split in encoder_splits(half, LAST) if split.stages[split.tiled.stop - 1].scale < 1]

    def attends(self, module: nn.Module) -> bool:
        return _attends(module)

    def attending(self, module: Any, blocking: Blocking | None, layer: int, options: Any) -> FrameAttention:
        def projected(plane: torch.Tensor) -> Any:
            return module.to_qkv(module.norm(plane)).chunk(3, dim=1)

        query, others = (lambda plane: projected(plane)[0]), (lambda plane: projected(plane)[1:])
        projections = Projections(query, others, scale=module.dim**-0.5)
        return FrameAttention(projections, blocking, layer, bands_of(options))

    def image(self, model: Any, height: int, width: int) -> torch.Tensor:
        return new_like(model)(1, model.encoder.conv_in.in_channels // _patch(model) ** 2, 1, height, width)

    def latent(self, model: Any, pipe: Any, height: int, width: int) -> torch.Tensor:
        size = latent_size(pipe, factor_of(pipe), height, width)
        return new_like(model)(1, model.config.z_dim, 1, *size)

    def factor(self, model: Any) -> int:
        return self.latent_scale(model) * _patch(model)

    def latent_scale(self, model: Any) -> int:
        return int(2 ** (len(model.config.dim_mult) - 1))


def _patch(model: Any) -> int:
    """Sample pixels, along each axis, of which one cell of what is encoded is made (Wan 2.2)."""
    return getattr(model.config, "patch_size", None) or 1


def _is_kind(module: Any, name: str) -> bool:
    return type(module).__name__ == name


def _attends(module: nn.Module) -> bool:
    return any(_is_kind(module, f"{kind}AttentionBlock") for kind in KINDS)


def _is_known(half: Any) -> bool:
    """Whether attention occurs in the mid block only."""
    blocks = getattr(half, "down_blocks", None) or half.up_blocks
    return not any(map(_attends, blocks.modules()))


def _planes(half: nn.Module, path: str, mode: str) -> dict[str, tuple[nn.Module, Any]]:
    """What modules of an encoder or decoder do to a map without frames, where their own forward wants frames."""
    found: dict[str, tuple[nn.Module, Any]] = {}
    for place, module in named_modules(half, path):
        name = type(module).__name__
        if is_causal(module):
            found[place] = module, PlaneConvolution(module, mode)
        elif name.endswith(("Resample", "AvgDown3D", "DupUp3D")) or (name.endswith("RMS_norm") and _has_frames(module)):
            found[place] = module, as_frame
    return found


def _has_frames(norm: Any) -> bool:
    """Not so in attention, which has made its frames the samples of a batch."""
    return bool(norm.gamma.ndim == 4)


@register_way
def _strip_by_strip(module: Any, walk: Walk) -> Any:
    name = type(module).__name__
    match name.removeprefix(next((kind for kind in KINDS if name.startswith(kind)), " ")):
        case "CausalConv3d":
            return WalkedResample(walk, Fraction(1), halo=reach(module))
        case "ResidualBlock":
            return WalkedResample(walk, Fraction(1), halo=reach(module.conv1) + reach(module.conv2))
        case "RMS_norm":
            return WalkedPointwise(walk)
        case "Resample" if module.mode.startswith("up"):
            return WalkedResample(walk, Fraction(2), halo=1)
        case "Resample" if module.mode.startswith("down"):
            return WalkedResample(walk, Fraction(1, 2), halo=2)
        case "ResidualDownBlock" | "ResidualUpBlock":  # a shortcut around all that they do: as one
            measured = measure(module)
            step = measured.scale.denominator
            return WalkedResample(walk, measured.scale, halo=step * ceil(measured.reach / step))
        case "AttentionBlock":
            return WalkedWhole(walk)
    return None
