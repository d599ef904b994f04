"""Qwen-Image's transformer, with the pipelines that paint, edit, and follow a ControlNet."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core.families import register
from ..techniques.tokens import IMAGE, TEXT, Size, Tokens
from .any import Call
from .joint import JointAttention

# What `TOKENS` must know the inside of: of which tokens arguments and results have rows, and their order in attention.
# And of the model, that it passes tokens on from block to block and keeps none.
LEANS_ON = (
    "diffusers.models.transformers.transformer_qwenimage.QwenImageTransformerBlock.forward",
    "diffusers.models.transformers.transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0.__call__",
    "diffusers.models.transformers.transformer_qwenimage.QwenImageTransformer2DModel.forward",
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
    idle=("attn.to_q", "attn.add_q_proj"),
)


@register
class QwenImage(JointAttention):
    """`QwenImageTransformer2DModel`. Pictures that it edits come after the image."""

    passes_on = True

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "QwenImageTransformer2DModel"

    def kinds(self, model: Any) -> Mapping[str, Tokens]:
        return {"transformer_blocks": TOKENS}

    def maps(self, model: Any, arguments: Mapping[str, Any]) -> Sequence[Size]:
        shapes = arguments["img_shapes"][0]  # of the first sample; the others have to be alike
        shapes = [shapes] if isinstance(shapes[0], int) else shapes
        return [(frames * height, width) for frames, height, width in shapes]

    def scheduled(self, timestep: float) -> float:
        return 1000 * timestep

    def sample(self, call: Call) -> torch.Tensor:
        height, width = call.latent
        return call.new(call.batch, height // 2 * (width // 2), call.model.config.in_channels)

    def predict(self, call: Call) -> torch.Tensor:
        config, (height, width) = call.model.config, call.latent
        result: torch.Tensor = call.model(
            self.sample(call),
            call.new(call.batch, call.prompt_tokens(), config.joint_attention_dim),
            timestep=call.new(call.batch),
            img_shapes=[[(1, height // 2, width // 2)]] * call.batch,
            return_dict=False,
        )[0]
        return result


@register
class QwenImageControlNets(QwenImage):
    """`QwenImageControlNetModel`, whose blocks are those of Qwen-Image. A step of that one's calls it."""

    stages = ()
    passes_on = False  # what blocks give is its result

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "QwenImageControlNetModel"
