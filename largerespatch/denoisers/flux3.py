"""Flux 3's transformer: text, image and references each in blocks of their own, then together, text first."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core.families import register
from ..techniques.tokens import BOTH, IMAGE, TEXT, Kind, Size, Tokens
from .any import Call
from .joint import JointAttention, asked_for, maps_of_ids

# What `ALONE` and `TOGETHER` must know the inside of: of which tokens arguments and results have rows, and their order.
_ROOM = "diffusers.models.transformers.transformer_flux3."
LEANS_ON = (
    f"{_ROOM}Flux3ModeTransformerBlock.forward",
    f"{_ROOM}Flux3SingleTransformerBlock.forward",
    f"{_ROOM}Flux3AttnProcessor.__call__",
    f"{_ROOM}Flux3Transformer2DModel.forward",
)

ALONE = Tokens(
    takes={"hidden_states": IMAGE, "temb_mod": IMAGE, "image_rotary_emb": IMAGE.along(0)},
    gives=IMAGE,
    text_first=False,
    references=False,
)
TOGETHER = Tokens(
    takes={
        "hidden_states": IMAGE,
        "encoder_hidden_states": TEXT,
        "temb_mod": IMAGE,
        "temb_mod_context": TEXT,
        "image_rotary_emb": BOTH.along(0),
    },
    gives=(TEXT, IMAGE),
    text_first=True,
)


@register
class Flux3(JointAttention):
    """`Flux3Transformer2DModel`. Blocks of text alone and of references alone run whole."""

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "Flux3Transformer2DModel"

    def kinds(self, model: Any) -> Mapping[str, Kind]:
        return {"mode_blocks.image": ALONE, "single_transformer_blocks": TOGETHER}

    def maps(self, model: Any, arguments: Mapping[str, Any]) -> Sequence[Size]:
        ids = [arguments["img_ids"], arguments.get("image_cond_ids")]
        return [size for each in ids if each is not None for size in maps_of_ids(each[:, :3])]

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
                call.new(call.batch),
                call.new(sample.shape[1], 4),
                call.new(tokens, 4),
                target_timestep=call.new(call.batch) if config.flow_map else None,
                return_dict=False,
            )[0]
        return result
