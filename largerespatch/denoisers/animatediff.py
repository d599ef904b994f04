"""AnimateDiff's U-Net, which paints the frames of a film at once."""

import torch
from torch import nn

from ..core.calls import default_of
from ..core.families import register
from .any import Call
from .unet import UNets

FRAMES = 16  # where the pipeline does not say


@register
class AnimateDiff(UNets):
    """`UNetMotionModel`: a film is one sample with a batch of prompts, one for each frame."""

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "UNetMotionModel"

    def predict(self, call: Call) -> torch.Tensor:
        return self.run(call, self.conditions(call, call.batch * self._frames(call)))

    def sample(self, call: Call) -> torch.Tensor:
        return call.new(call.batch, call.model.config.in_channels, self._frames(call), *call.latent)

    def _frames(self, call: Call) -> int:
        return int(default_of(call.pipe, "num_frames", FRAMES))
