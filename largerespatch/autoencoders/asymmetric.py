"""`AsymmetricAutoencoderKL` (inpainting): a larger decoder, which may be shown the picture around a mask.

What it makes of that picture joins its maps level by level, so with a picture to see it is exact in either mode.
"""

from fractions import Fraction
from typing import Any

import torch
from torch import nn

from ..core.calls import asked_by, new_like
from ..core.families import register
from ..core.hosts import Host
from ..techniques.strips.strips import Forward, reach
from ..techniques.vae.halves import Cutting, Exact, InPieces
from ..techniques.vae.two_pass import TwoPass
from ..techniques.vae.walk import CONTAINERS, Walk, register_way
from ..techniques.vae.walked import WalkedResample
from .kl import KL

# What strips must know the inside of: that the decoder runs as others do where it is shown nothing, and that what looks
# at the picture is convolutions, one after another.
LEANS_ON = (
    "diffusers.models.autoencoders.vae.MaskConditionDecoder.forward",
    "diffusers.models.autoencoders.vae.MaskConditionEncoder.forward",
)

CONTAINERS |= {"MaskConditionDecoder", "MaskConditionEncoder", "Sequential"}


@register
class Asymmetric(KL):
    """Those whose decoder may be shown a picture."""

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "AsymmetricAutoencoderKL"

    def in_pieces(
        self, half: Any, path: str, encodes: bool, cutting: Cutting, host: Host | None, options: Any
    ) -> Exact | TwoPass:
        if encodes:
            return super().in_pieces(half, path, encodes, cutting, host, options)
        unshown: ExactOrShown | TwoPassOrShown
        if options.vae_mode == "exact":
            unshown = ExactOrShown(half, path, cutting, options.vae_recompute, host, half.condition_encoder)
        else:
            unshown = TwoPassOrShown(half, path, self.splits(half, encodes), cutting, options.vae_passes, host)
        unshown.shown = Exact(half, path, cutting, options.vae_recompute, host)
        return unshown

    def way(self, options: Any, in_pieces: Exact | TwoPass) -> str:
        way = super().way(options, in_pieces)
        if isinstance(in_pieces, Exact):
            return way
        return f"{way} (a decoder that is shown a picture exactly, in strips of {in_pieces.cutting.strip_height} rows)"

    def call(self, stage: str, model: Any, pipe: Any, height: int, width: int) -> None:
        if stage == "encode" or "mask_image" not in asked_by(pipe):
            return super().call(stage, model, pipe, height, width)
        mask = new_like(model)(1, 1, height, width)
        shown = {"image": self.image(model, height, width), "mask": mask}
        image = model.decode(self.latent(model, pipe, height, width), return_dict=False, **shown)[0]
        pipe.image_processor.postprocess(image, output_type="pt")


class Shown(InPieces):
    """Takes the place of the decoder's ``forward``: other pieces where it is shown a picture and a mask."""

    shown: Exact

    def __call__(
        self, original: Forward, sample: torch.Tensor, image: Any = None, mask: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        run = super().__call__ if image is None or mask is None else self.shown
        return run(original, sample, image, mask, *args, **kwargs)


class ExactOrShown(Shown, Exact):
    """Exact in either case."""


class TwoPassOrShown(Shown, TwoPass):
    """In two passes, but exact where a picture is shown."""


@register_way
def _of_condition_encoder(module: Any, walk: Walk) -> Any:
    match module:
        case nn.Conv2d(stride=(2, 2), padding=(1, 1), kernel_size=(4, 4)):
            return WalkedResample(walk, Fraction(1, 2), halo=2 * reach(module))
    return None
