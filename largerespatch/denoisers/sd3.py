"""Stable Diffusion 3's transformer: left as it is, but its memory is told."""

import torch
from torch import nn

from ..core.calls import PROMPT_TOKENS
from ..core.families import register
from .any import Call
from .joint import JointAttention


@register
class StableDiffusion3(JointAttention):
    """`SD3Transformer2DModel`."""

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "SD3Transformer2DModel"

    def predict(self, call: Call) -> torch.Tensor:
        config = call.model.config
        result: torch.Tensor = call.model(
            self.sample(call),
            call.new(call.batch, PROMPT_TOKENS + call.prompt_tokens(), config.joint_attention_dim),
            call.new(call.batch, config.pooled_projection_dim),
            call.new(call.batch),
            return_dict=False,
        )[0]
        return result
