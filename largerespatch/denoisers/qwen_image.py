"""Qwen-Image's transformer, with the pipelines that paint, edit, and follow a ControlNet."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.families import register
from ..techniques.joint.tokens import IMAGE, TEXT, Size, Tokens
from .any import Call
from .joint import Packed

# What `TOKENS` must know the inside of: of which tokens arguments and results have rows, and their order in attention.
# And of the model, that it passes tokens on from block to block and keeps none; that ControlNets, too, look from one
# token at others in blocks alone.
LEANS_ON = (
    "diffusers.models.transformers.transformer_qwenimage.QwenImageTransformerBlock.forward",
    "diffusers.models.transformers.transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0.__call__",
    "diffusers.models.transformers.transformer_qwenimage.QwenImageTransformer2DModel.forward",
    "diffusers.models.controlnets.controlnet_qwenimage.QwenImageControlNetModel.forward",
)

TOKENS = Tokens(
    takes={
        "hidden_states": IMAGE,
        "encoder_hidden_states": TEXT,
        "encoder_hidden_states_mask": TEXT,
        "image_rotary_emb": (IMAGE.along(0), TEXT.along(0)),
        "modulate_index": IMAGE,
    },
    gives=(TEXT, IMAGE),
    text_first=True,
    asking=("attn.to_q", "attn.add_q_proj"),
)


# Arguments of the model with rows of image tokens: what ControlNets give beside the sample. What it makes itself has
# rows of all.
TAKES = {"hidden_states": IMAGE, "controlnet_block_samples": IMAGE}


@register
class QwenImage(Packed):
    """`QwenImageTransformer2DModel`. Pictures that it edits come after the image."""

    class_name = "QwenImageTransformer2DModel"
    passes_on = True
    takes: Mapping[str, Any] = TAKES
    ends = ("img_in", "norm_out", "proj_out")

    def kinds(self, model: Any) -> Mapping[str, Tokens]:
        return {"transformer_blocks": TOKENS}

    def maps(self, model: Any, arguments: Mapping[str, Any]) -> Sequence[Size]:
        shapes = arguments["img_shapes"][0]  # of the first sample; the others have to be alike
        shapes = [shapes] if isinstance(shapes[0], int) else shapes
        return [(frames * height, width) for frames, height, width in shapes]

    def told(self, call: Call) -> dict[str, Any]:
        height, width = call.latent
        return {
            "encoder_hidden_states": call.new(call.batch, call.prompt_tokens(), call.model.config.joint_attention_dim),
            "timestep": call.new(call.batch),
            "img_shapes": [[(1, height // 2, width // 2)]] * call.batch,
        }


@register
class QwenImageControlNets(QwenImage):
    """`QwenImageControlNetModel`, whose blocks are those of Qwen-Image. A step of that one's calls it."""

    class_name = "QwenImageControlNetModel"
    stages = ()
    passes_on = False  # what blocks give is its result
    takes: Mapping[str, Any] = TAKES | {"controlnet_cond": IMAGE}
    joins = False
