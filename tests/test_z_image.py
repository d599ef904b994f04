"""Z-Image: one stream, image first, lists, filled up to multiples of 32, blocks for the image alone."""

from typing import ClassVar

import diffusers as d
import pytest
import torch
from joint import HEIGHT, WIDTH, Case, JointTests

import tiny
from family import noise, picture
from largerespatch import LargeResPatch

TEXT = {"prompt_embeds": [noise(12, 16)], "negative_prompt_embeds": [noise(7, 16)], "guidance_scale": 2.0}
TWO = {"prompt_embeds": [noise(12, 16), noise(40, 16)], "guidance_scale": 0.0}


def pipeline(kind=d.ZImagePipeline):
    transformer = tiny.frozen(
        d.ZImageTransformer2DModel,
        4,
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 256, 256],
    )
    return kind(
        d.FlowMatchEulerDiscreteScheduler(),
        tiny.flow_vae(4),
        transformer=transformer,
        text_encoder=None,
        tokenizer=None,
    )


class TestZImage(JointTests):
    family = "Z-Image"
    prompt: ClassVar = {"prompt_embeds": [noise(512, 16)], "negative_prompt_embeds": [noise(512, 16)]}
    cases: ClassVar = {
        "text": Case(pipeline, TEXT),
        "texts of different lengths": Case(pipeline, TWO),
        "from a picture": Case(
            lambda: pipeline(d.ZImageImg2ImgPipeline), TEXT | {"image": picture(size=WIDTH)[:, :, :HEIGHT]}
        ),
    }


def test_beyond_its_table_of_positions_is_an_error_that_names_sample_pixels():
    pipe = pipeline()
    LargeResPatch(pipe, 4096, 64)
    with pytest.raises(ValueError, match=r"at most 4096 sample pixels for ZImageTransformer2DModel.*got 64x4112"):
        LargeResPatch(pipe, 64, 4112)
    with pytest.raises(IndexError):
        pipe.transformer([noise(4, 1, 4112 // 8, 2)], torch.tensor([0.5]), [noise(12, 16)])
