"""Qwen-Image: complex rotary pairs, masks over the text, pictures to edit after the image."""

from typing import ClassVar

import diffusers as d
import torch
from joint import Case, JointTests
from test_causal import autoencoder

import tiny
from family import noise

TEXT = {"prompt_embeds": noise(1, 5, 16), "prompt_embeds_mask": torch.ones(1, 5, dtype=torch.long)}
PADDED = {"prompt_embeds": noise(2, 5, 16), "prompt_embeds_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
NEGATIVE = {f"negative_{name}": value.flip(1) for name, value in TEXT.items()} | {"true_cfg_scale": 3.0}


def pipeline(kind=d.QwenImagePipeline, **changes):
    config = {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16}
    config |= {"num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 8)}
    return kind(
        vae=autoencoder(),
        transformer=tiny.frozen(d.QwenImageTransformer2DModel, 18, **config | changes),
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )


class TestQwenImage(JointTests):
    cases: ClassVar = {
        "text": Case(pipeline, TEXT),
        "guidance": Case(pipeline, TEXT | NEGATIVE),
        "texts of different lengths": Case(pipeline, PADDED),
    }
