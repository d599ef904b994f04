"""Calls of tiny denoisers: every kind of argument that pipelines hand to a U-Net or a ControlNet."""

import torch
from diffusers.models.controlnets import MultiControlNetModel

import tiny


def assert_same(actual, expected):
    """Equal to rounding in float32 on toy models whose outputs are of order one, in whatever structure."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def text(batch, width=32):
    return {"timestep": torch.tensor(500), "encoder_hidden_states": noise(batch, 7, width)}


def xl_text(batch):
    return text(batch, 64) | {"added_cond_kwargs": {"text_embeds": noise(batch, 32), "time_ids": noise(batch, 6)}}


def residuals(batch, height, width):
    """As a ControlNet makes them for `tiny.unet`."""
    half = ((height + 1) // 2, (width + 1) // 2)
    sizes = [(16, height, width), (16, height, width), (16, *half), (32, *half)]
    return {
        "down_block_additional_residuals": [noise(batch, *size) for size in sizes],
        "mid_block_additional_residual": noise(batch, 32, *half),
    }


def with_ip_adapter(model):
    """Two of them, with one and two images."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    torch.manual_seed(7)
    processors = {
        name: processor
        if "attn1" in name
        else IPAdapterAttnProcessor2_0(model.get_submodule(name[: -len(".processor")]).inner_dim, 32, (3, 3))
        for name, processor in model.attn_processors.items()
    }
    model.set_attn_processor(processors)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(10, 32, 3) for _ in range(2)])
    model.config.encoder_hid_dim_type = "ip_image_proj"
    return model.requires_grad_(False)


def images(batch):
    return {"added_cond_kwargs": {"image_embeds": [noise(batch, 1, 10), noise(batch, 2, 10)]}}


def masks(*shape):
    return {"cross_attention_kwargs": {"ip_adapter_masks": (noise(*shape) > 0).float()}}


def listed_masks(batch):
    return {"cross_attention_kwargs": {"ip_adapter_masks": [noise(1, 1, 24, 24), noise(batch, 2, 24, 24)]}}


def gligen(batch):
    return {
        "cross_attention_kwargs": {
            "gligen": {
                "boxes": noise(batch, 5, 4),
                "masks": (noise(batch, 5) > 0).float(),
                "positive_embeddings": noise(batch, 5, 32),
            },
            "scale": 0.5,
        }
    }


# name: (the model, changes to its arguments for a batch, a height and a width)
UNETS = {
    "SD": (tiny.unet, lambda b, h, w: text(b)),
    "one timestep each": (tiny.unet, lambda b, h, w: text(b) | {"timestep": torch.arange(b) * 300 + 5}),
    "one timestep as a list of one": (tiny.unet, lambda b, h, w: text(b) | {"timestep": torch.tensor([77])}),
    "XL": (lambda: tiny.unet(**tiny.XL_UNET), lambda b, h, w: xl_text(b)),
    "ControlNet residuals": (tiny.unet, lambda b, h, w: text(b) | residuals(b, h, w)),
    "text mask": (tiny.unet, lambda b, h, w: text(b) | {"encoder_attention_mask": noise(b, 7) > 0}),
    "class labels": (
        lambda: tiny.unet(num_class_embeds=9),
        lambda b, h, w: text(b) | {"class_labels": torch.arange(b) + 3},
    ),
    "guidance embedding": (
        lambda: tiny.unet(time_cond_proj_dim=6),
        lambda b, h, w: text(b) | {"timestep_cond": noise(b, 6)},
    ),
    "IP-Adapters": (lambda: with_ip_adapter(tiny.unet()), lambda b, h, w: text(b) | images(b)),
    "IP-Adapters, masks as a tensor": (
        lambda: with_ip_adapter(tiny.unet()),
        lambda b, h, w: (
            text(b) | {"added_cond_kwargs": {"image_embeds": [noise(b, 1, 10)] * 2}} | masks(2, 1, 24, 24)
        ),  # as many adapters as samples in a batch of two
    ),
    "IP-Adapters, masks as a list": (
        lambda: with_ip_adapter(tiny.unet()),
        lambda b, h, w: text(b) | images(b) | listed_masks(b),
    ),
    "GLIGEN": (
        lambda: with_position_net(tiny.unet(attention_type="gated")),
        lambda b, h, w: text(b) | gligen(b),
    ),
}


def with_position_net(model):
    for module in model.modules():
        if hasattr(module, "alpha_attn"):  # as they are initialized the objects have no effect
            module.alpha_attn.data.fill_(0.7)
            module.alpha_dense.data.fill_(0.7)
    return model


def adapter_states(batch, height, width):
    """As a T2I-Adapter makes them: for the end of each down block's attentions, and for the block without any."""
    half = ((height + 1) // 2, (width + 1) // 2)
    return {"down_intrablock_additional_residuals": [noise(batch, 16, height, width), noise(batch, 32, *half)]}


CONTROLNETS = {
    "ControlNet": (tiny.controlnet, lambda b: text(b) | {"controlnet_cond": noise(b, 3, 72, 56)}),
    "in guess mode": (
        tiny.controlnet,
        lambda b: text(b) | {"controlnet_cond": noise(b, 3, 72, 56), "guess_mode": True},
    ),
    "one picture for all": (tiny.controlnet, lambda b: text(b) | {"controlnet_cond": noise(1, 3, 72, 56)}),
    "XL": (lambda: tiny.controlnet(xl=True), lambda b: xl_text(b) | {"controlnet_cond": noise(b, 3, 72, 56)}),
    "several": (
        lambda: MultiControlNetModel([tiny.controlnet(), tiny.controlnet()]),
        lambda b: (
            text(b)
            | {"controlnet_cond": [noise(b, 3, 72, 56), noise(b, 3, 72, 56) ** 2], "conditioning_scale": [0.3, 1.5]}
        ),
    ),
}


def flat(tree):
    """The leaves of a tree with the kinds of its branches."""
    if isinstance(tree, list | tuple | dict):
        yield type(tree)
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from flat(each)
    else:
        yield tree
