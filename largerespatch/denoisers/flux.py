"""Flux's transformer: painting, editing (Fill, Kontext), following pictures (Control, ControlNet, IP-Adapter)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core.families import register
from ..techniques.tokens import BOTH, IMAGE, TEXT, Size, Tokens
from .any import Call
from .joint import JointAttention, asked_for, maps_of_ids

# What `TOKENS` must know the inside of: of which tokens arguments and results have rows, and their order in attention.
# And of the model, that it passes tokens on from block to block and keeps none.
LEANS_ON = (
    "diffusers.models.transformers.transformer_flux.FluxTransformerBlock.forward",
    "diffusers.models.transformers.transformer_flux.FluxSingleTransformerBlock.forward",
    "diffusers.models.transformers.transformer_flux.FluxAttnProcessor.__call__",
    "diffusers.models.transformers.transformer_flux.FluxTransformer2DModel.forward",
)

TOKENS = Tokens(
    takes={"hidden_states": IMAGE, "encoder_hidden_states": TEXT, "image_rotary_emb": BOTH.along(0)},
    gives=(TEXT, IMAGE),
    text_first=True,
    idle=("attn.to_q", "attn.add_q_proj", "proj_mlp"),
)


@register
class Flux(JointAttention):
    """`FluxTransformer2DModel`. Its tokens are squares of four latent pixels, packed by the pipeline."""

    passes_on = True

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "FluxTransformer2DModel"

    def kinds(self, model: Any) -> Mapping[str, Tokens]:
        return {"transformer_blocks": TOKENS, "single_transformer_blocks": TOKENS}

    def maps(self, model: Any, arguments: Mapping[str, Any]) -> Sequence[Size]:
        return maps_of_ids(arguments["img_ids"])

    def scheduled(self, timestep: float) -> float:
        return 1000 * timestep

    def sample(self, call: Call) -> torch.Tensor:
        height, width = call.latent
        return call.new(call.batch, height // 2 * (width // 2), call.model.config.in_channels)

    def predict(self, call: Call) -> torch.Tensor:
        config, sample, tokens = call.model.config, self.sample(call), call.prompt_tokens()
        with asked_for((call.latent[0] // 2, call.latent[1] // 2)):
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


@register
class FluxControlNets(Flux):
    """`FluxControlNetModel`, whose blocks are those of Flux. Its pictures are encoded; a step of Flux's calls it."""

    stages = ()
    passes_on = False  # what blocks give is its result

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "FluxControlNetModel"
