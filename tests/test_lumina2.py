"""Lumina 2: one stream, text first, as much as each sample has; blocks for the image alone; guidance in two calls."""

from typing import ClassVar

import diffusers as d
import pytest
import torch
from joint import ALL, CLOSE, TOKENS, Case, JointTests, error, paint, patch, strayed

import tiny
from conftest import quiet
from family import noise
from largerespatch import LargeResPatch

KINDS = ("", "negative_")


def texts(*lengths, filled=12):
    """Prompts of so many tokens, filled up, with negative ones that are longer."""
    told = {}
    for i, prefix in enumerate(KINDS):
        told[f"{prefix}prompt_embeds"] = noise(len(lengths), filled, 16, seed=5 + i)
        shown = torch.arange(filled) < torch.tensor(lengths)[:, None] + i
        told[f"{prefix}prompt_attention_mask"] = shown.long()
    return told


TEXT = texts(7)


def pipeline(**changes):
    config = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2}
    config |= {"num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 2}
    config |= {"axes_dim_rope": (4, 4, 4), "axes_lens": (300, 64, 64), "cap_feat_dim": 16}
    return d.Lumina2Pipeline(
        transformer=tiny.frozen(d.Lumina2Transformer2DModel, 21, **config | changes),
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=tiny.flow_vae(4),
        text_encoder=None,
        tokenizer=None,
    )


class TestLumina2(JointTests):
    family = "Lumina 2"
    prompt: ClassVar = texts(256, filled=256)
    cases: ClassVar = {
        "text": Case(pipeline, TEXT),
        "without guidance": Case(pipeline, TEXT | {"guidance_scale": 1.0}),
        "two pictures": Case(pipeline, texts(7, 7)),
        "texts of different lengths": Case(pipeline, texts(7, 3)),
    }


def test_text_sees_all():
    pipe = quiet(pipeline(num_refiner_layers=0))
    away = strayed(pipe, pipe.transformer.layers[0], TEXT)
    assert away[:7].max() < 1e-5 < 1e-4 < away[7:].max()


def test_texts_of_different_lengths_stay_together_where_nothing_is_cut():
    pipe = quiet(pipeline())
    dense = paint(pipe, texts(7, 3))
    for changes in ({"attn_full_tokens": TOKENS}, {"attn_slice_x": 16, "attn_slice_y": 16}):
        with patch(pipe, **changes):
            assert torch.equal(paint(pipe, texts(7, 3)), dense)


class Foreign(d.models.transformers.transformer_lumina2.Lumina2AttnProcessor2_0):
    """Who knows what it looks at."""


def test_texts_of_different_lengths_run_whole_where_they_cannot_take_turns():
    pipe = quiet(pipeline())
    dense = paint(pipe, texts(7, 3))
    pipe.transformer.layers[0].attn.set_processor(Foreign())
    with (
        patch(pipe, attn_context=0),
        pytest.warns(RuntimeWarning, match="texts of different lengths: Foreign may look"),
    ):
        assert torch.equal(paint(pipe, texts(7, 3)), dense)
    with patch(pipe, attn_context=ALL):
        assert error(paint(pipe, TEXT), paint(quiet(pipeline()), TEXT)) < CLOSE


def test_beyond_its_table_of_positions_is_an_error_that_names_sample_pixels():
    pipe = pipeline(axes_lens=(32, 8, 16))
    LargeResPatch(pipe, 128, 128)
    with pytest.raises(ValueError, match=r"at most 128 sample pixels for Lumina2Transformer2DModel.*got 144x128"):
        LargeResPatch(pipe, 144, 128)
