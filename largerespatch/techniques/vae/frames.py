"""Autoencoders of films that are given a single picture: their maps ``[B, C, 1, H, W]`` run as those of a picture.

What is known of pieces is known of maps ``[B, C, H, W]``. So within a call of an encoder or decoder that runs in
pieces all that it is made of takes maps without frames. What is given several frames is left alone. Exact.

A causal convolution sees frames before the first as zeros. For a single frame only the last slice in time of its
weights counts, and it is a convolution of the picture: a third of the work and the memory for three slices.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...core.bands import ALONE, Bands
from ...core.families import Order, Site
from ...core.modules import named_modules
from ...core.patching import PatchStack
from ...core.pieces import rehearsing
from ...core.planes import whole
from ..attention.blocked import Blocking
from ..attention.cell_attention import CellAttention, Projections
from .halves import InPieces

_AUTOENCODERS = "diffusers.models.autoencoders.autoencoder_kl_"

# What running a frame as a picture must know the inside of: that the cache holds frames that came before, so that there
# is nothing in it for the first; that padding is put on by the convolution, and whatever is in time comes before.
LEANS_ON = tuple(
    f"{_AUTOENCODERS}{room}.{name}"
    for room, kind, model in (("qwenimage", "QwenImage", "AutoencoderKLQwenImage"), ("wan", "Wan", "AutoencoderKLWan"))
    for name in (
        f"{kind}CausalConv3d.__init__",
        f"{kind}CausalConv3d.forward",
        f"{kind}RMS_norm.forward",
        f"{kind}Resample.forward",
        f"{kind}ResidualBlock.forward",
        f"{kind}MidBlock.forward",
        f"{kind}AttentionBlock.forward",
        f"{kind}UpBlock.forward",
        f"{kind}Encoder3d.forward",
        f"{kind}Decoder3d.forward",
        f"{model}._encode",
        f"{model}._decode",
    )
)

Forward = Callable[..., torch.Tensor]


class Frames:
    """Takes the place of methods that are given all frames ``[B, C, T, H, W]``: notes how many there are meanwhile.

    Upstream's own tiling, which is off for a single frame, is as the user set it for several ones.
    """

    def __init__(self, model: Any, path: str) -> None:
        self.model = model
        self.path = path
        self.tiles = model.use_tiling
        self.count: int | None = None

    def __call__(self, original: Callable[..., Any], sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with PatchStack() as stack:
            stack.set(self, "count", sample.shape[2], "count")
            if self.count != 1 and self.tiles:
                stack.set(self.model, "use_tiling", True, f"{self.path}.use_tiling")
            return original(sample, *args, **kwargs)


class OneFrame:
    """Takes the place of an encoder's or decoder's ``forward`` for maps ``[B, C, T, H, W]``.

    Args:
        in_pieces: how it runs without frames.
        frames: says how many there are in all, since encoders and decoders are given some of them at a time.
        planes: what the modules do to maps without frames, by path, where their own forward wants frames.
    """

    def __init__(self, in_pieces: InPieces, frames: Frames, planes: Mapping[str, tuple[nn.Module, Forward]]) -> None:
        self.in_pieces = in_pieces
        self.frames = frames
        self.planes = planes
        self._warned = False

    @property
    def holds(self) -> Sequence[Sequence[nn.Module]]:
        return getattr(self.in_pieces, "holds", ())

    def __call__(
        self, original: Forward, sample: torch.Tensor, feat_cache: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if self.in_pieces.is_one(sample) or not self._is_all(sample, feat_cache):
            return original(sample, feat_cache, *args, **kwargs)
        with PatchStack() as stack:
            for path, (module, plane) in self.planes.items():
                stack.wrap(module, "forward", plane, f"{path}.forward")
            return self.in_pieces(original, sample[:, :, 0], None, *args, **kwargs)[:, :, None]

    def _is_all(self, sample: torch.Tensor, feat_cache: Any) -> bool:
        """Whether there is this one frame and no other; of a call by itself only an empty cache says so."""
        count = self.frames.count
        if count is None:
            count = sample.shape[2] if feat_cache is None else 2
        if count > 1:
            self._leave()
        return count == 1

    def _leave(self) -> None:
        """Says once that several frames are left alone.

        Raises:
            ValueError: this process has a band of them.
        """
        if not self.in_pieces.cutting.bands.alone:
            raise ValueError(
                f"process_group: {self.in_pieces.path} runs in bands of single frames; got several, accepted is one"
            )
        if not self._warned and not rehearsing():
            self._warned = True
            warnings.warn(
                f"{self.in_pieces.cutting.title} runs single frames in pieces, several ones as without LargeResPatch",
                RuntimeWarning,
                stacklevel=2,
            )


def as_frame(original: Forward, plane: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A map without frames through a `forward` that wants them."""
    return original(whole(plane)[:, :, None], *args, **kwargs)[:, :, 0]


class FrameAttention(CellAttention):
    """For attention of each frame to itself alone, given a single one: ``[B, C, 1, H, W]``, or a map without frames."""

    def __init__(self, projections: Projections, blocking: Blocking | None, layer: int, bands: Bands = ALONE) -> None:
        super().__init__(projections, blocking, layer, 0, bands)

    def applies(self, hidden_states: torch.Tensor) -> bool:
        if hidden_states.ndim == 4:  # the original wants frames
            return True
        single = hidden_states.shape[2] == 1 and not torch.is_grad_enabled()
        return single and self.technique.applies(hidden_states[:, :, 0])

    def __call__(self, original: Forward, hidden_states: torch.Tensor) -> torch.Tensor:
        run = partial(as_frame, original)
        if hidden_states.ndim == 4:
            return super().__call__(run, hidden_states)
        return super().__call__(run, hidden_states[:, :, 0])[:, :, None]


class PlaneConvolution:
    """Takes the place of a causal convolution's ``forward`` for maps without frames."""

    def __init__(self, convolution: Any, mode: str) -> None:
        self.convolution = convolution
        self.mode = mode

    def __call__(self, original: Forward, plane: torch.Tensor, cache: None = None) -> torch.Tensor:
        module = self.convolution
        left, _, top, *_ = module._padding
        if self.mode == "constant":
            padding = (top, left)
        else:
            plane, padding = F.pad(plane, module._padding[:4], mode=self.mode), (0, 0)
        last = module.weight[:, :, -1]
        return F.conv2d(plane, last, module.bias, module.stride[1:], padding, module.dilation[1:], module.groups)


class FramePadding:
    """Takes the place of a causal convolution's ``forward`` for maps with frames: what it sees beyond the edges.

    The zeros that it puts on are cut off from its result again.
    """

    def __init__(self, convolution: Any, mode: str) -> None:
        self.convolution = convolution
        self.mode = mode

    def __call__(self, original: Forward, hidden_states: torch.Tensor, cache: Any = None) -> torch.Tensor:
        left, _, top, *_ = self.convolution._padding
        result = original(self._padded(hidden_states), None if cache is None else self._padded(cache))
        return result[..., top : result.shape[-2] - top, left : result.shape[-1] - left]

    def _padded(self, hidden_states: torch.Tensor) -> torch.Tensor:
        frames = [F.pad(frame, self.convolution._padding[:4], mode=self.mode) for frame in hidden_states.unbind(2)]
        return torch.stack(frames, dim=2)


def frame_padding_sites(model: nn.Module, name: str, mode: str) -> Iterator[Site]:
    """Every causal convolution of `model` that pads; with `mode` "constant" there is nothing to do."""
    for path, module in named_modules(model, name):
        if mode != "constant" and is_causal(module) and any(module._padding[:4]):
            says = f"convolutions pad by {mode!r}"
            yield Site(module, path, Order.PADDED, FramePadding(module, mode), says=says)


def is_causal(module: Any) -> bool:
    return isinstance(module, nn.Conv3d) and type(module).__name__.endswith("CausalConv3d")
