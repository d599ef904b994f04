"""Stable Diffusion 3: image first, attention twice in some blocks, no text from the last, positions from a table."""

from typing import ClassVar

import diffusers as d
import pytest
from joint import HEIGHT, WIDTH, Case, JointTests, embeds

import tiny
from family import picture
from largerespatch import LargeResPatch

TEXT = embeds(32, 64) | embeds(32, 64, seed=7, negative=True)


def transformer(**changes):
    config = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3, "out_channels": 4}
    config |= {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32}
    config |= {"caption_projection_dim": 16, "pooled_projection_dim": 64}
    return tiny.frozen(d.SD3Transformer2DModel, 14, **config | changes)


def pipeline(kind=d.StableDiffusion3Pipeline, **changes):
    texts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    return kind(
        transformer=transformer(**changes),
        vae=tiny.flow_vae(4),
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(texts),
    )


class TestStableDiffusion3(JointTests):
    family = "Stable Diffusion 3"
    prompt: ClassVar = embeds(32, 64, tokens=333) | embeds(32, 64, tokens=333, seed=7, negative=True)
    cases: ClassVar = {
        "text": Case(pipeline, TEXT),
        "without guidance": Case(pipeline, TEXT | {"guidance_scale": 1.0}),
        "two pictures": Case(pipeline, embeds(32, 64, batch=2) | embeds(32, 64, batch=2, seed=7, negative=True)),
        "3.5 medium": Case(lambda: pipeline(dual_attention_layers=(0, 2), qk_norm="rms_norm"), TEXT),
        "from a picture": Case(
            lambda: pipeline(d.StableDiffusion3Img2ImgPipeline), TEXT | {"image": picture(size=WIDTH)[:, :, :HEIGHT]}
        ),
    }


def test_beyond_its_table_of_positions_is_an_error_that_names_sample_pixels():
    pipe = pipeline(pos_embed_max_size=8)
    LargeResPatch(pipe, 128, 128)
    with pytest.raises(ValueError, match=r"at most 128 sample pixels for SD3Transformer2DModel.*got 144x128"):
        LargeResPatch(pipe, 144, 128)
