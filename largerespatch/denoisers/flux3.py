"""Flux 3's transformer: text, image and references each in blocks of their own, then together, text first."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.families import register
from ..techniques.joint.tokens import BOTH, IMAGE, TEXT, Kind, Size, Tokens
from .any import Call
from .joint import Packed, maps_of_ids

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
class Flux3(Packed):
    """`Flux3Transformer2DModel`. Blocks of text alone and of references alone run whole."""

    class_name = "Flux3Transformer2DModel"
    in_turns = True
    of_all = ("img_ids", "txt_ids", "image_cond_ids")

    def kinds(self, model: Any) -> Mapping[str, Kind]:
        return {"mode_blocks.image": ALONE, "single_transformer_blocks": TOGETHER}

    def maps(self, model: Any, arguments: Mapping[str, Any]) -> Sequence[Size]:
        ids = [arguments["img_ids"], arguments.get("image_cond_ids")]
        return [size for each in ids if each is not None for size in maps_of_ids(each[:, :3])]

    def told(self, call: Call) -> dict[str, Any]:
        config, tokens = call.model.config, call.prompt_tokens()
        return {
            "encoder_hidden_states": call.new(call.batch, tokens, config.joint_attention_dim),
            "timestep": call.new(call.batch),
            "img_ids": call.new(self.tokens(call), 4),
            "txt_ids": call.new(tokens, 4),
            "target_timestep": call.new(call.batch) if config.flow_map else None,
        }
