"""Kandinsky 2's U-Nets, whose attention looks at a map and at text or picture beside it."""

from typing import Any

from torch import nn

from ..core.families import register
from .any import Call
from .unet import UNets


@register
class Kandinsky(UNets):
    """`UNet2DConditionModel` where it is told of pictures by an embedding that is added to the timestep's."""

    rank = 1

    def matches(self, model: nn.Module) -> bool:
        added = getattr(getattr(model, "config", None), "addition_embed_type", None)
        return super().matches(model) and added in ("image", "image_hint", "text_image")

    def added(self, call: Call, batch: int) -> dict[str, Any]:
        embedding, projection = call.model.add_embedding, call.model.encoder_hid_proj
        added = super().added(call, batch)
        match call.model.config.addition_embed_type:
            case "text_image":
                added["text_embeds"] = call.new(batch, embedding.text_proj.in_features)
                added["image_embeds"] = call.new(batch, embedding.image_proj.in_features)
            case "image":
                added["image_embeds"] = call.new(batch, embedding.image_proj.in_features)
            case "image_hint":
                added["image_embeds"] = call.new(batch, embedding.image_proj.in_features)
                added["hint"] = call.new(batch, 3, *(8 * side for side in call.latent))
        if call.model.config.encoder_hid_dim_type in ("image_proj", "text_image_proj"):
            added["image_embeds"] = call.new(batch, projection.image_embeds.in_features)
        return added
