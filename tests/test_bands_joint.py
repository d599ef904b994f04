"""One image over several processes, by transformers with joint attention: what each gets is what one gets alone."""

import diffusers as d
import pytest
import test_flux
import torch
from test_bands import assert_close, in_shares, noise, pool, rank_of  # noqa: F401

from conftest import quiet
from largerespatch import LargeResPatch
from largerespatch.core.bands import counting_sent

pytestmark = pytest.mark.xdist_group("processes")

BLOCKS = {"attn_full_tokens": 20, "attn_slice_x": 4, "attn_slice_y": 3}
HEADS = 5


def flux():
    pipe = test_flux.pipeline(num_attention_heads=HEADS)
    return pipe, {"pooled_projections": noise(1, 32), "txt_ids": torch.zeros(6, 3)}


MODELS = {"Flux": flux}


def ids(height, width):
    return d.FluxPipeline._prepare_latent_image_ids(1, height, width, "cpu", torch.float32)


def step(group, kind, size, batch, options):
    """A transformer's step, with other noise in every process but the first."""
    pipe, told = MODELS[kind]()
    height, width = size
    with LargeResPatch(pipe, 16 * width, 16 * height, process_group=group, **options), counting_sent() as sent:
        result = pipe.transformer(
            hidden_states=noise(batch, height * width, 16, seed=rank_of(group)),
            encoder_hidden_states=noise(batch, 6, 32),
            timestep=torch.full((batch,), 0.5),
            img_ids=ids(height, width),
            **{name: each.expand(batch, -1) if name == "pooled_projections" else each for name, each in told.items()},
        ).sample
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
    waiting = pool.start(counts[0], step, "Flux", *what)
    expected, nothing = step(None, "Flux", *what)
    assert not nothing
    for results in (waiting(), *(pool.run(count, step, "Flux", *what) for count in counts[1:])):
        assert_close([result for result, _ in results], expected)
        assert all({"heads", "maps"} <= sent.keys() for _, sent in results)


PIPELINES = {name: case for name, case in test_flux.TestFlux.cases.items() if name not in ("Kontext",)}


def picture(group, name, options):
    case = PIPELINES[name]
    pipe = quiet(case.build())
    generator = torch.Generator().manual_seed(rank_of(group))
    with LargeResPatch(pipe, 176, 144, vae_mode="exact", process_group=group, **options):
        result = pipe(
            width=176, height=144, num_inference_steps=4, output_type="pt", generator=generator, **case.arguments
        )
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())
    return result.images.numpy()


@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_are_those_of_one_process(pool, name):  # noqa: F811
    waiting = pool.start(2, picture, name, BLOCKS | {"attn_context": 24})
    assert_close(waiting(), picture(None, name, BLOCKS | {"attn_context": 24}), 1e-4)
