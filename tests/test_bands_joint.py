"""One image over several processes, by transformers with joint attention: what each gets is what one gets alone."""

from types import SimpleNamespace

import diffusers as d
import pytest
import test_chroma
import test_flux
import test_flux2
import test_qwen_image
import torch
from test_bands import assert_close, noise, rank_of

import tiny
from conftest import quiet
from largerespatch import LargeResPatch
from largerespatch.core.bands import counting_sent

pytestmark = pytest.mark.xdist_group("processes")

BLOCKS = {"attn_full_tokens": 20, "attn_slice_x": 4, "attn_slice_y": 3}
HEADS, TEXTS = 5, 6


def ids(height, width, axes=3):
    made = torch.zeros(height, width, axes)
    made[..., 1] += torch.arange(height)[:, None]
    made[..., 2] += torch.arange(width)
    return made.flatten(0, 1)


def flux(batch, height, width, **changes):
    model = tiny.frozen(d.FluxTransformer2DModel, 15, **test_flux.MODEL | {"num_attention_heads": HEADS} | changes)
    told = {"pooled_projections": noise(batch, 32), "txt_ids": torch.zeros(TEXTS, 3), "img_ids": ids(height, width)}
    return model, told


def flux_2(batch, height, width):
    model = tiny.frozen(d.Flux2Transformer2DModel, 31, **test_flux2.MODEL | {"num_attention_heads": HEADS})
    places = ids(height, width, 4).expand(batch, -1, -1)
    return model, {"guidance": torch.ones(batch), "txt_ids": torch.zeros(batch, TEXTS, 4), "img_ids": places}


def chroma(batch, height, width):
    model = tiny.frozen(d.ChromaTransformer2DModel, 16, **test_chroma.MODEL | {"num_attention_heads": HEADS})
    mask = torch.ones(batch, TEXTS + height * width)
    mask[:, 4:TEXTS] = 0
    return model, {"txt_ids": torch.zeros(TEXTS, 3), "img_ids": ids(height, width), "attention_mask": mask}


def qwen_image(batch, height, width):
    model = test_qwen_image.pipeline(num_attention_heads=HEADS, joint_attention_dim=32).transformer
    mask = torch.arange(TEXTS).expand(batch, -1) < torch.tensor([[TEXTS], [4]])[:batch]
    return model, {"img_shapes": [[(1, height, width)]] * batch, "encoder_hidden_states_mask": mask}


MODELS = {"Flux": flux, "Flux 2": flux_2, "Chroma": chroma, "Qwen-Image": qwen_image}


def patched(model, size, group, options):
    pipe = SimpleNamespace(components={"transformer": model}, transformer=model, scheduler=None, vae_scale_factor=8)
    return LargeResPatch(pipe, 16 * size[1], 16 * size[0], process_group=group, **options)


def step(group, kind, size, batch, options):
    """A transformer's step, with other noise in every process but the first."""
    model, told = MODELS[kind](batch, *size)
    with patched(model, size, group, options), counting_sent() as sent:
        result = model(
            hidden_states=noise(batch, size[0] * size[1], 16, seed=rank_of(group)),
            encoder_hidden_states=noise(batch, TEXTS, 32),
            timestep=torch.full((batch,), 0.5),
            **told,
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
def test_a_step_is_that_of_one_process(pool, name):
    counts, *what = STEPS[name]
    waiting = pool.start(counts[0], step, "Flux", *what)
    expected, nothing = step(None, "Flux", *what)
    assert not nothing
    for results in (waiting(), *(pool.run(count, step, "Flux", *what) for count in counts[1:])):
        assert_close([result for result, _ in results], expected)
        assert all({"heads", "maps"} <= sent.keys() for _, sent in results)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "Flux"])
def test_a_step_of_its_kin_is_too(pool, kind):
    for options in ({}, BLOCKS | {"attn_context": 24}):
        what = (kind, (10, 9), 2, options)
        waiting = pool.start(3, step, *what)
        expected, _ = step(None, *what)
        assert_close([result for result, _ in waiting()], expected)


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
def test_pictures_are_those_of_one_process(pool, name):
    waiting = pool.start(2, picture, name, BLOCKS | {"attn_context": 24})
    assert_close(waiting(), picture(None, name, BLOCKS | {"attn_context": 24}), 1e-4)
