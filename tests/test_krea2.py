"""Krea 2: one stream, text first, masks over its text, fewer heads for keys than for queries, guidance in two calls."""

from typing import ClassVar

import diffusers as d
import torch
from joint import Case, JointTests, paint, patch
from test_causal import autoencoder

import tiny
from conftest import quiet
from family import noise
from largerespatch.techniques.joint.pooled import PooledMap

MASK = torch.tensor([[True, True, True, False, True]])
TEXT = {"prompt_embeds": noise(1, 5, 3, 16), "prompt_embeds_mask": MASK}
ALONE = TEXT | {"guidance_scale": 0.0}
GUIDED = TEXT | {f"negative_{name}": value.flip(1) for name, value in TEXT.items()}
TWO = {"prompt_embeds": noise(2, 5, 3, 16), "prompt_embeds_mask": torch.cat([MASK, MASK.flip(1)])}
LONG = {"prompt_embeds": noise(1, 512, 3, 16), "prompt_embeds_mask": torch.ones(1, 512, dtype=torch.bool)}


def pipeline():
    transformer = tiny.frozen(
        d.Krea2Transformer2DModel,
        33,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 8),
    )
    return d.Krea2Pipeline(
        transformer=transformer,
        vae=autoencoder(),
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_select_layers=(1, 2, 3),
        is_distilled=True,
    )


class TestKrea2(JointTests):
    family = "Krea 2"
    prompt: ClassVar = LONG | {f"negative_{name}": value for name, value in LONG.items()}
    cases: ClassVar = {
        "text": Case(pipeline, GUIDED),
        "without guidance": Case(pipeline, ALONE),
        "texts of different lengths": Case(pipeline, TWO | {"guidance_scale": 0.0}),
    }


def test_keys_that_heads_share_are_kept_once(monkeypatch):
    pipe, heads = quiet(pipeline()), []
    chosen = PooledMap.chosen

    def look(pooled, *of):
        heads.append(pooled.levels[0][0].shape[1])
        return chosen(pooled, *of)

    monkeypatch.setattr(PooledMap, "chosen", look)
    with patch(pipe, attn_context=16):
        paint(pipe, ALONE)
    assert set(heads) == {2}
