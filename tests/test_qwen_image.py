"""Qwen-Image: complex rotary pairs, masks over the text, pictures to edit after the image."""

from typing import ClassVar

import diffusers as d
import pytest
import torch
from joint import ALL, CLOSE, Case, JointTests, error, patch
from test_causal import autoencoder

import tiny
from conftest import quiet
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
    family = "Qwen-Image"
    prompt: ClassVar = {"prompt_embeds": noise(1, 512, 16), "prompt_embeds_mask": torch.ones(1, 512, dtype=torch.long)}
    cases: ClassVar = {
        "text": Case(pipeline, TEXT),
        "guidance": Case(pipeline, TEXT | NEGATIVE),
        "texts of different lengths": Case(pipeline, PADDED),
    }


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_pictures_to_edit_are_cut_like_the_image(zero_cond_t):
    """As the editing pipelines call the model: one image, two references; each token told whether it is one."""
    pipe = quiet(pipeline(zero_cond_t=zero_cond_t))
    shapes = [(1, 11, 13), (1, 6, 9), (1, 3, 2)]
    told = {"hidden_states": noise(2, 11 * 13 + 6 * 9 + 3 * 2, 16), "encoder_hidden_states": noise(2, 5, 16)}
    told |= {"timestep": torch.tensor([0.5, 0.5]), "img_shapes": [shapes] * 2, "return_dict": False}
    told["encoder_hidden_states_mask"] = PADDED["prompt_embeds_mask"]
    dense = pipe.transformer(**told)[0]
    errors = []
    for context in (0, 48, ALL):
        with patch(pipe, attn_context=context):
            errors.append(error(pipe.transformer(**told)[0], dense))
    assert errors[0] > errors[1] > 10 * CLOSE > CLOSE > errors[2]
