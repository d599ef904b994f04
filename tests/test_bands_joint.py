"""One image over several processes, by transformers with joint attention: what each gets is what one gets alone."""

import warnings
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import diffusers as d
import numpy as np
import pytest
import test_auraflow
import test_chroma
import test_flux
import test_flux2
import test_joint
import test_krea2
import test_lumina2
import test_qwen_image
import test_sd3
import test_z_image
import torch
from diffusers.configuration_utils import FrozenDict
from hypothesis import example, given
from hypothesis import strategies as st
from joint import TILES, paint
from test_bands import assert_close, in_shares, noise, rank_of
from torch.utils._pytree import tree_leaves

import processes
import tiny
from conftest import quiet
from largerespatch import LargeResPatch
from largerespatch.core.band_rows import banded, rounds
from largerespatch.core.bands import counting_sent
from largerespatch.core.families import register, unregister
from largerespatch.core.pieces import rehearsal
from largerespatch.denoisers.joint import asked_for
from largerespatch.memory.counting import LiveBytes

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


def halves(batch, height, width):
    model, told = flux(batch, height, width)
    return model.to(torch.bfloat16), told


MODELS = {"Flux": flux, "Flux in bfloat16": halves, "Flux 2": flux_2, "Chroma": chroma, "Qwen-Image": qwen_image}


def patched(model, size, group, options, **others):
    models = {"transformer": model} | others
    pipe = SimpleNamespace(components=models, scheduler=None, vae_scale_factor=8, **models)
    return LargeResPatch(pipe, 16 * size[1], 16 * size[0], process_group=group, **options)


def step(group, kind, size, batch, options):
    """A transformer's step, with other noise in every process but the first."""
    model, told = MODELS[kind](batch, *size)
    with patched(model, size, group, options), counting_sent() as sent:
        result = model(
            hidden_states=noise(batch, size[0] * size[1], 16, seed=rank_of(group)).to(model.dtype),
            encoder_hidden_states=noise(batch, TEXTS, 32).to(model.dtype),
            timestep=torch.full((batch,), 0.5),
            **{name: each.to(model.dtype) if name == "pooled_projections" else each for name, each in told.items()},
        ).sample
    return result.float().numpy(), dict(sent)


# name: (how many processes, (height, width), batch, options)
STEPS = {
    "whole attention": ((2, 4), (9, 7), 2, {}),
    "bricks": ((2, 3), (14, 11), 2, BLOCKS | {"attn_context": 24}),
    "tiles": ((4,), (13, 16), 1, BLOCKS | {"attn_shape": "tile", "attn_context": 24}),
    "without context": ((3,), (13, 11), 1, BLOCKS | {"attn_context": 0}),
    "few keys for a vast map": ((3,), (14, 11), 2, BLOCKS | {"attn_context": 2}),
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


@pytest.mark.parametrize("kind", ["Flux 2", "Chroma", "Qwen-Image"])
def test_a_step_of_its_kin_is_too(pool, kind):
    for options in ({}, BLOCKS | {"attn_context": 24}):
        what = (kind, (10, 9), 2, options)
        waiting = pool.start(3, step, *what)
        expected, _ = step(None, *what)
        assert_close([result for result, _ in waiting()], expected)


def test_half_precision_is_no_further_from_single_than_that_of_one_process(pool):
    what = ((11, 10), 2, BLOCKS | {"attn_context": 24})
    waiting = pool.start(2, step, "Flux in bfloat16", *what)
    (single, _), (half, _) = (step(None, kind, *what) for kind in ("Flux", "Flux in bfloat16"))
    most = np.square(half - single).mean()
    assert all(np.square(found - single).mean() < 1.1 * most for found, _ in waiting())


# What pipelines call: with pictures to follow, and models that are given latents, whose tokens are cut where they enter
# a list of blocks.
CALLS = {
    "Flux: ControlNet": test_flux.TestFlux.cases["ControlNet"],
    "Flux: IP-Adapter": test_flux.TestFlux.cases["IP-Adapter"],
    "Stable Diffusion 3": test_sd3.TestStableDiffusion3.cases["3.5 medium"],
    "Stable Diffusion 3: IP-Adapter": test_sd3.TestStableDiffusion3.cases["3.5 medium, IP-Adapter"],
    "AuraFlow": test_auraflow.TestAuraFlow.cases["text"],
    "Lumina 2": test_lumina2.TestLumina2.cases["two pictures"],
    "Krea 2": test_krea2.TestKrea2.cases["texts of different lengths"],
    "Z-Image": test_z_image.TestZImage.cases["texts of different lengths"],
}


def called(group, name):
    """What a transformer gives at the first step, with other noise in every process but the first."""
    case = CALLS[name]
    pipe, given = quiet(case.build()), []
    pipe.transformer.register_forward_hook(lambda _, args, result: given.extend(tree_leaves(result)))
    generator = torch.Generator().manual_seed(rank_of(group))
    others = {"controlnet": pipe.controlnet} if hasattr(pipe, "controlnet") else {}
    with (
        patched(pipe.transformer, (9, 11), group, TILES | {"attn_context": 24}, **others),
        counting_sent() as sent,
    ):
        paint(pipe, case.arguments, num_inference_steps=1, generator=generator)
    return given[0].numpy(), dict(sent)


@pytest.mark.parametrize("name", CALLS)
def test_what_pipelines_call_gives_what_one_process_gets(pool, name):
    waiting = pool.start(2, called, name)
    expected, _ = called(None, name)
    results = waiting()
    assert_close([result for result, _ in results], expected)
    assert all({"heads", "maps"} <= sent.keys() for _, sent in results)


def strange(group):
    """What a model of a family gives that says nothing of processes."""
    register(test_joint.Strangers)
    try:
        pipe = test_joint.Pipeline()
        pipe.transformer.config = FrozenDict(in_channels=4)
        with LargeResPatch(pipe, 176, 144, process_group=group, **TILES | {"attn_context": 24}) as active:
            result = pipe(176, 144, 1, torch.Generator().manual_seed(0), "latent")[0]
        return result.numpy(), repr(active)
    finally:
        unregister(test_joint.Strangers)


def test_a_family_need_not_know_of_processes(pool):
    waiting = pool.start(2, strange)
    expected, _ = strange(None)
    results = waiting()
    assert_close([result for result, _ in results], expected)
    assert all("maps in bands of 2 processes, 2 transformer blocks in bricks" in says for _, says in results)


def test_guidance_is_dealt_out_first(pool):
    what = ("Flux", (8, 9), 2, BLOCKS | {"attn_context": 24})
    waiting = pool.start(4, in_shares, 2, step, *what)
    expected, _ = step(None, *what)
    results = waiting()
    assert_close([result for result, _ in results], expected)
    assert all({"samples", "heads"} <= sent.keys() for _, sent in results)


def picture(group):
    case = test_flux.TestFlux.cases["text"]
    pipe = quiet(case.build())
    pipe.transformer = flux(1, 1, 1, num_attention_heads=3)[0]
    generator = torch.Generator().manual_seed(rank_of(group))  # other noise in every process but the first
    options = BLOCKS | {"attn_context": 24, "vae_mode": "exact", "process_group": group}
    with LargeResPatch(pipe, 176, 144, **options):
        size = {"width": 176, "height": 144, "num_inference_steps": 4}
        result = pipe(**size, output_type="pt", generator=generator, **case.arguments)
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())
    return result.images.numpy()


def test_pictures_are_those_of_one_process(pool):
    waiting = pool.start(3, picture)
    assert_close(waiting(), picture(None), 1e-4)


# What is refused


def refusal(group, kind):
    """What a process says of a call that it cannot make, and whether the model is as it was."""
    model, told = MODELS["Flux"](1, 6, 5)
    sample = noise(1, 30, 16)
    if kind == "references":
        told["img_ids"] = torch.cat([told["img_ids"], ids(2, 5) + torch.tensor([1, 0, 0])])
        sample = noise(1, 40, 16)
    elif kind == "no grid":
        told["img_ids"] = told["img_ids"][torch.randperm(30, generator=torch.Generator().manual_seed(0))]
    elif kind == "a cache":
        model.enable_cache(d.PyramidAttentionBroadcastConfig(2, current_timestep_callback=lambda: 500))
    elif kind == "a mask":
        told["joint_attention_kwargs"] = {"attention_mask": torch.zeros(1, 1, 1, 5 * 6 + TEXTS)}
    elif kind == "rows":
        told["img_ids"], sample = ids(1, 30), sample
    else:
        model.requires_grad_(True)
    said = ""
    with patched(model, (6, 5), group, BLOCKS), torch.set_grad_enabled(kind == "gradients"):
        try:
            model(sample, noise(1, TEXTS, 32), timestep=torch.full((1,), 0.5), **told)
        except (ValueError, RuntimeError) as error:
            said = str(error)
    return said, [path for path, module in model.named_modules() if "forward" in vars(module)]


REFUSED = {
    "references": "transformer runs in bands of the tokens of one image, without references; got 6x5 and 2x5",
    "no grid": "transformer runs in bands of the tokens of one image, without references; got no maps that",
    "a cache": "inside it may look at more than one tile, so it cannot run in bands",
    "a mask": "it passes on to its attention what has rows of tokens (attention_mask), so it cannot run in bands",
    "rows": "transformer needs a map of at least 2 rows for 2 processes; got 1",
    "gradients": "transformer runs in bands, which have no gradients",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_calls_that_bands_cannot_make_are_refused_by_all(pool, kind):
    for said, left in pool.run(2, refusal, kind):
        assert said.startswith("process_group: ") and REFUSED[kind] in said
        assert not left or kind == "a cache"  # which leaves hooks of its own


def refused_entry(group, kind):
    model = flux(1, 1, 1, num_attention_heads=2)[0]
    size = (1, 5) if kind == "low" else (6, 5)
    if kind == "parallel":
        model._parallel_config = object()
    with pytest.raises(ValueError, match="process_group") as refused, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that such a model is left as it is
        patched(model, size, group, {})
    return str(refused.value)


def test_what_cannot_be_dealt_out_is_refused_at_entry(pool):
    few = "process_group must have at most 2 processes for FluxTransformer2DModel, each of which does some of as many"
    assert all(few in said for said in pool.run(3, refused_entry, "heads"))
    low = (
        "height must be at least 32 sample pixels for a process_group of 2 (2 or more rows of latent pixels each); got"
    )
    assert all(low in said for said in pool.run(2, refused_entry, "low"))
    shared = "it is not known how several processes share the maps of pipe.transformer (FluxTransformer2DModel)"
    assert all(shared in said for said in pool.run(2, refused_entry, "parallel"))


# Faults


def fault(rank, group):
    model, told = MODELS["Flux"](1, 6, 5)

    def fail(*_):
        raise RuntimeError("out of memory")

    if rank == 1:
        model.single_transformer_blocks[0].register_forward_pre_hook(fail)
    try:
        with patched(model, (6, 5), group, BLOCKS):
            model(noise(1, 30, 16), noise(1, TEXTS, 32), timestep=torch.full((1,), 0.5), **told)
    except RuntimeError as error:
        return str(error), [path for path, module in model.named_modules() if "forward" in vars(module)]


def test_the_others_of_a_process_that_fails_end_with_an_error_that_says_where():
    (said, left), failed = processes.alone(fault, 2, 2)
    assert said.startswith("rank 0 of 2, at transformer.single_transformer_blocks.0: no answer from the others")
    assert left == [] and failed == ("out of memory", [])


# Memory


def peaks(group, options):
    """Of a step: the bytes counted in this process, those told beforehand, by asking nobody, and what is told."""
    pipe, (height, width) = quiet(test_flux.pipeline()), (72, 64)
    pipe.transformer, told = flux(1, height, width, num_attention_heads=6)
    patch = LargeResPatch(pipe, 16 * width, 16 * height, vae_mode="exact", process_group=group, **options)
    told |= {"txt_ids": torch.zeros(512, 3)}  # as many as pipelines give it
    estimated = patch.estimate().step if group is None or group.rank() == 1 else None
    with patch, LiveBytes("cpu") as count:
        pipe.transformer(noise(1, height * width, 16), noise(1, 512, 32), timestep=torch.full((1,), 0.5), **told)
    return count.peak, estimated, repr(patch)


def test_an_estimate_is_of_one_process_which_holds_less(pool):
    options = {"attn_full_tokens": 200, "attn_slice_x": 24, "attn_slice_y": 24, "attn_context": 80}
    waiting = pool.start(3, peaks, options)
    alone, told_alone, _ = peaks(None, options)
    results = waiting()
    most, told = max(peak for peak, _, _ in results), results[1][1]
    assert most < 0.55 * alone
    beside = told_alone - alone  # what a pipeline holds beside the step
    assert abs(told - beside - most) < 0.05 * most
    says = "maps in bands of 3 processes, 4 transformer blocks in bricks of 48x24 and 24x48 tokens with 80 of context"
    assert all(says in each for _, _, each in results)


def told_and_sent(group):
    """Bytes of a step by kind, as a rehearsal counts them and as they are."""
    model, told = MODELS["Flux"](1, 12, 9)
    told |= {"hidden_states": noise(1, 108, 16), "encoder_hidden_states": noise(1, TEXTS, 32)}
    counted = []
    with patched(model, (12, 9), group, BLOCKS | {"attn_slice_y": 2, "attn_context": 24}):
        for inside in (rehearsal(), nullcontext()):
            with inside, asked_for((12, 9)), counting_sent() as sent:
                model(**told, timestep=torch.full((1,), 0.5))
            counted.append(dict(sent))
    return counted


def test_what_is_sent_is_told_without_sending(pool):
    (told, sent), *_ = pool.run(4, told_and_sent)
    assert {"input", "heads", "maps"} == told.keys() and told["heads"] == sent["heads"] and told["maps"] == sent["maps"]
    own, channels, blocks = 3 * 9, 16, 4  # of float32; of five heads the first process does one
    assert sent["heads"] == 4 * blocks * channels * (3 * own * 4 + 3 * own + 3 * TEXTS)


def masked_peak(group):
    model, told = MODELS["Chroma"](1, 32, 24)
    told |= {"hidden_states": noise(1, 32 * 24, 16), "encoder_hidden_states": noise(1, TEXTS, 32)}
    options = {"attn_full_tokens": 200, "attn_slice_x": 8, "attn_slice_y": 8, "attn_context": 32}
    with patched(model, (32, 24), group, options), LiveBytes("cpu") as count:
        model(**told, timestep=torch.full((1,), 0.5))
    return count.peak


def test_a_mask_of_all_tokens_for_all_is_nowhere(pool):
    waiting = pool.start(2, masked_peak)
    alone = masked_peak(None)
    assert max(waiting()) < 0.8 * alone < 4 * (32 * 24) ** 2


# Geometry


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 70))
@example(5, 3, 1)
def test_all_bands_have_as_many_turns_and_each_row_has_one(height, count, longest):
    (rows, *_) = banded(max(height, count), 3, count)
    turns = rounds(rows, longest)
    for i in range(count):
        runs = [each[i] for each in turns]
        assert runs[0][0] == rows.run(i)[0] and runs[-1][1] == rows.run(i)[1]
        assert all(one[1] == other[0] for one, other in pairwise(runs))
        assert all(0 < stop - start <= longest + 1 for start, stop in runs)
