"""`AsymmetricAutoencoderKL` (inpainting): a larger decoder, which may be shown the picture around a mask.

What it makes of that picture joins its maps whole, level by level, so with a picture to see it is exact in either mode
and takes more memory than without.
"""

from fractions import Fraction
from typing import Any

import torch
from torch import nn

from ..core.calls import new_like, takes
from ..core.families import register
from ..core.hosts import Host
from ..techniques.halves import Cutting, Exact
from ..techniques.strips import Forward, reach
from ..techniques.two_pass import TwoPass
from ..techniques.walk import CONTAINERS, Walk, WalkedResample, register_way
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
        shown = Exact(half, path, cutting, options.vae_recompute, host)
        if options.vae_mode == "exact":
            return ExactUnlessShown(shown, half, path, cutting, options.vae_recompute, host, half.condition_encoder)
        return TwoPassUnlessShown(shown, half, path, self.splits(half, encodes), cutting, options.vae_passes, host)

    def call(self, stage: str, model: Any, pipe: Any, height: int, width: int) -> None:
        if stage == "encode" or "mask_image" not in takes(type(pipe).__call__):
            return super().call(stage, model, pipe, height, width)
        mask = new_like(model)(1, 1, height, width)
        shown = {"image": self.image(model, height, width), "mask": mask}
        image = model.decode(self.latent(model, pipe, height, width), return_dict=False, **shown)[0]
        pipe.image_processor.postprocess(image, output_type="pt")


class UnlessShown:
    """Takes the place of the decoder's ``forward``: other pieces where it is shown a picture and a mask."""

    def __init__(self, shown: Exact, *args: Any) -> None:
        super().__init__(*args)
        self.shown = shown

    def __call__(
        self,
        original: Forward,
        sample: torch.Tensor,
        image: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        *others: Any,
    ) -> torch.Tensor:
        if image is None or mask is None:
            return super().__call__(original, sample, image, mask, *others)  # type: ignore[misc,no-any-return]
        return self.shown(original, sample, image, mask, *others)


class ExactUnlessShown(UnlessShown, Exact):
    """Exact in any case."""


class TwoPassUnlessShown(UnlessShown, TwoPass):
    """In two passes, but where a picture is shown exact."""


@register_way
def _of_condition_encoder(module: Any, walk: Walk) -> Any:
    match module:
        case nn.Conv2d(stride=(2, 2), padding=(1, 1), kernel_size=(4, 4)):
            return WalkedResample(walk, Fraction(1, 2), halo=2 * reach(module))
    return None
