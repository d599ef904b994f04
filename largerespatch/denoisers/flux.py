"""Flux's transformer: painting, editing (Fill, Kontext), following pictures (Control, ControlNet, IP-Adapter)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..core.families import register
from ..techniques.joint.tokens import BOTH, IMAGE, TEXT, Size, Tokens
from .any import Call
from .joint import Packed, maps_of_ids, told_of_adapters

# What `TOKENS` must know the inside of: of which tokens arguments and results have rows, and their order in attention.
# And of the model, that it passes tokens on from block to block and keeps none; that ControlNets, too, look from one
# token at others in blocks alone.
LEANS_ON = (
    "diffusers.models.transformers.transformer_flux.FluxTransformerBlock.forward",
    "diffusers.models.transformers.transformer_flux.FluxSingleTransformerBlock.forward",
    "diffusers.models.transformers.transformer_flux.FluxAttnProcessor.__call__",
    "diffusers.models.transformers.transformer_flux.FluxTransformer2DModel.forward",
    "diffusers.models.controlnets.controlnet_flux.FluxControlNetModel.forward",
)

TOKENS = Tokens(
    takes={"hidden_states": IMAGE, "encoder_hidden_states": TEXT, "image_rotary_emb": BOTH.along(0)},
    gives=(TEXT, IMAGE),
    text_first=True,
    idle=("proj_mlp",),
    asking=("attn.to_q", "attn.add_q_proj"),
)


# Arguments of the model with rows of image tokens: what ControlNets give beside the sample.
TAKES = {
    "hidden_states": IMAGE,
    "img_ids": IMAGE.along(-2),
    "controlnet_block_samples": IMAGE,
    "controlnet_single_block_samples": IMAGE,
}


@register
class Flux(Packed):
    """`FluxTransformer2DModel`. Its tokens are squares of four latent pixels, packed by the pipeline."""

    class_name = "FluxTransformer2DModel"
    passes_on = True
    takes: Mapping[str, Any] = TAKES
    ends = ("x_embedder", "norm_out", "proj_out")

    def kinds(self, model: Any) -> Mapping[str, Tokens]:
        return {"transformer_blocks": TOKENS, "single_transformer_blocks": TOKENS}

    def maps(self, model: Any, arguments: Mapping[str, Any]) -> Sequence[Size]:
        return maps_of_ids(arguments["img_ids"])

    def told(self, call: Call) -> dict[str, Any]:
        config, tokens = call.model.config, call.prompt_tokens()
        return {
            "encoder_hidden_states": call.new(call.batch, tokens, config.joint_attention_dim),
            "pooled_projections": call.new(call.batch, config.pooled_projection_dim),
            "timestep": call.new(call.batch),
            "img_ids": call.new(self.tokens(call), 3),
            "txt_ids": call.new(tokens, 3),
            "guidance": call.new(call.batch, dtype=torch.float32) if config.guidance_embeds else None,
        } | told_of_adapters(call)


@register
class FluxControlNets(Flux):
    """`FluxControlNetModel`, whose blocks are those of Flux. Its pictures are encoded; a step of Flux's calls it."""

    class_name = "FluxControlNetModel"
    stages = ()
    passes_on = False  # what blocks give is its result
    takes: Mapping[str, Any] = TAKES | {"controlnet_cond": IMAGE}
    joins = False

    def can_be_shared(self, model: Any) -> bool:
        return super().can_be_shared(model) and model.input_hint_block is None  # which looks at pictures
