"""Z-Image's transformer: one stream of tokens, the image's first, and before it blocks for the image alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..core.families import register
from ..techniques.joint.tokens import BOTH, Size, Tokens
from .any import Call
from .joint import JointAttention

# What `TOKENS` must know the inside of: of which tokens arguments and results have rows, and their order in attention.
# And of the model, that it passes tokens on from block to block and keeps none.
LEANS_ON = (
    "diffusers.models.transformers.transformer_z_image.ZImageTransformerBlock.forward",
    "diffusers.models.transformers.transformer_z_image.ZSingleStreamAttnProcessor.__call__",
    "diffusers.models.transformers.transformer_z_image.ZImageTransformer2DModel.forward",
)

# What fills the image's tokens up to a multiple of 32 counts as text.
TOKENS = Tokens(
    takes={"x": BOTH, "attn_mask": BOTH, "freqs_cis": BOTH, "noise_mask": BOTH},
    gives=BOTH,
    text_first=False,
    asking=("attention.to_q",),
)


@register
class ZImage(JointAttention):
    """`ZImageTransformer2DModel`, which is given a list of images and one of texts. Those with references run whole."""

    class_name = "ZImageTransformer2DModel"
    timestep = "t"
    passes_on = True

    def kinds(self, model: Any) -> Mapping[str, Tokens]:
        return {"noise_refiner": TOKENS, "layers": TOKENS}

    def maps(self, model: Any, arguments: Mapping[str, Any]) -> Sequence[Size]:
        images, patch = arguments["x"], arguments.get("patch_size", 2)
        if isinstance(images[0], list) or len({each.shape for each in images}) > 1:
            return ()
        _, frames, height, width = images[0].shape
        return [(frames * (height // patch), width // patch)]

    def scheduled(self, timestep: float) -> float:
        return 1000 - 1000 * timestep

    def cell(self, model: Any) -> int:
        return int(min(model.config.all_patch_size))

    def longest(self, model: Any) -> tuple[int, bool] | None:
        return min(model.config.axes_lens[1:]) * max(model.config.all_patch_size), True

    def predict(self, call: Call) -> torch.Tensor:
        images = list(self.sample(call).unsqueeze(2).unbind())
        texts = [call.new(call.prompt_tokens(), call.model.config.cap_feat_dim) for _ in images]
        results = call.model(images, call.new(call.batch), texts, return_dict=False)[0]
        return torch.stack(results).squeeze(2)
