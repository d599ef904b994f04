"""One image over several processes: what each of them gets is what one process gets alone."""

import os
import random
import sys
import time
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import (
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import Attention
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import calls
import processes
import tiny
from conftest import EXAMPLES, quiet
from largerespatch import LargeResPatch
from largerespatch.core.agreement import check_group
from largerespatch.core.band_rows import BandRows, banded, dealt, split
from largerespatch.core.bands import Bands, counting_sent
from largerespatch.core.tilings import COVERS
from largerespatch.memory.counting import LiveBytes
from largerespatch.memory.planner import LEAST_MARGIN
from largerespatch.techniques.attention import chunked_attention
from largerespatch.techniques.attention.context import Context

pytestmark = pytest.mark.xdist_group("processes")

BLOCKS = {"attn_full_tokens": 20, "attn_slice_x": 4, "attn_slice_y": 3}
DEEP = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "norm_num_groups": 4,
}


def fused(model):
    """With attention processors that take no keys but those they make themselves."""
    model.fuse_qkv_projections()
    return model


UNETS = {
    "SD": tiny.unet,
    "deep": lambda: tiny.unet(**DEEP),
    "XL": lambda: tiny.unet(**tiny.XL_UNET),
    "SD in bfloat16": lambda: tiny.unet().to(torch.bfloat16),
    "fused": lambda: fused(tiny.unet()),
}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def rank_of(group):
    """One process alone is the first."""
    if isinstance(group, DeviceMesh):
        return dist.get_rank()
    return 0 if group is None else group.rank()


def step(group, kind, size, batch, options, rank=0):
    """A U-Net's step, with other noise in every process but the first."""
    model = UNETS[kind]()
    pipe = SimpleNamespace(components={"unet": model}, unet=model, scheduler=None, vae_scale_factor=8)
    height, width = size
    wide = kind == "XL"
    added = {"text_embeds": noise(batch, 32), "time_ids": noise(batch, 6)} if wide else None
    with LargeResPatch(pipe, 8 * width, 8 * height, process_group=group, **options), counting_sent() as sent:
        sample = noise(batch, 4, height, width, seed=rank_of(group)).to(model.dtype)
        text = noise(batch, 7, 64 if wide else 32).to(model.dtype)
        result = model(sample, 500, text, added_cond_kwargs=added).sample
    return result.float().numpy(), dict(sent)


def assert_close(found, expected, relative=1e-5):
    """Equal to rounding, relative to the largest value, in every process."""
    expected = torch.as_tensor(expected)
    for each in found:
        assert (torch.as_tensor(each) - expected).abs().max() <= relative * expected.abs().max()


def assert_as_alone(pool, work, count, *what):
    """So many processes get of some work what one gets alone."""
    waiting = pool.start(count, work, *what)
    expected = work(None, *what)
    assert_close(waiting(), expected)


# name: (how many processes, model, (height, width), batch, options)
STEPS = {
    "whole attention": ((2, 4), "SD", (12, 16), 2, {}),
    "bricks": ((2, 3), "SD", (14, 16), 2, BLOCKS),
    "tiles without context": ((4,), "SD", (12, 16), 1, BLOCKS | {"attn_shape": "tile", "attn_context": 0}),
    "little context": ((3,), "SD", (16, 11), 2, BLOCKS | {"attn_context": 30}),
    "odd, with maps too low to be cut": ((2, 3), "deep", (21, 13), 1, BLOCKS),
    "one row each on most maps": ((4,), "deep", (8, 9), 1, {}),
    "circular, odd": ((2,), "deep", (13, 11), 1, {"padding_mode": "circular"} | BLOCKS),
    "circular, three": ((3,), "SD", (11, 8), 1, {"padding_mode": "circular"}),
    "circular, odd across": ((2, 3), "SD", (12, 7), 1, {"padding_mode": "circular"}),
    "reflected": ((3,), "SD", (9, 8), 1, {"padding_mode": "reflect"}),
    "processors that take no other keys": ((2,), "fused", (12, 11), 1, {}),
    "the same in bricks": ((2,), "fused", (12, 11), 1, BLOCKS),
    "SDXL, one sample at a time": ((2,), "XL", (13, 8), 2, {"unet_serial": True} | BLOCKS),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_that_of_one_process(pool, name):
    counts, *what = STEPS[name]
    waiting = pool.start(counts[0], step, *what)
    expected, nothing = step(None, *what)
    assert not nothing
    for results in (waiting(), *(pool.run(count, step, *what) for count in counts[1:])):
        assert_close([result for result, _ in results], expected)
        kinds = {"halo", "statistics"} | ({"tiles", "context"} if name == "bricks" else set())
        assert all(kinds <= sent.keys() for _, sent in results)
        assert [sent["input"] > 0 for _, sent in results] == [True] + [False] * (len(results) - 1)


def lora(model):
    config = LoraConfig(r=2, target_modules=["to_q", "conv1", "proj_in"], init_lora_weights=False)
    torch.manual_seed(6)
    model.add_adapter(config)
    return model


CALLS = {name: calls.UNETS[name] for name in ("ControlNet residuals", "IP-Adapters", "text mask", "one timestep each")}
CALLS |= {
    "T2I-Adapter": (tiny.unet, lambda b, h, w: calls.text(b) | calls.adapter_states(b, h, w)),
    "LoRA": (lambda: lora(tiny.unet()), lambda b, h, w: calls.text(b)),
}


def called(group):
    """What U-Nets make of all that pipelines hand to them beside the sample."""
    results = {}
    for name, (build, arguments) in CALLS.items():
        model = build()
        pipe = SimpleNamespace(components={"unet": model}, unet=model, scheduler=None, vae_scale_factor=8)
        with LargeResPatch(pipe, 72, 88, process_group=group, **BLOCKS):
            results[name] = model(noise(2, 4, 11, 9), **arguments(2, 11, 9)).sample.numpy()
    return results


def test_whatever_else_a_unet_is_given_is_cut_where_it_is_a_map(pool):
    waiting = pool.start(2, called)
    expected = called(None)
    results = waiting()
    for name in CALLS:
        assert_close([each[name] for each in results], expected[name])


HEAVY = [3, 40, 97, 143, 150]


def heavy(group):
    """Places of the heavy tokens of a map, and the context's tokens, where some tokens are made to be wanted."""
    torch.manual_seed(0)
    attention = Attention(16, heads=2, dim_head=8)
    everywhere = torch.randn(16)
    tokens = everywhere + 0.1 * torch.randn(2, 156, 16)  # so every query points one way
    wanted = torch.nn.functional.normalize(attention.to_q(everywhere) @ attention.to_k.weight, dim=0)
    for sample, places in enumerate((HEAVY, HEAVY[1:3])):
        tokens[sample, places] += 12 * wanted
    bands = Bands(group)
    with bands.sharing(13, 12):
        start, stop = BandRows(13, 12).run(0) if group is None else banded(13, 12, group.size())[0].run(group.rank())
        own = tokens[:, 12 * start : 12 * stop]
        context = Context(attention, own, (13, 12), 40, "a", band=bands.sized(stop - start, 12))
    places = context.rows * 12 + context.columns
    return [sorted(each[which].tolist()) for each, which in zip(places, context.stands_for == 1, strict=True)], [
        each[order].numpy() for each, order in zip(context.tokens, places.argsort(dim=1, stable=True), strict=True)
    ]


def test_heavy_tokens_are_found_in_whichever_band_they_are(pool):
    expected, tokens = heavy(None)
    assert expected == [HEAVY, HEAVY[1:3]]
    for found, there in pool.run(3, heavy):
        assert found == expected
        assert all(np.array_equal(one, other) for one, other in zip(there, tokens, strict=True))


def half(group, which, size, batch, options):
    """Encoder or decoder of a VAE, with another input in every process but the first."""
    options = dict(options)
    with mock.patch.object(chunked_attention, "QUERIES", options.pop("queries", chunked_attention.QUERIES)):
        return half_of(group, which, size, batch, options)


def half_of(group, which, size, batch, options):
    vae = fused(tiny.vae()) if "fused" in which else tiny.vae()
    pipe = SimpleNamespace(components={"vae": vae}, vae=vae, progress_bar=silent)
    height, width = size
    with LargeResPatch(pipe, 8 * width, 8 * height, vae_mode="exact", process_group=group, **options):
        seed = rank_of(group)
        if "decode" in which:
            return vae.decode(noise(batch, 4, height, width, seed=seed)).sample.numpy()
        return vae.encode(noise(batch, 3, 8 * height, 8 * width, seed=seed)).latent_dist.parameters.numpy()


@contextmanager
def silent(total):
    yield SimpleNamespace(update=lambda: None, set_description=lambda title: None)


HALVES = {
    "decode": (2, "decode", (11, 9), 2, {}),
    "decode, one row each": (4, "decode", (4, 5), 1, {"vae_chunk_size_y": 3}),
    "decode, attention in chunks": (2, "decode", (11, 9), 2, {"queries": 20}),
    "decode, fused attention in chunks": (2, "fused decode", (11, 9), 2, {"queries": 20}),
    "decode, circular": (3, "decode", (7, 9), 1, {"padding_mode": "circular", "vae_chunk_size_y": 4}),
    "decode, attention blocked": (2, "decode", (11, 9), 1, {"vae_attn": "blocked"} | BLOCKS),
    "decode, a processor that takes no other keys": (2, "fused decode", (9, 9), 1, {}),
    "encode": (3, "encode", (7, 6), 1, {"vae_chunk_size_y": 4}),
    "encode, circular, one row each": (2, "encode", (2, 5), 1, {"padding_mode": "circular"}),
}


@pytest.mark.parametrize("name", HALVES)
def test_decoding_and_encoding_are_those_of_one_process(pool, name):
    assert_as_alone(pool, half, *HALVES[name])


def picture(group, name, options):
    pipe, arguments = PIPELINES[name]
    pipe = quiet(pipe())
    slowed = random.Random(rank_of(group))
    for module in pipe.unet.modules():
        if group is not None and isinstance(module, torch.nn.GroupNorm):
            module.register_forward_pre_hook(lambda *_: time.sleep(slowed.random() / 500))
    seed = rank_of(group)  # other noise in every process but the first
    with LargeResPatch(pipe, 72, 88, vae_mode="exact", process_group=group, **options):
        generator = torch.Generator().manual_seed(seed)
        result = pipe(
            "a house", width=72, height=88, num_inference_steps=4, output_type="pt", generator=generator, **arguments
        )
    assert "forward" not in vars(pipe.unet) and "forward" not in vars(pipe.vae.decoder)
    return result.images.numpy()


def two_controlnets():
    return StableDiffusionControlNetPipeline(**tiny.components(), controlnet=tiny.controlnets())


PIPELINES = {
    "SD": (tiny.text_to_image, {}),
    "ControlNet": (
        lambda: StableDiffusionControlNetPipeline(**tiny.components(), controlnet=tiny.controlnet()),
        {"image": torch.rand(1, 3, 88, 72, generator=torch.Generator().manual_seed(1))},
    ),
    "two ControlNets in guess mode": (
        two_controlnets,
        {
            "image": [torch.rand(1, 3, 88, 72, generator=torch.Generator().manual_seed(i)) for i in (1, 2)],
            "guess_mode": True,
            "num_images_per_prompt": 2,
        },
    ),
    "SDXL": (lambda: StableDiffusionXLPipeline(**tiny.xl_components()), {}),
}


@pytest.mark.parametrize(("name", "count"), [("SD", 3), ("two ControlNets in guess mode", 2), ("SDXL", 2)])
def test_pictures_are_those_of_one_process_though_some_are_slow(pool, name, count):
    waiting = pool.start(count, picture, name, BLOCKS)
    assert_close(waiting(), picture(None, name, BLOCKS), 1e-4)


def test_half_precision_is_no_further_from_single_than_that_of_one_process(pool):
    what = ((13, 12), 2, BLOCKS)
    waiting = pool.start(2, step, "SD in bfloat16", *what)
    (single, _), (half, _) = (step(None, kind, *what) for kind in ("SD", "SD in bfloat16"))
    most = np.square(half - single).mean()
    assert all(np.square(found - single).mean() < 1.1 * most for found, _ in waiting())


def in_shares(group, shares, work, *given):
    """The same, where the samples of a batch are dealt out in so many shares, those of guidance's halves or less."""
    mesh = init_device_mesh("cpu", (shares, group.size() // shares), mesh_dim_names=("guidance", "rows"))
    return work(mesh, *given)


def test_guidance_is_dealt_out_first(pool):
    for shares, *what in (
        (2, "SD", (11, 9), 2, BLOCKS),
        (2, "XL", (12, 8), 4, {"unet_serial": True}),
        (2, "SD", (9, 8), 3, {}),  # which cannot be dealt evenly
        (4, "SD", (9, 8), 4, {}),
    ):
        waiting = pool.start(4, in_shares, shares, step, *what)
        expected, _ = step(None, *what)
        results = waiting()
        assert_close([result for result, _ in results], expected)
        assert all(("samples" in sent) == (what[2] % shares == 0) for _, sent in results)
        assert all(("halo" in sent) == (shares < 4) for _, sent in results)


def test_a_group_of_one_process_is_that_process_alone(pool):
    what = ("SD", (11, 9), 2, BLOCKS)
    expected, _ = step(None, *what)
    ((found, sent),) = pool.run(1, step, *what)
    assert np.array_equal(found, expected) and not sum(sent.values())


@pytest.mark.parametrize("name", ["ControlNet", "two ControlNets in guess mode"])
def test_pictures_in_halves_are_those_of_one_process(pool, name):
    waiting = pool.start(4, in_shares, 2, picture, name, {})
    assert_close(waiting(), picture(None, name, {}), 1e-4)


# What is refused


def freeu():
    pipe = tiny.text_to_image()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return pipe


def other_unet():
    return StableDiffusionPipeline(**tiny.components(unet=tiny.unet(layers_per_block=2)))


KINDS = {
    "SD": tiny.text_to_image,
    "in halves": lambda: tiny.text_to_image().to(torch.float16),
    "of two layers": other_unet,
    "with another scheduler": lambda: StableDiffusionPipeline(**tiny.components(scheduler=PNDMScheduler())),
    "PixArt": tiny.pixart,
    "Kandinsky": tiny.kandinsky,
    "FreeU": freeu,
}


def attributes(pipe):
    models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    return [list(vars(module)) for model in models for module in model.modules()]


def refusal(group, told, to_last=None):
    """What a process says that is told these options, the last one perhaps others."""
    told = {"kind": "SD", "width": 64, "height": 64, "process_group": group} | told
    if group.rank() == group.size() - 1:
        told |= to_last or {}
    pipe = KINDS[told.pop("kind")]()
    before = attributes(pipe)
    try:
        LargeResPatch(pipe, **told)
    except (TypeError, ValueError) as error:
        assert attributes(pipe) == before
        return str(error)
    return ""


ALL = {
    "too low": ({"height": 16}, "height must be at least 24 sample pixels for a process_group of 3"),
    "two passes": ({"vae_mode": "two-pass"}, "vae_mode must be 'exact' with a process_group"),
    "strips": ({"unet_strip_rows": 4}, "unet_strip_rows must be None with a process_group"),
    "recomputed": ({"vae_recompute": True}, "vae_recompute must be False with a process_group"),
    "skips away": ({"unet_offload": True}, "unet_offload must be False with a process_group"),
    "maps away": ({"vae_offload": True}, "vae_offload must be False with a process_group"),
    "another denoiser": (
        {"kind": "PixArt"},
        "pipe.transformer (PixArtTransformer2DModel); accepted are AutoencoderKL, AutoencoderKLFlux2,",
    ),
    "another U-Net": ({"kind": "Kandinsky"}, "pipe.unet (UNet2DConditionModel); accepted are"),
    "a U-Net with FreeU": ({"kind": "FreeU"}, "pipe.unet (UNet2DConditionModel); accepted are"),
}


@pytest.mark.parametrize("name", ALL)
def test_what_bands_cannot_do_is_refused_by_all(pool, name):
    told, expected = ALL[name]
    for said in pool.run(3, refusal, told):
        assert expected in said


LAST = {
    "width": ({"width": 96}, "width must be the same in all processes; rank 1 of 2 has 96, rank 0 has 64"),
    "option": (
        {"attn_slice_x": 32},
        "attn_slice_x must be the same in all processes; rank 1 of 2 has 32, rank 0 has 64",
    ),
    "dtype": (
        {"kind": "in halves"},
        "pipe.vae.dtype must be the same in all processes; rank 1 of 2 has torch.float16, rank 0 has torch.float32",
    ),
    "config": (
        {"kind": "of two layers"},
        "pipe.unet.config.layers_per_block must be the same in all processes; rank 1 of 2 has 2",
    ),
    "scheduler": (
        {"kind": "with another scheduler"},
        "pipe.scheduler must be the same in all processes; rank 1 of 2 has PNDMScheduler, rank 0 has DDIMScheduler",
    ),
    "no size": ({"width": 60}, "rank 1 of 2 was refused: width must be a multiple of 8"),
    "no option": ({"tiles": 3}, "rank 1 of 2 was refused: tiles is no option"),
}


@pytest.mark.parametrize("name", LAST)
def test_what_differs_is_an_error_in_all_that_names_process_and_option(pool, name):
    to_last, expected = LAST[name]
    first, last = pool.run(2, refusal, {}, to_last)
    assert expected in first
    assert last in first if "refused" in expected else last == first


def not_a_member(group):
    others = dist.new_group([0])
    said = ""
    if dist.get_rank():
        with pytest.raises(ValueError, match="that this process is a member of") as refused:
            LargeResPatch(tiny.text_to_image(), 64, 64, process_group=others)
        said = str(refused.value)
    return said


def on_an_accelerator(group):
    with pytest.raises(
        ValueError, match=r"process_group must be of a backend .* cuda:0.*; got one of 'gloo'"
    ) as refused:
        check_group(group, torch.device("cuda:0"), 64, 8)
    return str(refused.value)


def test_groups_that_cannot_be_used_are_refused(pool, pipe):
    for value in ("gloo", 2, object()):
        with pytest.raises(TypeError, match=r"process_group must be None, a torch.distributed.ProcessGroup.*; got"):
            LargeResPatch(pipe, 64, 64, process_group=value)
    assert all(pool.run(4, not_a_member)[1:])
    assert all(pool.run(2, on_an_accelerator))


def refused_call(group, size, extra):
    model = tiny.unet()
    pipe = SimpleNamespace(components={"unet": model}, unet=model, scheduler=None, vae_scale_factor=8)
    with LargeResPatch(pipe, 64, 64, process_group=group):
        try:
            model(noise(1, 4, *size), 500, noise(1, 7, 32), **extra)
        except ValueError as error:
            return str(error)
    return ""


def test_calls_that_bands_cannot_make_are_refused(pool):
    masks = {"cross_attention_kwargs": {"ip_adapter_masks": [noise(1, 1, 8, 8)]}}
    assert (
        "unet runs in bands of maps and cannot be given ip_adapter_masks" in pool.run(2, refused_call, (8, 8), masks)[0]
    )
    assert "unet needs a map of at least 3 rows for 3 processes; got 2" in pool.run(3, refused_call, (2, 8), {})[2]
    assert "a map of 1 columns is too narrow to be halved 1 times" in pool.run(2, refused_call, (8, 1), {})[1]


# Faults


def fault(rank, group, how, where):
    """What is said of the others by a process that goes on, and whether the model is as it was."""
    model = tiny.unet()
    pipe = SimpleNamespace(components={"unet": model}, unet=model, scheduler=None, vae_scale_factor=8)

    def fail(*_):
        if how == "dies":
            os._exit(1)
        raise KeyboardInterrupt if how == "is interrupted" else RuntimeError("out of memory")

    if rank == 1:
        model.get_submodule(where).register_forward_pre_hook(fail)
    said = ""
    try:
        with LargeResPatch(pipe, 64, 64, process_group=group):
            model(noise(1, 4, 8, 8), 500, noise(1, 7, 32))
    except (RuntimeError, KeyboardInterrupt) as error:
        said = str(error)
    return said, [path for path, module in model.named_modules() if "forward" in vars(module)]


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
FAULTS = {  # where one process fails, and where another one meets that
    "dies": ("mid_block", "mid_block.resnets.0.norm1"),
    "raises": (ATTENTION, ATTENTION),
    "is interrupted": ("up_blocks.0.upsamplers.0", "up_blocks.0.upsamplers.0.conv"),
}


@pytest.mark.parametrize("how", FAULTS)
def test_the_others_of_a_process_that_fails_end_with_an_error_that_says_where(how):
    where, meets = FAULTS[how]
    (said, left), failed = processes.alone(fault, 2, 5, how, where)
    expected = f"rank 0 of 2, at unet.{meets}: no answer from the others; another rank has probably failed, see its log"
    assert said == expected
    assert left == []
    assert failed == {"dies": "died", "raises": ("out of memory", []), "is interrupted": ("", [])}[how]


# Memory


def peaks(group, size, options):
    """Of a step and a decode: the bytes counted in this process, and those told beforehand, by asking nobody."""
    pipe = quiet(tiny.text_to_image())
    height, width = size
    patch = LargeResPatch(pipe, 8 * width, 8 * height, process_group=group, vae_mode="exact", **options)
    # One process alone: it would wait for the others.
    told = patch.estimate() if group is None or group.rank() == 1 else None
    found = []
    with patch, counting_sent() as sent:
        for work in (
            lambda: pipe.unet(noise(2, 4, *size), 500, noise(2, 77, 32)),
            lambda: pipe.vae.decode(noise(1, 4, *size)),
        ):
            with LiveBytes("cpu") as count:
                work()
            found.append(count.peak)
    assert group is None or sent["statistics"]
    return found, told and [told.step, told.decode]


def test_an_estimate_is_of_the_tallest_band(pool):
    options = {"attn_full_tokens": 200, "attn_slice_x": 8, "attn_slice_y": 8, "attn_context": 32}
    waiting = pool.start(3, peaks, (50, 48), options)
    found, told = peaks(None, (50, 48), options)
    results = waiting()
    # What a lower band takes to send its rows of a picture is not counted.
    for i, (alone, least) in enumerate(zip(found, (0.97, 0.85), strict=True)):
        most = max(here[i] for here, _ in results)
        assert most < 0.45 * alone
        expected = results[1][1][i]
        assert least * most < expected < 1.05 * most and expected < 0.45 * told[i]


def planned(group, limit):
    return repr(
        LargeResPatch(tiny.text_to_image(), 512, 512, process_group=group, vae_mode="exact", memory_limit=limit)
    )


def test_a_limit_is_of_each_process(pool):
    """What one process does not fit into without savers two of them do."""
    known = LargeResPatch(tiny.text_to_image(), 512, 512, vae_mode="exact").estimate()
    limit = known.weights + int(0.7 * known.decode) + LEAST_MARGIN
    waiting = pool.start(2, planned, limit)
    assert "vae_recompute=True" in planned(None, limit)
    one, other = waiting()
    assert "no saver needed" in one and "maps in bands of 2 processes" in one and one == other
    assert "maps in one band, of one process" in pool.run(1, planned, limit)[0]
    lower = known.weights + int(0.26 * known.decode) + LEAST_MARGIN
    assert "vae_chunk_size_y=" in pool.run(2, planned, lower)[1]  # of savers those that there are for bands


def decoded(group):
    pipe = quiet(tiny.text_to_image())
    latents = noise(1, 4, 13, 9, seed=rank_of(group))
    return np.asarray(LargeResPatch(pipe, 72, 104, vae_mode="exact", process_group=group).decode(latents))


def test_images_of_latents_are_those_of_one_process(pool):
    expected = decoded(None).astype(int)
    assert all(abs(found - expected).max() <= 1 for found in pool.run(3, decoded))  # to rounding


# The example


def painted(group):
    sys.path.insert(0, str(EXAMPLES))
    script = import_module("several_devices")
    options = script.build_parser().parse_args(["--width", "256", "--height", "128", "--steps", "2"])
    image, taken = script.paint(quiet(script.load_pipeline()), group, options)
    return np.asarray(image).astype(int), list(map(tuple, script.report(taken, group)))


def test_the_example_paints_one_image_and_tells_what_each_process_took(pool):
    one, other = pool.run(2, painted)
    ((alone, ((_, _, most),)),) = pool.run(1, painted)
    assert np.array_equal(one[0], other[0]) and abs(one[0] - alone).max() <= 1  # to rounding
    assert [rank for rank, _, _ in one[1]] == [0, 1]
    assert all(seconds > 0 and size < most for _, seconds, size in one[1])


# Geometry


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 9), st.integers(0, 4), st.integers(0, 3), st.booleans())
@example(165, 16, 9, 4, 3, False)
def test_bands_cover_every_map_and_fit_each_other(height, width, count, halvings, doublings, rounds_up):
    try:
        maps = banded(height, width, count, halvings, doublings, rounds_up)
    except ValueError:
        assert height < count or width < 2**halvings
        return
    assert (maps[doublings].height, maps[doublings].width) == (height, width)
    for larger, smaller in pairwise(maps):
        if larger.cuts and not smaller.cuts:
            assert smaller.height < 2 * count
        if smaller.cuts:
            assert [2 * cut for cut in smaller.cuts[:-1]] == list(larger.cuts[:-1])
    for rows in maps:
        runs = [rows.run(i) for i in range(count)]
        if rows.cuts:
            assert runs[0][0] == 0 and runs[-1][1] == rows.height
            assert all(one[1] == other[0] for one, other in pairwise(runs)) and all(a < b for a, b in runs)
            assert rows.tallest() <= 2 * rows.height / count + 1
        else:
            assert runs == [(0, rows.height)] * count


@given(st.integers(1, 30), st.integers(1, 5), st.data(), st.booleans())
def test_whoever_has_rows_is_known(height, count, data, wrap):
    count = min(count, height)
    cuts = (
        sorted(data.draw(st.sets(st.integers(1, height - 1), min_size=count - 1, max_size=count - 1)))
        if count > 1
        else []
    )
    rows = BandRows(height, 3, (0, *cuts, height))
    start, stop = sorted(data.draw(st.tuples(st.integers(-height, 2 * height), st.integers(-height, 2 * height))))
    found = [(i, row) for i, run in rows.owners(start, stop, wrap) for row in range(*run)]
    wanted = [row % height for row in range(start, stop) if wrap or 0 <= row < height]
    assert [row for _, row in found] == wanted
    assert all(rows.cuts[i] <= row < rows.cuts[i + 1] for i, row in found)


@given(st.sampled_from(sorted(COVERS)), st.integers(16, 90), st.integers(16, 90), st.integers(0, 3), st.integers(2, 8))
def test_tiles_are_dealt_by_area_and_split_where_bands_are(shape, height, width, phase, count):
    cover = COVERS[shape](height, width, phase, 8, 8)
    hands = dealt(cover, count)
    assert sorted(tile for hand in hands for tile in hand) == sorted(cover)
    largest = max(tile.area for tile in cover)
    assert all(sum(tile.area for tile in hand) <= height * width / count + largest for hand in hands)
    cuts = banded(height, width, count)[0].cuts
    for tile in cover:
        parts = list(split(tile, cuts))
        assert sum(part.area for _, part in parts) == tile.area
        assert all(cuts[i] <= part.top < part.bottom <= cuts[i + 1] for i, part in parts)
