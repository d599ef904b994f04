"""Contracts 1, 4, 6 and 7 on whole pipelines."""

import gc
import random
import re
import weakref
from itertools import pairwise
from types import SimpleNamespace

import diffusers as d
import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler

import tiny
from conftest import quiet
from largerespatch import LargeResPatch
from largerespatch import patch as patch_room
from largerespatch.core.patching import PatchStack
from largerespatch.techniques.vae import halves, two_pass

SMALL = {"attn_slice_x": 4, "attn_slice_y": 4, "attn_full_tokens": 16, "ff_chunk_size": 30}
SMALL |= {"vae_chunk_size_x": 6, "vae_chunk_size_y": 6}


def fingerprint(pipe):
    """Everything that could change on any module: attributes with identity and order, class, hooks."""
    return {
        (name, path): (
            type(module),
            [(key, id(value)) for key, value in vars(module).items()],
            [(key, list(value)) for key, value in vars(module).items() if key.endswith("_hooks")],
            [(key, id(value)) for key, value in module._modules.items()],
            [(key, id(value)) for key, value in module._parameters.items()],
        )
        for name, model in pipe.components.items()
        if isinstance(model, torch.nn.Module)
        for path, module in model.named_modules()
    }


def image(pipe, width=64, height=64, seed=0, steps=2, **options):
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": steps, "generator": generator, "output_type": "pt"} | options
    return pipe("a house", width=width, height=height, **options).images


@pytest.fixture(params=["constant", "circular"])
def patch(request, pipe):
    return LargeResPatch(pipe, 96, 64, padding_mode=request.param, **SMALL)


def test_the_patched_path_runs_and_exit_restores_every_attribute(pipe, patch):
    before, unpatched = fingerprint(pipe), image(pipe, 96)
    for _ in range(2):  # a patch can be entered again
        with patch as entered:
            assert entered is patch
            assert fingerprint(pipe) != before
            assert not torch.allclose(image(pipe, 96), unpatched, atol=1e-4)
        assert fingerprint(pipe) == before
    assert torch.equal(image(pipe, 96), unpatched)


def test_enable_and_disable_are_the_same_two_steps(pipe, patch):
    before = fingerprint(pipe)
    with patch:
        inside, patched = set(fingerprint(pipe)), image(pipe, 96)
    assert patch.enable() is patch
    assert set(fingerprint(pipe)) == inside
    assert torch.equal(image(pipe, 96), patched)
    patch.disable()
    patch.disable()
    assert fingerprint(pipe) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, GeneratorExit])
def test_an_exception_in_the_body_arrives_unchanged_and_restores(pipe, patch, error):
    before, raised = fingerprint(pipe), error("mine")
    with pytest.raises(error) as caught, patch:
        raise raised
    assert caught.value is raised
    assert caught.value.__context__ is None
    assert fingerprint(pipe) == before


@pytest.mark.parametrize("where", ["unet.conv_out", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k"])
def test_an_interrupt_in_the_middle_of_a_step_restores(pipe, patch, where):
    def interrupt(*_):
        raise KeyboardInterrupt

    handle = pipe.unet.get_submodule(where.removeprefix("unet.")).register_forward_pre_hook(interrupt)
    before = fingerprint(pipe)
    with pytest.raises(KeyboardInterrupt), patch:
        image(pipe, 96)
    assert fingerprint(pipe) == before
    handle.remove()


@pytest.mark.filterwarnings("ignore:.*pre-hooks on 1 of its modules see pieces:RuntimeWarning")
def test_an_interrupt_in_either_pass_of_the_vae_restores(pipe, patch):
    class Interrupted(BaseException):
        pass

    def interrupt(*_):
        calls.append(1)
        if len(calls) == at:
            raise Interrupted

    before = fingerprint(pipe)
    with patch:
        image(pipe, 96)
    tiles = 2 * 2 * 2  # 12 x 8 latent pixels in tiles of 6, two passes
    for at in range(1, tiles + 1):
        calls = []
        handle = pipe.vae.decoder.up_blocks[-1].resnets[0].conv1.register_forward_pre_hook(interrupt)
        with pytest.raises(Interrupted), patch:
            image(pipe, 96, steps=1)
        handle.remove()
        assert len(calls) == at
        assert fingerprint(pipe) == before


def test_a_failure_at_any_install_unwinds_all(pipe, patch, monkeypatch):
    before, real = fingerprint(pipe), PatchStack._put
    with patch:
        installs = len(patch._stack._replaced)
    assert installs > 10

    class Failure(BaseException):
        pass

    def failing(self, *args):
        if self is patch._stack:
            count.append(1)
            if len(count) == k:
                raise Failure
        real(self, *args)

    monkeypatch.setattr(PatchStack, "_put", failing)
    for k in range(1, installs + 1):
        count = []
        with pytest.raises(Failure), patch:
            pytest.fail("entered")
        assert len(count) == k
        assert fingerprint(pipe) == before
    count, k = [], 0
    with patch:  # and nothing stands in the way of the next entry
        assert len(count) == installs


def test_one_patch_at_a_time(pipe, patch):
    other = LargeResPatch(pipe, 64, 64)
    with patch:
        inside = fingerprint(pipe)
        for second, who in ((patch, "this"), (other, "another")):
            with pytest.raises(ValueError, match=rf"pipe\.\w+ is patched already, by {who} LargeResPatch.*disable"):
                second.enable()
        other.disable()  # not entered: nothing to undo
        assert fingerprint(pipe) == inside
    with other:
        assert fingerprint(pipe) != inside


def test_a_pipeline_that_shares_models_counts_as_the_same(pipe, patch):
    from diffusers import StableDiffusionImg2ImgPipeline

    sharing = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with patch, pytest.raises(ValueError, match="patched already"):
        LargeResPatch(sharing, 64, 64).enable()
    with LargeResPatch(sharing, 64, 64):
        assert "forward" in vars(pipe.unet)


def test_a_controlnet_that_is_one_of_several_elsewhere_counts_as_the_same(pipe):
    from diffusers import StableDiffusionControlNetPipeline

    shared, other = tiny.controlnet(), tiny.controlnet()
    one, several = (
        quiet(StableDiffusionControlNetPipeline(**tiny.components(controlnet=controlnet)))
        for controlnet in (shared, [other, shared])
    )
    before = fingerprint(one)
    with LargeResPatch(several, 64, 64), pytest.raises(ValueError, match="controlnet is patched already"):
        LargeResPatch(one, 64, 64).enable()
    assert fingerprint(one) == before
    with LargeResPatch(one, 64, 64), pytest.raises(ValueError, match="controlnet is patched already"):
        LargeResPatch(several, 64, 64).enable()


def test_what_others_put_over_a_replacement_is_left_and_named(pipe, patch):
    before = fingerprint(pipe)
    with pytest.raises(RuntimeError, match=r"unet\.mid_block\.\S+\.attn1\.forward"), patch:
        attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
        inner = attention.forward
        attention.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    after = fingerprint(pipe)
    assert [key for key in before if before[key] != after[key]] == [
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1")
    ]
    overlaid = image(pipe, 96)  # ours is still underneath, inert
    del attention.forward
    assert torch.equal(image(pipe, 96), overlaid)
    assert fingerprint(pipe) == before


def test_upstreams_tiling_is_off_inside_and_as_it_was_after(pipe, patch):
    pipe.vae.enable_tiling()
    before = fingerprint(pipe)
    with patch:
        assert pipe.vae.use_tiling is False
    assert pipe.vae.use_tiling is True
    assert fingerprint(pipe) == before


def rolled_and_not(pipe, **options):
    """A picture, and what comes of the same noise rolled over the edges, rolled back."""
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    with LargeResPatch(pipe, 96, 64, **options):
        picture = image(pipe, 96, 64, latents=noise)
        rolled = image(pipe, 96, 64, latents=noise.roll((4, -2), (2, 3)))
    return picture, rolled.roll((-32, 16), (2, 3))


@pytest.mark.parametrize("vae_mode", ["two-pass", "exact"])
def test_circular_padding_makes_pictures_that_tile(pipe, vae_mode):
    """U-Net and VAE alike: where a picture without edges is cut makes no difference."""
    torch.testing.assert_close(*rolled_and_not(pipe, padding_mode="circular", vae_mode=vae_mode), rtol=0, atol=1e-4)
    picture, rolled = rolled_and_not(pipe, padding_mode="constant", vae_mode=vae_mode)
    assert (picture - rolled).abs().max() > 0.01


SAVERS = [
    ({}, ""),
    ({"vae_recompute": True, "vae_offload": True}, ", largest maps recomputed, whole maps on the host"),
]


@pytest.mark.parametrize("padding_mode", ["constant", "circular"])
@pytest.mark.parametrize(("savers", "said"), SAVERS, ids=["plain", "saving"])
def test_an_exact_vae_gives_the_picture_of_the_whole_one(pipe, padding_mode, savers, said):
    options = {"padding_mode": padding_mode, "vae_mode": "exact"}
    with LargeResPatch(pipe, 96, 64, **options):
        whole = image(pipe, 96)
    with LargeResPatch(pipe, 96, 64, vae_chunk_size_y=5, vae_chunk_size_x=1, **options, **savers) as patch:
        strips = image(pipe, 96)
        assert re.search(f"encoder and decoder exactly, in strips of 5 rows{said}(, convolutions pad|\n)", repr(patch))
    assert not torch.equal(strips, whole)
    torch.testing.assert_close(strips, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding_mode", ["constant", "circular"])
def test_a_unet_in_strips_gives_the_picture_of_the_whole_one(pipe, padding_mode):
    with LargeResPatch(pipe, 96, 64, padding_mode=padding_mode):
        whole = image(pipe, 96)
    with LargeResPatch(pipe, 96, 64, padding_mode=padding_mode, unet_strip_rows=3) as patch:
        strips = image(pipe, 96)
        assert "convolutions in strips of 3 rows" in repr(patch)
    assert not torch.equal(strips, whole)
    torch.testing.assert_close(strips, whole, rtol=0, atol=1e-5)


def test_a_vae_that_cannot_run_exactly_is_an_error_at_once(pipe):
    pipe.vae.decoder.conv_act = torch.nn.Hardswish()
    before = fingerprint(pipe)
    with pytest.raises(ValueError, match=r"'exact' does not know how to run vae\.decoder\.conv_act \(Hardswish\)"):
        LargeResPatch(pipe, 64, 64, vae_mode="exact")
    assert fingerprint(pipe) == before
    with LargeResPatch(pipe, 64, 64):
        assert image(pipe).isfinite().all()


def test_small_images_come_out_as_without_the_patch(pipe):
    expected = image(pipe, 96, 64)
    with LargeResPatch(pipe, 2048, 2048):
        assert torch.equal(image(pipe, 96, 64), expected)


def test_the_same_seed_gives_the_same_image_whatever_came_before(pipe, patch):
    with patch:
        first = image(pipe, 96)
        image(pipe, 64, 96, seed=7, steps=3)
        assert torch.equal(image(pipe, 96), first)
    with patch:
        assert torch.equal(image(pipe, 96), first)


def phases_by_step(pipe, monkeypatch, **options):
    """Which phase each layer used in each call of its tilings."""
    from largerespatch.techniques.attention import blocked as attention

    used = []

    def recording(height, width, phase, slice_y, slice_x):
        used.append(phase)
        return real(height, width, phase, slice_y, slice_x)

    real = attention.COVERS["brick"]
    monkeypatch.setitem(attention.COVERS, "brick", recording)
    with LargeResPatch(pipe, 64, 64, **SMALL):
        image(pipe, **options)
    return used


def test_phases_follow_layer_and_step_alone(pipe, monkeypatch):
    used = phases_by_step(pipe, monkeypatch, steps=5)
    steps = [used[i : i + 3] for i in range(0, len(used), 3)]  # the mid block's map is small enough to stay whole
    assert len(steps) == 5
    assert len(set(steps[0])) > 1
    assert all([(phase + 1) % 4 for phase in a] == b for a, b in pairwise(steps))


def test_schedulers_that_visit_a_timestep_twice_still_visit_all_phases(pipe, monkeypatch):
    pipe.scheduler = HeunDiscreteScheduler()
    used = phases_by_step(pipe, monkeypatch, steps=5)
    assert {phase for phase in used[::3]} == {0, 1, 2, 3}


def test_both_halves_of_guidance_see_one_tiling_when_they_run_in_two_calls(pipe, monkeypatch):
    from largerespatch.techniques.attention import blocked as attention

    pipe.scheduler.set_timesteps(4)
    used = []
    real = attention.COVERS["brick"]
    monkeypatch.setitem(attention.COVERS, "brick", lambda *args: used.append(args[2]) or real(*args))
    sample, prompt = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 32)
    with LargeResPatch(pipe, 64, 64, **SMALL):
        for timestep in pipe.scheduler.timesteps:
            for each in (prompt, -prompt):
                pipe.unet(sample, timestep, encoder_hidden_states=each)
    calls = [used[i : i + 3] for i in range(0, len(used), 3)]
    assert len(calls) == 8
    assert calls[::2] == calls[1::2]
    assert len({tuple(call) for call in calls}) == 4


def test_the_patch_keeps_no_pipeline_alive():
    pipe = quiet(tiny.text_to_image())
    patch = LargeResPatch(pipe, 64, 64)
    with patch:
        pass
    gone, patch_gone = weakref.ref(pipe.unet), weakref.ref(patch)
    del patch
    assert patch_gone() is None, "without a search for garbage, since its user waits for the memory"
    del pipe
    gc.collect()
    assert gone() is None


REPR = """\
LargeResPatch on StableDiffusionPipeline, 96x64 sample pixels, not active
  vae (AutoencoderKL): encoder and decoder in two passes over tiles of at most 64x64 latent pixels
  unet (UNet2DConditionModel): 4 self-attentions in bricks of 128x64 and 64x128 tokens with 512 of context on \
maps of over 16384, 4 feed-forwards in chunks of 32768 tokens"""


def test_repr_says_what_is_replaced_and_with_which_settings(pipe):
    assert repr(LargeResPatch(pipe, 96, 64)) == REPR
    with LargeResPatch(pipe, 96, 64, attn_shape="tile", padding_mode="circular") as patch:
        assert "sample pixels, active\n" in repr(patch)
        assert "in tiles of 64x64 tokens" in repr(patch)
        assert "convolutions pad by 'circular'" in repr(patch)


def test_an_unknown_transformer_is_left_alone_and_named():
    from diffusers import CogVideoXTransformer3DModel

    pipe = Empty()
    transformer = tiny.frozen(
        CogVideoXTransformer3DModel, 16, num_attention_heads=2, attention_head_dim=8, num_layers=1
    )
    pipe.components |= {"unet": tiny.unet(), "transformer": transformer}
    before = [(type(module), dict(vars(module))) for module in transformer.modules()]
    with pytest.warns(RuntimeWarning, match="^CogVideoXTransformer3DModel is a denoiser of no known kind") as warned:
        patch = LargeResPatch(pipe, 64, 64, **SMALL)
    assert len(warned) == 1 and warned[0].filename == __file__
    with patch:
        assert before == [(type(module), dict(vars(module))) for module in transformer.modules()]
        assert "forward" in vars(pipe.components["unet"])
        assert repr(patch).endswith("\n  transformer (CogVideoXTransformer3DModel): left as it is")


FILMS = {
    "CogVideoX": lambda: d.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    ),
    "LTX": lambda: d.AutoencoderKLLTXVideo(
        block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8), latent_channels=8
    ),
    "Mochi": lambda: d.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, latent_channels=4
    ),
}


@pytest.mark.parametrize("kind", FILMS)
def test_an_autoencoder_of_films_is_left_alone_and_named(kind):
    pipe, vae = Empty(), FILMS[kind]()
    pipe.components |= {"unet": tiny.unet(), "vae": vae}
    name = type(vae).__name__
    before = [(type(module), dict(vars(module))) for module in vae.modules()]
    with pytest.warns(RuntimeWarning, match=f"^{name} is an autoencoder of no known kind") as warned:
        patch = LargeResPatch(pipe, 64, 64, **SMALL)
    assert len(warned) == 1 and warned[0].filename == __file__
    with patch:
        assert before == [(type(module), dict(vars(module))) for module in vae.modules()]
        assert "forward" in vars(pipe.components["unet"])
        assert repr(patch).endswith(f"\n  vae ({name}): left as it is")


def test_temporal_attention_is_left_alone():
    pipe = quiet(tiny.animate_diff())
    with LargeResPatch(pipe, 64, 64):
        patched = {name for name, attention in tiny.attentions(pipe.unet) if "forward" in vars(attention)}
    spatial = {name for name, _ in tiny.attentions(pipe.unet) if "motion_modules" not in name and "attn1" in name}
    assert patched == spatial != set()


def test_a_transformer_without_a_map_is_left_alone():
    """A prior's tokens are embeddings; patched with a U-Net beside it, it stays as it is."""
    from diffusers import PriorTransformer

    pipe = Empty()
    prior = tiny.frozen(
        PriorTransformer, 16, num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=8
    )
    pipe.components |= {"prior": prior, "unet": tiny.unet()}
    patch = LargeResPatch(pipe, 64, 64)
    assert "\n  prior (PriorTransformer): left as it is\n" in repr(patch)
    with patch:
        assert not any("forward" in vars(module) for module in prior.modules())


def test_padding_reaches_what_is_otherwise_left_alone():
    from diffusers import StableDiffusionAdapterPipeline

    pipe = quiet(StableDiffusionAdapterPipeline(**tiny.components(adapter=tiny.t2i_adapter())))
    before = fingerprint(pipe)
    assert "adapter (T2IAdapter): left as it is" in repr(LargeResPatch(pipe, 64, 64))
    with LargeResPatch(pipe, 64, 64, padding_mode="circular") as patch:
        assert pipe.adapter.adapter.conv_in.padding_mode == "circular"
        assert "adapter (T2IAdapter): convolutions pad by 'circular'" in repr(patch)
    assert fingerprint(pipe) == before


def test_the_2022_call_works_unchanged(pipe):
    with LargeResPatch(
        pipe=pipe,
        width=96,
        height=64,
        attn_slice_x=64,
        attn_slice_y=64,
        attn_shape="brick",
        ff_chunk_size=4096,
        padding_mode="constant",
        vae_chunk_size_x=64,
        vae_chunk_size_y=64,
    ):
        assert image(pipe, 96).shape == (1, 3, 64, 96)


WHOLE = [
    ("width", "sample pixels"),
    ("height", "sample pixels"),
    ("attn_slice_x", "tokens"),
    ("attn_slice_y", "tokens"),
    ("attn_full_tokens", "tokens"),
    ("ff_chunk_size", "tokens"),
    ("vae_chunk_size_x", "latent pixels"),
    ("vae_chunk_size_y", "latent pixels"),
    ("unet_strip_rows", "rows of the feature map"),
]


@pytest.fixture(scope="module")
def unchanged():
    """A pipeline for tests that see to it that they leave it as it is."""
    return quiet(tiny.text_to_image())


@pytest.mark.parametrize(("option", "unit"), WHOLE)
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-8, ValueError), (True, TypeError), (64.0, TypeError), ("64", TypeError)]
)
def test_sizes_must_be_whole_and_positive(unchanged, option, unit, value, error):
    before = fingerprint(unchanged)
    with pytest.raises(
        error, match=rf"{option} must be (None or )?a whole number of {unit}, at least 1; got {value!r}"
    ):
        LargeResPatch(unchanged, **({"width": 64, "height": 64} | {option: value}))
    assert fingerprint(unchanged) == before


def test_numpy_integers_are_whole_numbers(pipe):
    assert LargeResPatch(pipe, np.int64(64), np.int32(72)).height == 72


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("8", TypeError)])
def test_context_must_be_whole(pipe, value, error):
    with pytest.raises(
        error, match=f"attn_context must be None or a whole number of tokens, at least 0; got {value!r}"
    ):
        LargeResPatch(pipe, 64, 64, attn_context=value)


def test_without_a_word_of_it_there_is_as_much_context_as_suits_the_model(pipe):
    assert "with 512 of context" in repr(LargeResPatch(pipe, 64, 64))
    assert "with 7 of context" in repr(LargeResPatch(pipe, 64, 64, attn_context=7))


def test_context_brings_blocked_results_nearer_to_dense_ones(pipe):
    """In the whole pipeline: the option arrives, and 0 is blocks alone."""
    expected = image(pipe, 128, 128, output_type="latent")
    errors = []
    for context in (0, 96):
        with LargeResPatch(pipe, 128, 128, **SMALL, attn_context=context) as patch:
            assert ("96 of context" in repr(patch)) == bool(context)
            errors.append((image(pipe, 128, 128, output_type="latent") - expected).square().mean())
    assert 0 < errors[1] < errors[0] / 2


@pytest.mark.parametrize("mode", ["two-pass", "exact"])
def test_the_attention_of_a_vae_is_blocked_where_asked_for(pipe, mode):
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def decode(**options):
        with LargeResPatch(pipe, 128, 128, **SMALL, vae_mode=mode, **options) as patch:
            assert ("attention in blocks" in repr(patch)) == bool(options)
            return pipe.vae.decode(latents).sample

    full = decode()
    errors = [(decode(vae_attn="blocked", attn_context=size) - full).square().mean() for size in (0, 96, 512)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-10  # everything is in the context
    assert errors[0] > 1e-8


@pytest.mark.parametrize(("value", "nearest"), [(1001, "1000 and 1008"), (7, "8"), (1023, "1016 and 1024")])
@pytest.mark.parametrize("option", ["width", "height"])
def test_sizes_must_be_multiples_of_the_factor(pipe, option, value, nearest):
    message = f"{option} must be a multiple of 8 sample pixels; got {value}, nearest: {nearest}$"
    with pytest.raises(ValueError, match=message):
        LargeResPatch(pipe, **({"width": 64, "height": 64} | {option: value}))


@pytest.mark.parametrize(
    ("option", "accepted"),
    [
        ("vae_attn", "'full', 'blocked'"),
        ("attn_shape", "'brick', 'tile'"),
        ("padding_mode", "'constant', 'circular', 'reflect', 'replicate'"),
    ],
)
@pytest.mark.parametrize(("value", "error"), [("hexagon", ValueError), (None, TypeError)])
def test_words_must_be_known(pipe, option, accepted, value, error):
    with pytest.raises(error, match=f"{option} must be one of {accepted}; got {value!r}"):
        LargeResPatch(pipe, 64, 64, **{option: value})


@pytest.mark.parametrize(("value", "error"), [("hexagon", ValueError), (2, TypeError)])
def test_the_mode_of_the_vae_is_a_known_word_or_follows_from_the_rest(pipe, value, error):
    with pytest.raises(error, match=f"vae_mode must be None or one of 'two-pass', 'exact'; got {value!r}"):
        LargeResPatch(pipe, 64, 64, vae_mode=value)
    assert LargeResPatch(pipe, 64, 64, vae_mode=None).options.vae_mode == "two-pass"


@pytest.mark.parametrize(("value", "error"), [(1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_two_passes_are_the_least(pipe, value, error):
    with pytest.raises(error, match=f"vae_passes must be a whole number, at least 2; got {value!r}"):
        LargeResPatch(pipe, 64, 64, vae_passes=value)
    assert "decoder in 3 passes over tiles" in repr(LargeResPatch(pipe, 64, 64, vae_passes=3))


def test_what_only_an_exact_vae_can_do_says_so(pipe):
    before = fingerprint(pipe)
    with pytest.raises(ValueError, match="vae_recompute=True needs vae_mode 'exact'; got vae_mode 'two-pass'"):
        LargeResPatch(pipe, 64, 64, vae_recompute=True)
    for option in ("vae_recompute", "vae_offload"):
        with pytest.raises(TypeError, match=f"{option} must be one of True, False; got 1"):
            LargeResPatch(pipe, 64, 64, vae_mode="exact", **{option: 1})
    assert fingerprint(pipe) == before


@pytest.mark.parametrize("mode", ["exact", "two-pass"])
def test_the_description_says_where_the_maps_of_the_vae_are(pipe, mode):
    patch = LargeResPatch(pipe, 64, 64, vae_mode=mode, vae_offload=True, vae_attn="blocked")
    assert "whole maps on the host, its attention in blocks" in repr(patch)
    assert "on the host" not in repr(LargeResPatch(pipe, 64, 64, vae_mode=mode))


def test_later_options_are_keyword_only(pipe):
    with pytest.raises(TypeError, match="positional"):
        LargeResPatch(pipe, 64, 64, 64, 64, "brick", 4096, "constant", 64, 64, 16384)


def test_reflection_needs_two_cells_at_the_unets_coarsest_level(pipe):
    with pytest.raises(ValueError, match=r"padding_mode 'reflect' needs a height of at least 24 .*got 16"):
        LargeResPatch(pipe, 64, 16, padding_mode="reflect")
    with LargeResPatch(pipe, 24, 24, padding_mode="reflect"):
        assert image(pipe, 24, 24).isfinite().all()


class Empty:
    def __init__(self):
        self.components = {"scheduler": None, "text_encoder": torch.nn.Linear(1, 1)}


def test_a_pipe_must_hold_something_to_patch():
    with pytest.raises(ValueError, match=r"U-Net.*autoencoder of a known kind; got Empty with text_encoder \(Linear\)"):
        LargeResPatch(Empty(), 64, 64)
    with pytest.raises(TypeError, match="pipe must be a diffusers pipeline, with `components`; got Linear"):
        LargeResPatch(torch.nn.Linear(1, 1), 64, 64)


@pytest.mark.parametrize(("size", "where"), [(8, "encode"), (8, "decode"), (16, "unet")])
def test_reflection_of_an_image_too_small_inside_the_block_says_what_it_needs(pipe, size, where):
    """Inside the block images may have another size than the patch was made for."""
    calls = {
        "encode": lambda: pipe.vae.encode(torch.zeros(1, 3, size, 96)),
        "decode": lambda: pipe.vae.decode(torch.zeros(1, 4, size // 8, 12)),
        "unet": lambda: pipe.unet(torch.zeros(1, 4, size // 8, 12), 500, torch.zeros(1, 7, 32)),
    }
    before = fingerprint(pipe)
    with (
        LargeResPatch(pipe, 96, 96, padding_mode="reflect"),
        torch.no_grad(),
        pytest.raises(ValueError, match=rf"padding_mode 'reflect' needs an image of at least \d+ .*; got 96x{size}"),
    ):
        calls[where]()
    assert fingerprint(pipe) == before


@pytest.mark.parametrize("size", [2**24 + 8, 8 * 10**20])
@pytest.mark.parametrize("option", ["width", "height"])
def test_sizes_beyond_what_an_index_can_hold_are_refused(pipe, option, size):
    with pytest.raises(ValueError, match=rf"{option} must be at most 16777216 sample pixels.*; got {size}"):
        LargeResPatch(pipe, **({"width": 64, "height": 64} | {option: size}))


def test_passes_of_a_vae_that_has_none_are_refused(pipe):
    with pytest.raises(ValueError, match="vae_passes=3 needs vae_mode 'two-pass'; got vae_mode 'exact'"):
        LargeResPatch(pipe, 64, 64, vae_mode="exact", vae_passes=3)


def test_an_option_that_is_none_is_named_with_the_nearest_that_is(pipe):
    with pytest.raises(TypeError, match=r"vae_ofload is no option \(did you mean vae_offload\?\).*got vae_ofload=True"):
        LargeResPatch(pipe, 64, 64, vae_ofload=True)


@pytest.mark.parametrize("mode", ["two-pass", "exact"])
def test_a_vae_in_double_precision_stays_in_it(pipe, mode):
    pipe.vae.to(torch.float64)
    latents = torch.randn(1, 4, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        whole = pipe.vae.decode(latents).sample
        with LargeResPatch(pipe, 96, 96, **SMALL, vae_mode=mode, **({"vae_passes": 4} if mode == "two-pass" else {})):
            pieces = pipe.vae.decode(latents).sample
    assert pieces.dtype == torch.float64
    assert not torch.equal(pieces, whole)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12 if mode == "exact" else 0.1)


@pytest.mark.parametrize("mode", ["two-pass", "exact"])
def test_slicing_runs_the_samples_of_a_batch_in_turns(pipe, mode, monkeypatch):
    """Upstream's own would join what is on the device to what found no room there."""
    places = iter(["meta", "cpu"])
    real = halves.delivered
    monkeypatch.setattr(halves, "delivered", lambda *result: _Elsewhere.of(real(*result), next(places)))
    monkeypatch.setattr(two_pass, "delivered", halves.delivered)
    pipe.vae.enable_slicing()
    before, latents = fingerprint(pipe), torch.randn(2, 4, 12, 12)
    with torch.no_grad(), LargeResPatch(pipe, 96, 96, **SMALL, vae_mode=mode):
        assert pipe.vae.use_slicing is False
        both = pipe.vae.decode(latents).sample
    assert fingerprint(pipe) == before
    assert pipe.vae.use_slicing is True
    assert both.shape == (2, 3, 96, 96)
    assert both.device.type == "cpu"


def test_a_pipeline_may_have_schedulers_of_other_names():
    """As unCLIP's do."""
    unet, results = tiny.unet(), {}
    for names in (("scheduler",), ("decoder_scheduler", "super_res_scheduler")):
        schedulers = {name: HeunDiscreteScheduler() for name in names}
        pipe = SimpleNamespace(components={"unet": unet} | schedulers, vae_scale_factor=8, **schedulers)
        with torch.no_grad(), LargeResPatch(pipe, 96, 64, **SMALL):
            timestep = schedulers[names[0]].timesteps[500]
            results[names] = unet(torch.arange(384.0).sin().view(1, 4, 8, 12), timestep, torch.ones(1, 7, 32)).sample
    first, second = results.values()
    assert torch.equal(first, second)


class _Elsewhere(torch.Tensor):
    """A result that says that it is on another device."""

    @classmethod
    def of(cls, result, place):
        made = result.as_subclass(cls)
        made.place = place
        return made

    @property
    def device(self):
        return torch.device(getattr(self, "place", "cpu"))

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_shuffled_sites_of_a_pipeline_with_every_option_give_the_same(pipe, monkeypatch):
    options = SMALL | {"attn_context": 12, "padding_mode": "circular", "vae_attn": "blocked", "vae_offload": True}
    options |= {"unet_serial": True, "unet_strip_rows": 3, "unet_offload": True, "vae_mode": "exact"}
    patch, pictures = LargeResPatch(pipe, 96, 64, **options, vae_recompute=True), []
    real, seeds = patch_room.install, iter(range(4))

    def shuffled(stack, sites):
        random.Random(next(seeds)).shuffle(sites)
        real(stack, sites)

    with patch:
        pictures.append(image(pipe, 96))
    monkeypatch.setattr(patch_room, "install", shuffled)
    for _ in range(2):
        with patch:
            pictures.append(image(pipe, 96))
    assert next(seeds) == 2  # they were shuffled
    assert all(torch.equal(each, pictures[0]) for each in pictures)
