"""A head start for the VAE: before any training it already is the best linear codec of the maps, or nearly.

A random start spends most of a short training on finding out how to pass brightness and colour through. All of that
can be had in closed form, because without its residual branches the VAE is a chain of resampling convolutions: the
encoder becomes a principal component analysis of 8x8 blocks, taken level by level, and the decoder a least-squares
interpolation back. The residual branches start at nothing and are what training then fills.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

# Features kept at a half, a quarter and an eighth of the size, out of 3 * 4, 12 * 4 and 32 * 4.
KEPT = (12, 32, 64)
LATENTS = 8
GROUPS = 4
# The group norm at the end of encoder and decoder would take a picture's brightness and contrast away. Opposite
# constants in two channels of each group dominate its statistics, so that brightness passes (trained decoders grow
# such channels by themselves). A pair x, -x passes the activation unharmed: silu(x) - silu(-x) = x.
LEVEL_ENCODER = 6.0
LEVEL_DECODER = 4.0
NOISE_LOG_VARIANCE = -7.0


@torch.no_grad()
def start_as_linear_codec(vae: AutoencoderKL, crops: torch.Tensor) -> None:
    """Set the weights of an untrained VAE from example pictures `[N, 3, H, W]` in [-1, 1]."""
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.to_out[0].weight)
            nn.init.zeros_(module.to_out[0].bias)
    features = _start_encoder(vae, crops)
    _start_decoder(vae, features, crops)
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        nn.init.dirac_(convolution.weight)
        nn.init.zeros_(convolution.bias)


def _start_encoder(vae: AutoencoderKL, crops: torch.Tensor) -> list[torch.Tensor]:
    """Return the features at 1/2 and 1/4 of the size and the latent, which are what the decoder has to restore."""
    encoder = vae.encoder
    blocks = encoder.down_blocks
    _set_rows(encoder.conv_in, torch.eye(3)[:, :, None, None], at=(1, 1))
    features, hidden = [], crops
    for level, kept in enumerate(KEPT):
        basis = _principal_directions(hidden, kept)
        _set_rows(blocks[level].downsamplers[0].conv, basis, at=(0, 0))
        _pass_on(blocks[level + 1].resnets[0].conv_shortcut, kept)
        hidden = F.conv2d(hidden, basis, stride=2)
        features.append(hidden)
    flat = hidden.transpose(0, 1).flatten(1)
    directions = torch.linalg.eigh(flat @ flat.T).eigenvectors.flip(1)[:, :LATENTS].T
    latent = torch.einsum("kc,nchw->nkhw", directions, hidden)
    directions /= latent.square().mean(dim=(0, 2, 3)).sqrt()[:, None]
    last = blocks[-1].resnets[0].conv_shortcut
    pairs = _write_pairs(last, encoder.mid_block.resnets[-1].conv2, directions, LEVEL_ENCODER)
    _read_pairs(encoder.conv_out, *pairs)
    encoder.conv_out.weight[LATENTS:] = 0
    encoder.conv_out.bias[LATENTS:] = NOISE_LOG_VARIANCE
    return [*features[:2], torch.einsum("kc,nchw->nkhw", directions, hidden)]


def _start_decoder(vae: AutoencoderKL, features: list[torch.Tensor], crops: torch.Tensor) -> None:
    decoder = vae.decoder
    half, quarter, latent = features
    gather = torch.eye(9 * LATENTS).view(9 * LATENTS, LATENTS, 3, 3)
    decoder.conv_in.weight[: 9 * LATENTS] = gather
    decoder.conv_in.bias[: 9 * LATENTS] = 0
    hidden = F.conv2d(latent, gather, padding=1)
    for block, after, target in zip(decoder.up_blocks, decoder.up_blocks[1:], (quarter, half, crops), strict=False):
        hidden = F.interpolate(hidden, scale_factor=2.0, mode="nearest")
        kernel = _least_squares_kernel(hidden, target)
        convolution = block.upsamplers[0].conv
        convolution.weight[: len(kernel)] = 0
        convolution.weight[: len(kernel), : kernel.shape[1]] = kernel
        convolution.bias[: len(kernel)] = 0
        _pass_on(after.resnets[0].conv_shortcut, len(kernel))
        hidden = F.conv2d(hidden, kernel, padding=1)
    last = decoder.up_blocks[-1].resnets[0].conv_shortcut
    pairs = _write_pairs(last, decoder.up_blocks[-1].resnets[-1].conv2, torch.eye(3), LEVEL_DECODER)
    _read_pairs(decoder.conv_out, *pairs)


def _principal_directions(hidden: torch.Tensor, kept: int) -> torch.Tensor:
    """The `kept` leading directions of 2x2 blocks, as a kernel `[kept, C, 2, 2]`."""
    blocks = F.unfold(hidden, 2, stride=2).transpose(0, 1).flatten(1)
    vectors = torch.linalg.eigh(blocks @ blocks.T).eigenvectors.flip(1)[:, :kept]
    return vectors.T.reshape(kept, hidden.shape[1], 2, 2)


def _least_squares_kernel(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The 3x3 kernel that best turns `hidden` into `target`."""
    width = hidden.shape[1] * 9
    gram, cross = torch.zeros(width, width), torch.zeros(width, target.shape[1])
    for one, wanted in zip(hidden, target, strict=True):
        columns = F.unfold(one[None], 3, padding=1)[0]
        gram += columns @ columns.T
        cross += columns @ wanted.flatten(1).T
    ridge = 1e-5 * gram.diagonal().mean() * torch.eye(width)
    solution = torch.linalg.solve((gram + ridge).double(), cross.double()).float()
    return solution.T.reshape(target.shape[1], hidden.shape[1], 3, 3)


def _set_rows(convolution: nn.Conv2d, kernel: torch.Tensor, at: tuple[int, int]) -> None:
    """Let the first outputs be `kernel` placed at tap `at`; the other outputs keep their random start."""
    rows, columns, height, width = kernel.shape
    top, left = at
    convolution.weight[:rows] = 0
    convolution.weight[:rows, :columns, top : top + height, left : left + width] = kernel
    convolution.bias[:rows] = 0


def _pass_on(shortcut: nn.Conv2d | None, channels: int) -> None:
    if shortcut is not None:
        _set_rows(shortcut, torch.eye(channels)[:, :, None, None], at=(0, 0))


def _write_pairs(
    shortcut: nn.Conv2d, last: nn.Conv2d, directions: torch.Tensor, level: float
) -> tuple[list[int], float]:
    """Write each direction and, in the channel after, its opposite; beside them constants that rule their group's norm.

    Return the channels of the directions and the size of the norm.
    """
    size = shortcut.out_channels // GROUPS
    channels = [index % GROUPS * size + index // GROUPS * 2 for index in range(len(directions))]
    shortcut.weight *= 0.05
    nn.init.zeros_(shortcut.bias)
    for channel, direction in zip(channels, directions, strict=True):
        for row, sign in ((channel, 1), (channel + 1, -1)):
            shortcut.weight[row] = 0
            shortcut.weight[row, : len(direction), 0, 0] = sign * direction
    for end in range(size, shortcut.out_channels + 1, size):
        last.bias[end - 2] = level
        last.bias[end - 1] = -level
    return channels, (2 * level**2 / size) ** 0.5


def _read_pairs(convolution: nn.Conv2d, channels: list[int], gain: float) -> None:
    """The outputs' inverse of `_write_pairs`, behind the norm and the activation."""
    convolution.weight *= 0.05
    nn.init.zeros_(convolution.bias)
    for row, channel in enumerate(channels):
        convolution.weight[row] = 0
        convolution.weight[row, channel, 1, 1] = gain
        convolution.weight[row, channel + 1, 1, 1] = -gain
