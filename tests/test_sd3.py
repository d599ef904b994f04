"""Stable Diffusion 3: image first, attention twice in some blocks, no text from the last, positions from a table."""

from typing import ClassVar

import diffusers as d
import pytest
import torch
from joint import ALL, CLOSE, HEIGHT, WIDTH, Case, JointTests, embeds, error, paint, patch

import tiny
from conftest import quiet
from family import noise, picture
from largerespatch import LargeResPatch

TEXT = embeds(32, 64) | embeds(32, 64, seed=7, negative=True)
PICTURES = TEXT | {"ip_adapter_image_embeds": noise(2, 3, 10)}


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


def with_ip_adapter(**changes):
    """Of three pictures' tokens, which the image attends to together with itself."""
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
    from diffusers.models.embeddings import IPAdapterTimeImageProjection

    pipe = pipeline(**changes)
    torch.manual_seed(7)
    model, sizes = pipe.transformer, {"hidden_size": 16, "ip_hidden_states_dim": 16, "head_dim": 8}
    model.image_proj = IPAdapterTimeImageProjection(10, 16, 16, depth=1, dim_head=8, heads=2, num_queries=4)
    model.image_proj.requires_grad_(False)
    processors = [SD3IPAdapterJointAttnProcessor2_0(**sizes, timesteps_emb_dim=16) for _ in model.attn_processors]
    for each in processors:
        each.requires_grad_(False)
    model.set_attn_processor(dict(zip(model.attn_processors, processors, strict=True)))
    return pipe


class TestStableDiffusion3(JointTests):
    family = "Stable Diffusion 3"
    prompt: ClassVar = embeds(32, 64, tokens=333) | embeds(32, 64, tokens=333, seed=7, negative=True)
    cases: ClassVar = {
        "text": Case(pipeline, TEXT),
        "without guidance": Case(pipeline, TEXT | {"guidance_scale": 1.0}),
        "two pictures": Case(pipeline, embeds(32, 64, batch=2) | embeds(32, 64, batch=2, seed=7, negative=True)),
        "3.5 medium": Case(lambda: pipeline(dual_attention_layers=(0, 2), qk_norm="rms_norm"), TEXT),
        "IP-Adapter": Case(with_ip_adapter, PICTURES),
        "3.5 medium, IP-Adapter": Case(
            lambda: with_ip_adapter(dual_attention_layers=(0, 2), qk_norm="rms_norm"), PICTURES
        ),
        "IP-Adapter, not told": Case(with_ip_adapter, TEXT),
        "from a picture": Case(
            lambda: pipeline(d.StableDiffusion3Img2ImgPipeline), TEXT | {"image": picture(size=WIDTH)[:, :, :HEIGHT]}
        ),
    }


def test_attention_that_is_not_known_of_is_not_cut_up():
    """Perturbed-attention guidance attends a second time, for some samples, to the same tokens through a mask."""
    pipe, arguments = quiet(pipeline(d.StableDiffusion3PAGPipeline)), TEXT | {"pag_scale": 3.0}
    dense = paint(pipe, arguments)
    told = r"PAGCFGJointAttnProcessor2_0 attends to all tokens more often than is known"
    with patch(pipe, attn_context=ALL), pytest.warns(RuntimeWarning, match=told):
        assert error(paint(pipe, arguments), dense) < CLOSE / 10


def test_beyond_its_table_of_positions_is_an_error_that_names_sample_pixels():
    pipe = pipeline(pos_embed_max_size=8)
    LargeResPatch(pipe, 128, 128)
    with pytest.raises(ValueError, match=r"at most 128 sample pixels for SD3Transformer2DModel.*got 144x128"):
        LargeResPatch(pipe, 144, 128)
