"""HunyuanImage 2.1's transformer, and its refiner's: image first, two streams, then one."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from ..core.calls import PROMPT_TOKENS
from ..core.families import register
from ..techniques.joint.tokens import BOTH, IMAGE, TEXT, Size, Tokens
from .any import Call
from .joint import JointAttention

# What `TOKENS` must know the inside of: of which tokens arguments and results have rows, and their order in attention.
# And of the model, that it passes tokens on from block to block.
_ROOM = "diffusers.models.transformers.transformer_hunyuanimage."
LEANS_ON = (
    f"{_ROOM}HunyuanImageTransformerBlock.forward",
    f"{_ROOM}HunyuanImageSingleTransformerBlock.forward",
    f"{_ROOM}HunyuanImageAttnProcessor.__call__",
    f"{_ROOM}HunyuanImageTransformer2DModel.forward",
)

TOKENS = Tokens(
    takes={
        "hidden_states": IMAGE,
        "encoder_hidden_states": TEXT,
        "attention_mask": BOTH.along(3),
        "image_rotary_emb": IMAGE.along(0),
    },
    gives=(IMAGE, TEXT),
    text_first=False,
)


@register
class HunyuanImage(JointAttention):
    """`HunyuanImageTransformer2DModel`. Its text, of two encoders, is filled up to as many tokens as there may be."""

    class_name = "HunyuanImageTransformer2DModel"
    ends = ("norm_out", "proj_out")

    def kinds(self, model: Any) -> Mapping[str, Tokens]:
        return {"transformer_blocks": TOKENS, "single_transformer_blocks": TOKENS}

    def maps(self, model: Any, arguments: Mapping[str, Any]) -> Sequence[Size]:
        sizes = zip(arguments["hidden_states"].shape[2:], model.config.patch_size, strict=True)
        *frames, height, width = (size // patch for size, patch in sizes)
        return [(prod(frames) * height, width)]

    def sample(self, call: Call) -> torch.Tensor:
        frames = [1] * (len(call.model.config.patch_size) - 2)  # the refiner's picture is a film of one
        return call.new(call.batch, call.model.config.in_channels, *frames, *call.latent)

    def told(self, call: Call) -> dict[str, Any]:
        config, pipe = call.model.config, call.pipe
        # As if all were of the first encoder: which tokens of two there are is for data to tell.
        tokens = getattr(pipe, "tokenizer_max_length", PROMPT_TOKENS) + getattr(pipe, "tokenizer_2_max_length", 0)
        return {
            "timestep": call.new(call.batch),
            "encoder_hidden_states": call.new(call.batch, tokens, config.text_embed_dim),
            "encoder_attention_mask": call.new(call.batch, tokens, dtype=torch.int64),
            "timestep_r": call.new(call.batch) if config.use_meanflow else None,
            "guidance": call.new(call.batch) if config.guidance_embeds else None,
        }
