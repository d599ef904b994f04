"""Joint-attention transformers tile by tile beside what else users do to a pipeline.

ControlNet, IP-Adapter and true guidance are among the ways in which pipelines call Flux: see `test_flux`.
"""

from collections import Counter
from contextlib import nullcontext
from functools import partial

import accelerate
import diffusers as d
import pytest
import test_cogview4
import test_flux
import test_lumina2
import test_sd3
import torch
import torch.nn.functional as F
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import GroupOffloadingType
from joint import ALL, CLOSE, TOKENS, error, paint, patch
from peft import LoraConfig
from products import in_pairs
from test_company import CPU
from test_weights import META, PlayedGroup, loads, offload_on_a_stream  # noqa: F401  fixtures
from torch import nn

from conftest import quiet
from family import noise
from largerespatch import LargeResPatch
from test_patch import fingerprint

FLUX = (test_flux.pipeline, test_flux.TEXT)
# Both of a block's attentions are of the image; guidance in one call.
SD3 = (partial(test_sd3.pipeline, dual_attention_layers=(0, 1), qk_norm="rms_norm"), test_sd3.TEXT)
# One stream, with blocks for the image alone before it; samples that take turns.
LUMINA = (test_lumina2.pipeline, test_lumina2.texts(7, 3) | {"guidance_scale": 1.0})
# Guidance in two calls.
COGVIEW = (test_cogview4.pipeline, test_cogview4.TEXT)
KINDS = {"Flux": FLUX, "Stable Diffusion 3.5": SD3, "Lumina 2": LUMINA, "CogView 4": COGVIEW}


def hooked(kind, *hooks):
    pipe = quiet(kind[0]())
    for hook in hooks:
        hook(pipe)
    return pipe


def compared(pipe, arguments, **changes):
    """How far from what the pipeline makes unpatched it is with all of a context, and without any."""
    dense = paint(pipe, arguments, **changes)
    errors = []
    for context in (ALL, 0):
        with patch(pipe, attn_context=context):
            errors.append(error(paint(pipe, arguments, **changes), dense))
    assert torch.equal(paint(pipe, arguments, **changes), dense)
    return errors


def assert_blocked_and_dense(pipe, arguments, **changes):
    dense, alone = compared(pipe, arguments, **changes)
    assert dense < CLOSE < 10 * CLOSE < alone


# --- weights of others ---

LINEARS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "ff.net.2", "proj_mlp", "proj_out"]


def loras(pipe):
    for i, name in enumerate(("one", "other")):
        torch.manual_seed(i)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=LINEARS, init_lora_weights=False), name)
    pipe.transformer.set_adapters(["one", "other"], [0.5, 1.5])


def fused(pipe):
    loras(pipe)
    pipe.transformer.fuse_lora(adapter_names=["one", "other"])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_several_loras_and_fused_ones():
    plain, both, melted = (hooked(FLUX, *hooks) for hooks in ((), (loras,), (fused,)))
    assert error(paint(both, FLUX[1]), paint(plain, FLUX[1])) > 0.01
    assert_blocked_and_dense(both, FLUX[1])
    assert_blocked_and_dense(melted, FLUX[1])
    with patch(both, attn_context=24), patch(melted, attn_context=24):
        assert error(paint(both, FLUX[1]), paint(melted, FLUX[1])) < 0.1 * error(
            paint(both, FLUX[1]), paint(plain, FLUX[1])
        )


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_the_scale_of_a_lora_is_told_by_attention_kwargs():
    pipe = hooked(FLUX, loras)
    scaled = FLUX[1] | {"joint_attention_kwargs": {"scale": 0.3}}
    assert error(paint(pipe, scaled), paint(pipe, FLUX[1])) > 0.01
    assert_blocked_and_dense(pipe, scaled)


@pytest.mark.parametrize("kind", ["Flux", "CogView 4"])
def test_layers_that_are_stored_in_eight_bits(kind):
    def cast(pipe):
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    pipe = hooked(KINDS[kind], cast)
    assert_blocked_and_dense(pipe, KINDS[kind][1])
    assert any(weight.dtype == torch.float8_e4m3fn for weight in pipe.transformer.parameters())
    assert error(paint(pipe, KINDS[kind][1]), paint(hooked(KINDS[kind]), KINDS[kind][1])) > CLOSE  # so it was rounded


@pytest.mark.filterwarnings("ignore")  # torch would rather have it done by others
def test_quantized_linear_layers():
    """They find the range of what they are given in each call, so tiles differ by as much as eight bits can tell."""
    dense = paint(hooked(FLUX), FLUX[1])
    pipe = hooked(FLUX)
    pipe.transformer = torch.ao.quantization.quantize_dynamic(pipe.transformer, {nn.Linear}, dtype=torch.qint8)
    quantized = paint(pipe, FLUX[1])
    with patch(pipe, attn_context=ALL) as active:
        assert "4 transformer blocks" in repr(active)
        assert CLOSE < error(paint(pipe, FLUX[1]), quantized) < 2 * error(quantized, dense)


# --- offloading ---


def by_layer(pipe):
    """As ``enable_sequential_cpu_offload`` does: weights are on the meta device but while a layer runs."""
    for model in (pipe.transformer, pipe.vae):
        accelerate.cpu_offload(model, execution_device=CPU)


def by_leaf_group(pipe):
    apply_group_offloading(pipe.transformer, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def by_block_group(pipe):
    apply_group_offloading(
        pipe.transformer, onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    )


def by_model(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def once(pipe, arguments):
    return paint(pipe, arguments, num_inference_steps=1)


BRINGERS = [by_layer, by_leaf_group, by_block_group]
IN_TURNS = [(kind, hook) for i, kind in enumerate(KINDS) for j, hook in enumerate(BRINGERS) if (i + j) % 2 == 0]


@pytest.mark.parametrize(("kind", "hook"), IN_TURNS)
def test_a_weight_comes_once_for_all_tiles_and_leaves(kind, hook, loads):  # noqa: F811
    """Blocks are left in the middle when their keys are known, so what is to happen behind them does not."""
    arguments = KINDS[kind][1]
    pipe, unhooked = hooked(KINDS[kind], hook), hooked(KINDS[kind])
    loads.clear(), loads.there.clear()  # buffers come to stay
    once(pipe, arguments)
    unpatched = +loads
    assert not loads.there
    with patch(pipe, attn_context=24), patch(unhooked, attn_context=24):
        loads.clear()
        assert torch.equal(once(pipe, arguments), once(unhooked, arguments))
    assert set(loads) == set(unpatched)
    turns = 2 if kind == "Lumina 2" else 1  # as if called for each sample
    assert all(loads[each] <= turns * unpatched[each] for each in unpatched)
    assert not loads.there
    assert hook is not by_layer or all(weight.device == META for weight in pipe.transformer.parameters())


@in_pairs(
    {
        "kind": ["Flux", "Stable Diffusion 3.5"],
        "patched_first": [False, True],
        "offload_on_a_stream": GroupOffloadingType,
    },
    ["offload_on_a_stream"],
)
def test_groups_that_come_ahead_on_a_stream_come_once_and_are_there(
    kind,
    patched_first,
    offload_on_a_stream,  # noqa: F811
    monkeypatch,
):
    """Which one comes next is learnt in the first call. That may be one with the patch on, or without."""
    arguments, come, comings = KINDS[kind][1], PlayedGroup.onload_, Counter()

    def noting(group):
        comings[group] += 1
        come(group)

    monkeypatch.setattr(PlayedGroup, "onload_", noting)
    pipe, unhooked = hooked(KINDS[kind]), hooked(KINDS[kind])
    offload_on_a_stream(pipe.transformer)
    for i, patched in enumerate((patched_first, not patched_first, patched_first)):
        comings.clear()
        patches = [patch(each, attn_context=24) if patched else nullcontext() for each in (pipe, unhooked)]
        with patches[0], patches[1]:
            assert torch.equal(once(pipe, arguments), once(unhooked, arguments))
        assert i == 0 or set(comings.values()) == {1}


class Stop(BaseException):
    pass


@pytest.mark.parametrize("hook", BRINGERS)
def test_after_an_exception_on_the_way_all_is_as_before(hook, loads, monkeypatch):  # noqa: F811
    pipe = hooked(FLUX, hook)
    project, met = F.linear, []

    def stopping(*args, **kwargs):
        met.append(1)
        if len(met) == stop_at:
            raise Stop
        return project(*args, **kwargs)

    with patch(pipe, attn_context=24):
        expected, inside = once(pipe, FLUX[1]), fingerprint(pipe)
        for stop_at in (1, 8, 20, 60, 100):
            met.clear()
            with monkeypatch.context() as patching, pytest.raises(Stop):
                patching.setattr(F, "linear", stopping)
                once(pipe, FLUX[1])
            assert len(met) == stop_at
            there = [each for each in pipe.transformer.transformer_blocks.parameters() if each.device != META]
            assert hook is not by_layer or not there
        assert torch.equal(once(pipe, FLUX[1]), expected)
        assert not loads.there
        assert set(fingerprint(pipe)) == set(inside)


def test_model_offload_takes_its_hooks_off_and_on_around_every_call():
    pipe = hooked(FLUX, by_model)
    before = pipe.transformer.forward
    assert_blocked_and_dense(pipe, FLUX[1])
    assert pipe.transformer.forward is not before


# --- caches ---


def first_block(pipe):
    pipe.transformer.enable_cache(d.FirstBlockCacheConfig(threshold=10.0))


def magnitudes(pipe):
    pipe.transformer.enable_cache(
        d.MagCacheConfig(mag_ratios=torch.ones(4), num_inference_steps=4, threshold=0.5, retention_ratio=0.2)
    )


@pytest.mark.parametrize("cache", [first_block, magnitudes])
def test_caches_around_blocks_work(cache):
    """The first step's blocks stand for later ones', in which few are called."""
    pipe, uncached = hooked(FLUX, cache), hooked(FLUX)
    dense, called = paint(pipe, FLUX[1], num_inference_steps=4), []
    assert error(dense, paint(uncached, FLUX[1], num_inference_steps=4)) > CLOSE
    pipe.transformer.single_transformer_blocks[0].norm.register_forward_pre_hook(lambda *_: called.append(1))
    with patch(pipe, attn_context=ALL), pytest.warns(RuntimeWarning, match=r"forward hooks inside it \(norm\)"):
        assert error(paint(pipe, FLUX[1], num_inference_steps=4), dense) < CLOSE
    tiles = len(called)
    called.clear()
    with patch(pipe, attn_context=0), pytest.warns(RuntimeWarning, match="forward hooks inside"):
        assert error(paint(pipe, FLUX[1], num_inference_steps=4), dense) > 10 * CLOSE
    assert 0 < len(called) == tiles < 4 * 2 * 2 * 9  # steps, walks, and at least as many tiles, each once


def broadcast(pipe):
    pipe.transformer.enable_cache(
        d.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 2000),
            current_timestep_callback=lambda: 500,
        )
    )


def taylor(pipe):
    pipe.transformer.enable_cache(d.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1))


@pytest.mark.parametrize(
    ("cache", "named"), [(broadcast, "PyramidAttentionBroadcastHook"), (taylor, "TaylorSeerCacheHook")]
)
def test_caches_of_attentions_are_declined_with_one_warning_that_names_them(cache, named):
    """What one tile's attention gave would be taken for another's."""
    pipe = hooked(FLUX, cache)
    dense = paint(pipe, FLUX[1], num_inference_steps=4)
    assert error(dense, paint(hooked(FLUX), FLUX[1], num_inference_steps=4)) > CLOSE
    with patch(pipe, attn_context=0), pytest.warns(RuntimeWarning) as warned:
        assert torch.equal(paint(pipe, FLUX[1], num_inference_steps=4), dense)
        pipe.transformer.disable_cache()
        assert not torch.equal(paint(pipe, FLUX[1], num_inference_steps=4), dense)
    assert [str(each.message) for each in warned] == [
        f"FluxTransformerBlock: {named} inside it may look at more than one tile: it runs on all tokens at once, in as "
        "much memory as without this patch"
    ]


# --- what else looks on, or is put in ---


@pytest.mark.filterwarnings("ignore")  # of dynamo's
def test_blocks_that_are_compiled_run_as_they_are_where_they_are_tiled():
    torch.compiler.reset()
    expected, seen = paint(hooked(FLUX), FLUX[1]), []

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    pipe = hooked(FLUX)
    pipe.transformer.compile_repeated_blocks(backend=backend)
    with patch(pipe, attn_context=ALL):
        assert error(paint(pipe, FLUX[1]), expected) < CLOSE
    with patch(pipe, attn_context=0):
        assert error(paint(pipe, FLUX[1]), expected) > 10 * CLOSE
    inside = len(seen)
    assert error(paint(pipe, FLUX[1]), expected) < CLOSE
    assert len(seen) > inside  # no graph of the patched blocks is used
    torch.compiler.reset()


def test_callbacks_at_the_end_of_steps_see_and_change_latents():
    def halve(pipe, step, timestep, tensors):
        seen.append((step, tensors["latents"].shape))
        return {"latents": tensors["latents"] / 2}

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        seen.append(step)
        return {}

    pipe, seen = hooked(FLUX), []
    assert_blocked_and_dense(pipe, FLUX[1] | {"callback_on_step_end": halve})
    assert len(seen) == 4 * 2 and seen[:2] == [(0, (1, TOKENS, 16)), (1, (1, TOKENS, 16))]
    seen.clear()
    assert_blocked_and_dense(pipe, FLUX[1] | {"callback_on_step_end": stop}, num_inference_steps=3)
    assert seen == [0] * 4


def test_attention_that_is_told_of_tokens_in_words_of_its_own_sees_all_of_them():
    """A mask that keeps a part of the text from a part of the image, as for prompts by region."""
    seen = torch.ones(1, 1, 5 + TOKENS, 5 + TOKENS, dtype=torch.bool)
    seen[..., 60:, :3] = False
    pipe, arguments = hooked(FLUX), FLUX[1] | {"joint_attention_kwargs": {"attention_mask": seen}}
    dense = paint(pipe, arguments)
    assert error(dense, paint(pipe, FLUX[1])) > CLOSE
    with (
        patch(pipe, attn_context=0),
        pytest.warns(RuntimeWarning, match=r"rows of tokens \(attention_mask\)") as warned,
    ):
        assert torch.equal(paint(pipe, arguments), dense)
    assert len(warned) == 1


def test_forward_hooks_see_all_on_blocks_and_tiles_inside_of_which_is_warned_once():
    pipe = hooked(FLUX)
    blocks = pipe.transformer.transformer_blocks
    on_block, inside = [], []
    blocks[0].register_forward_hook(lambda module, given, result: on_block.append(result[1]))
    once(pipe, FLUX[1])
    with patch(pipe, attn_context=ALL):
        once(pipe, FLUX[1])
    assert error(on_block[1], on_block[0]) < CLOSE
    for block in blocks:
        block.attn.register_forward_hook(lambda module, given, result: inside.append(result[0].shape[1]))
        block.attn.to_q.register_forward_pre_hook(lambda module, given: inside.append(given[0].shape[1]))
    with patch(pipe, attn_context=ALL) as active, pytest.warns(RuntimeWarning) as warned:
        once(pipe, FLUX[1])
    assert len(warned) == 1
    assert r"forward hooks inside it (attn, attn.to_q) see the text and one tile" in str(warned[0].message)
    assert sum(inside) == 2 * (2 + 1) * TOKENS  # of two blocks, both walks of what is ahead of attention and one behind
    assert repr(active)


def test_hooks_on_all_modules_there_are_are_warned_of():
    pipe, seen = hooked(FLUX), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(type(module).__name__))
    try:
        with patch(pipe, attn_context=ALL), pytest.warns(RuntimeWarning, match="those on all modules there are"):
            once(pipe, FLUX[1])
    finally:
        handle.remove()
    assert "FluxAttention" in seen


def test_a_hook_that_changes_what_each_token_gets_does_so_in_tiles():
    pipe = hooked(FLUX)
    dense = once(pipe, FLUX[1])
    for block in pipe.transformer.transformer_blocks:
        block.attn.to_v.register_forward_hook(lambda module, given, result: result + 0.1)
    changed = once(pipe, FLUX[1])
    assert error(changed, dense) > CLOSE
    with patch(pipe, attn_context=ALL), pytest.warns(RuntimeWarning, match=r"inside it \(attn.to_v\)"):
        assert error(once(pipe, FLUX[1]), changed) < CLOSE


def test_another_backend_of_attention_is_the_users_again_afterwards():
    pipe = hooked(FLUX)
    pipe.transformer.set_attention_backend("_native_math")
    asked = {processor._attention_backend for processor in pipe.transformer.attn_processors.values()}
    assert_blocked_and_dense(pipe, FLUX[1])
    assert {processor._attention_backend for processor in pipe.transformer.attn_processors.values()} == asked
    pipe.transformer.set_attention_backend("native")  # which holds for other models, too


# --- sizes, and input that does not fit ---


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_multiples_of_a_token_or_become_what_upstream_makes_of_them(kind):
    pipe, arguments = hooked(KINDS[kind]), KINDS[kind][1]
    with pytest.raises(ValueError, match="width must be a multiple of 8 sample pixels; got 209"):
        LargeResPatch(pipe, 209, 176)
    if kind != "Flux":
        with pytest.raises(ValueError, match="width must be a multiple of 16 sample pixels; got 216, nearest: 208 and"):
            LargeResPatch(pipe, 216, 176)
        with pytest.raises(ValueError, match="height must be a multiple of 16 sample pixels; got 184, nearest: 176"):
            LargeResPatch(pipe, 208, 184)
        with patch(pipe, attn_context=ALL), pytest.raises(ValueError, match="divisible by 16"):
            paint(pipe, arguments, width=216)
    else:
        LargeResPatch(pipe, 216, 184)
        dense = paint(pipe, arguments, width=216, height=184)
        assert dense.shape[1] == (216 // 16) * (184 // 16)
        with patch(pipe, attn_context=ALL):
            assert error(paint(pipe, arguments, width=216, height=184), dense) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_more_context_than_there_are_tokens_is_all_of_them(kind):
    pipe, arguments = hooked(KINDS[kind]), KINDS[kind][1]
    pictures = []
    for context in (2 * TOKENS, 10**9):
        with patch(pipe, attn_context=context):
            pictures.append(paint(pipe, arguments))
    assert torch.equal(*pictures)


def test_a_map_that_does_not_fit_the_tokens_is_passed_on():
    """As a pipeline of one's own may call a model: with references of which nothing says that they are there."""
    pipe = hooked(FLUX)
    told = {"hidden_states": noise(1, TOKENS + 5, 16), "encoder_hidden_states": noise(1, 5, 32)}
    told |= {"pooled_projections": noise(1, 32), "timestep": torch.tensor([0.5]), "txt_ids": torch.zeros(5, 3)}
    ids = d.FluxPipeline._prepare_latent_image_ids(1, 9, 11, CPU, torch.float32)
    told |= {"img_ids": torch.cat([ids, torch.tensor([0.0, 9, 3]).expand(5, 3)]), "return_dict": False}
    dense = pipe.transformer(**told)[0]
    with patch(pipe, attn_context=0):
        assert torch.equal(pipe.transformer(**told)[0], dense)
