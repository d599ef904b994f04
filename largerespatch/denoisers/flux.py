"""Flux's transformer: left as it is, but its memory is told."""

import torch
from torch import nn

from ..core.families import register
from .any import Call
from .joint import JointAttention


@register
class Flux(JointAttention):
    """`FluxTransformer2DModel`. Its tokens are squares of four latent pixels, packed by the pipeline."""

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "FluxTransformer2DModel"

    def sample(self, call: Call) -> torch.Tensor:
        height, width = call.latent
        return call.new(call.batch, height // 2 * (width // 2), call.model.config.in_channels)

    def predict(self, call: Call) -> torch.Tensor:
        config, sample, tokens = call.model.config, self.sample(call), call.prompt_tokens()
        result: torch.Tensor = call.model(
            sample,
            call.new(call.batch, tokens, config.joint_attention_dim),
            call.new(call.batch, config.pooled_projection_dim),
            call.new(call.batch),
            call.new(sample.shape[1], 3),
            call.new(tokens, 3),
            call.new(call.batch, dtype=torch.float32) if config.guidance_embeds else None,
            return_dict=False,
        )[0]
        return result
