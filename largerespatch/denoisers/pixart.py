"""PixArt's transformer: self-attention to the image, cross-attention to the text."""

import torch
from torch import nn

from ..core.families import register
from .any import AnyDenoiser, Call


@register
class PixArt(AnyDenoiser):
    """`PixArtTransformer2DModel`, alpha and sigma."""

    rank = 0

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "PixArtTransformer2DModel"

    def predict(self, call: Call) -> torch.Tensor:
        config, tokens = call.model.config, call.prompt_tokens()
        sizes = {"resolution": call.new(call.batch, 2), "aspect_ratio": call.new(call.batch, 1)}
        result: torch.Tensor = call.model(
            self.sample(call),
            call.new(call.batch, tokens, config.caption_channels or config.cross_attention_dim),
            timestep=call.new(call.batch),
            added_cond_kwargs=sizes if call.model.use_additional_conditions else None,
            encoder_attention_mask=call.new(call.batch, tokens),
            return_dict=False,
        )[0]
        return result
