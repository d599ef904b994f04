"""One image over several processes, by transformers with joint attention: what each gets is what one gets alone."""

from types import SimpleNamespace

import diffusers as d
import pytest
import test_flux
import torch
from test_bands import assert_close, noise, pool, rank_of  # noqa: F401

import tiny
from largerespatch import LargeResPatch
from largerespatch.core.bands import counting_sent

pytestmark = pytest.mark.xdist_group("processes")

BLOCKS = {"attn_full_tokens": 20, "attn_slice_x": 4, "attn_slice_y": 3}
FLUX = test_flux.MODEL | {"num_attention_heads": 5}


def flux(**changes):
    return tiny.frozen(d.FluxTransformer2DModel, 15, **FLUX | changes)


def called(model, size, batch, group):
    """A model's call, with other noise in every process but the first."""
    height, width = size
    return model(
        hidden_states=noise(batch, height * width, 16, seed=rank_of(group)),
        encoder_hidden_states=noise(batch, 6, 32),
        pooled_projections=noise(batch, 32),
        timestep=torch.full((batch,), 0.5),
        img_ids=test_flux.d.FluxPipeline._prepare_latent_image_ids(1, height, width, "cpu", torch.float32),
        txt_ids=torch.zeros(6, 3),
    ).sample


def step(group, size, batch, options):
    model = flux()
    pipe = SimpleNamespace(components={"transformer": model}, transformer=model, scheduler=None, vae_scale_factor=8)
    height, width = size
    with LargeResPatch(pipe, 16 * width, 16 * height, process_group=group, **options), counting_sent() as sent:
        result = called(model, size, batch, group)
    return result.numpy(), dict(sent)


# name: (how many processes, (height, width), batch, options)
STEPS = {
    "whole attention": ((2, 4), (9, 7), 2, {}),
    "bricks": ((2, 3), (14, 11), 2, BLOCKS | {"attn_context": 24}),
    "tiles": ((4,), (13, 16), 1, BLOCKS | {"attn_shape": "tile", "attn_context": 24}),
    "without context": ((3,), (13, 11), 1, BLOCKS | {"attn_context": 0}),
    "all as context": ((3,), (11, 8), 1, BLOCKS),
    "one row each": ((4,), (4, 19), 2, BLOCKS | {"attn_context": 24}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_that_of_one_process(pool, name):  # noqa: F811
    counts, *what = STEPS[name]
    waiting = pool.start(counts[0], step, *what)
    expected, nothing = step(None, *what)
    assert not nothing
    for results in (waiting(), *(pool.run(count, step, *what) for count in counts[1:])):
        assert_close([result for result, _ in results], expected)
        assert all({"heads", "maps"} <= sent.keys() for _, sent in results)
