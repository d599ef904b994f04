"""`AutoencoderKLHunyuanImage` (HunyuanImage 2.1): group norms, and resamplers that move channels to space and back."""

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..core.families import register
from ..techniques.attention.blocked import Blocking
from ..techniques.attention.cell_attention import CellAttention, Projections
from ..techniques.shared_maps import bands_of
from ..techniques.strips.strips import Forward, bare, reach
from ..techniques.vae.stages import Skip, Split, measure, register_scaling
from ..techniques.vae.walk import CONTAINERS, Walk, register_way
from ..techniques.vae.walked import WalkedDownsample, WalkedResample, WalkedResnet, WalkedWhole
from .kl import KL

# What strips and tiles must know the inside of: the order of a residual block's layers, that a resampler is one
# convolution and moves cells within squares of four, that an attention normalizes, projects, and attends by torch's own
# function; that all else runs in the order it is registered in, and what is added around the first and last of it.
_ROOM = "diffusers.models.autoencoders.autoencoder_kl_hunyuanimage."
LEANS_ON = (
    f"{_ROOM}HunyuanImageEncoder2D.forward",
    f"{_ROOM}HunyuanImageDecoder2D.forward",
    f"{_ROOM}HunyuanImageMidBlock.forward",
    f"{_ROOM}HunyuanImageResnetBlock.forward",
    f"{_ROOM}HunyuanImageAttentionBlock.forward",
    f"{_ROOM}HunyuanImageDownsample.forward",
    f"{_ROOM}HunyuanImageUpsample.forward",
)

RESNET, ATTENTION = "HunyuanImageResnetBlock", "HunyuanImageAttentionBlock"
UP, DOWN = "HunyuanImageUpsample", "HunyuanImageDownsample"

CONTAINERS |= {"HunyuanImageEncoder2D", "HunyuanImageDecoder2D", "HunyuanImageMidBlock"}


@register
class HunyuanImage(KL):
    """Those of HunyuanImage 2.1; not its refiner's, which are of films."""

    shared_classes = ("AutoencoderKLHunyuanImage",)

    def matches(self, model: nn.Module) -> bool:
        halves = [type(getattr(model, half, None)).__name__ for half in ("encoder", "decoder")]
        return halves == ["HunyuanImageEncoder2D", "HunyuanImageDecoder2D"]

    def splits(self, half: Any, encodes: bool) -> list[Split]:
        return _encoder_splits(half) if encodes else _decoder_splits(half)

    def attends(self, module: nn.Module) -> bool:
        return type(module).__name__ == ATTENTION

    def attending(self, module: Any, blocking: Blocking | None, layer: int, options: Any) -> CellAttention:
        projections = Projections(
            query=module.to_q,
            others=lambda plane: (module.to_k(plane), module.to_v(plane)),
            scale=bare(module.to_q).out_channels ** -0.5,
            group_norm=module.norm,
        )
        # Beyond a tile scores of all tokens for all others would decide how much memory it takes.
        least = options.vae_chunk_size_y * options.vae_chunk_size_x
        return CellAttention(projections, blocking, layer, least, bands_of(options))

    def factor(self, model: Any) -> int:
        return int(model.config.spatial_compression_ratio)


class Resnet(WalkedResnet):
    """For a residual block that has no time to embed, drops out nothing and divides by nothing."""

    def __init__(self, module: Any, walk: Walk) -> None:
        layers = {name: getattr(module, name) for name in ("norm1", "conv1", "norm2", "conv2", "nonlinearity")}
        others = {"dropout": nn.Identity(), "conv_shortcut": None, "time_emb_proj": None, "output_scale_factor": 1.0}
        sizes = {"out_channels": module.out_channels, "parameters": module.parameters}
        super().__init__(SimpleNamespace(**layers, **others, **sizes), walk, tight=True)

    def __call__(self, original: Forward, input_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().__call__(lambda given, time: original(given), input_tensor)


@register_way
def _of_hunyuan_image(module: Any, walk: Walk) -> Any:
    match type(module).__name__:
        case "HunyuanImageResnetBlock" if module.conv_shortcut is None:
            return Resnet(module, walk)
        case "HunyuanImageUpsample":
            return WalkedResample(walk, Fraction(2), halo=reach(module.conv))
        case "HunyuanImageDownsample":
            return WalkedDownsample(walk, Fraction(1, 2), halo=2 * reach(module.conv))
        case "HunyuanImageAttentionBlock":
            return WalkedWhole(walk)
    return None


@register_scaling
def _scaling(module: nn.Module) -> tuple[int, Fraction] | None:
    return {UP: (1, Fraction(2)), DOWN: (1, Fraction(1, 2))}.get(type(module).__name__)


def _nothing(hidden_states: torch.Tensor) -> torch.Tensor:
    """What a stage adds to the shortcut around it where it is left out."""
    return hidden_states.new_zeros(())


def _decoder_splits(decoder: Any) -> list[Split]:
    """From the last two levels in tiles to all but the middle, as `stages.decoder_splits` has it."""
    blocks = list(decoder.up_blocks)
    first = measure(decoder.conv_in, Skip(_nothing, {"repeat": 1}))
    rest = (decoder.mid_block, *blocks, decoder.norm_out, decoder.nonlinearity, decoder.conv_out)
    stages = [first, *map(measure, rest)]
    starts = [2] + [3 + i for i, block in enumerate(blocks) if type(block).__name__ == UP]
    return [Split(stages, range(start, len(stages))) for start in reversed(starts[: max(len(starts) - 1, 1)])]


def _encoder_splits(encoder: Any) -> list[Split]:
    """From the first level in tiles to all but the last."""
    blocks = list(encoder.down_blocks)
    rest = (encoder.conv_in, *blocks, encoder.mid_block, encoder.norm_out, encoder.nonlinearity)
    stages = [*map(measure, rest), measure(encoder.conv_out, Skip(_nothing, {"group_size": 1}))]
    stops = [2 + i for i, block in enumerate(blocks) if type(block).__name__ == DOWN]
    return [Split(stages, range(stop)) for stop in stops or [1]]
