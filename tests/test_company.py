"""Beside what else users do to a pipeline: offloading, casting, compiling, other settings, threads."""

import sys
import threading
from types import SimpleNamespace

import accelerate
import pytest
import torch
from diffusers import Transformer2DModel
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import Attention

import tiny
from conftest import quiet
from largerespatch import LargeResPatch
from largerespatch.core.statistics import GivenStatistics, GroupStatistics
from test_patch import SMALL, fingerprint, image

CPU = torch.device("cpu")
MODES = [{}, {"vae_mode": "exact", "padding_mode": "circular"}]


def cpu_offload(pipe):
    """Weights are on the meta device but while a layer runs."""
    for model in (pipe.unet, pipe.vae):
        accelerate.cpu_offload(model, execution_device=CPU)


def cpu_offload_with_hook(pipe):
    hook = None
    for model in (pipe.text_encoder, pipe.unet, pipe.vae):
        _, hook = accelerate.cpu_offload_with_hook(model, CPU, prev_module_hook=hook)


def model_cpu_offload(pipe):
    """The pipeline takes all hooks off and puts them on again at the end of every call."""
    pipe.enable_model_cpu_offload(device="cpu")


def group_offload(pipe):
    for model in (pipe.unet, pipe.vae):
        apply_group_offloading(
            model, onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
        )


def leaf_group_offload(pipe):
    for model in (pipe.unet, pipe.vae):
        apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def layerwise_casting(pipe):
    for model in (pipe.unet, pipe.vae):
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


HOOKS = [
    cpu_offload,
    cpu_offload_with_hook,
    model_cpu_offload,
    group_offload,
    leaf_group_offload,
    layerwise_casting,
]


def test_model_offload_is_what_these_tests_take_it_for(pipe):
    model_cpu_offload(pipe)
    before = pipe.unet.forward
    image(pipe, steps=1)
    assert pipe.unet.forward is not before


def forwards(pipe):
    """Every forward in place, and every one that a hook keeps."""
    return [
        value
        for model in (pipe.unet, pipe.vae)
        for module in model.modules()
        for owner in (module, *getattr(vars(module).get("_diffusers_hook"), "_fn_refs", ()))
        for value in vars(owner).values()
        if callable(value) and not isinstance(value, torch.nn.Module)
    ]


@pytest.mark.parametrize(("hook", "options"), [(hook, MODES[i % 2]) for i, hook in enumerate(HOOKS)])
def test_hooks_may_be_installed_before_or_inside_the_block(hook, options):
    hooked = quiet(tiny.text_to_image())
    hook(hooked)
    pipe = quiet(tiny.text_to_image())
    patch = LargeResPatch(pipe, 96, 64, **SMALL, **options)
    with patch:
        hook(pipe)
        inside = image(pipe, 96, steps=1)
        assert torch.equal(image(pipe, 96, steps=1), inside)
    ours = [value for value in forwards(pipe) if "PatchStack" in getattr(value, "__qualname__", "")]
    assert not ours
    unpatched = image(hooked, 96, steps=1)
    assert torch.equal(image(pipe, 96, steps=1), unpatched)
    with patch:  # installed before
        assert torch.equal(image(pipe, 96, steps=1), inside)
        assert torch.equal(image(pipe, 96, steps=1), inside)
    assert torch.equal(image(pipe, 96, steps=1), unpatched)
    assert not torch.allclose(inside, unpatched, atol=1e-3)


def test_hooks_change_nothing_but_where_weights_are(pipe):
    """What the tests of hooks expect is the patched picture: here without any."""
    with LargeResPatch(pipe, 96, 64, **SMALL):
        expected = image(pipe, 96)
    for hook in (cpu_offload, model_cpu_offload, group_offload):
        hooked = quiet(tiny.text_to_image())
        hook(hooked)
        with LargeResPatch(hooked, 96, 64, **SMALL):
            assert torch.equal(image(hooked, 96), expected)


def test_model_offload_may_be_taken_off_inside(pipe):
    expected = image(pipe, 96)
    model_cpu_offload(pipe)
    with LargeResPatch(pipe, 96, 64, **SMALL):
        pipe.remove_all_hooks()
        assert not torch.allclose(image(pipe, 96), expected, atol=1e-3)
    assert "_old_forward" not in vars(pipe.unet)
    assert torch.equal(image(pipe, 96), expected)


@pytest.mark.parametrize("vae_mode", ["two-pass", "exact"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_gives_the_picture_of_single(pipe, dtype, tolerance, vae_mode):
    """With rounding: three significant digits at most, through two steps and a decoder."""
    latents = torch.randn(1, 4, 4, 12, generator=torch.Generator().manual_seed(0))
    options = {"width": 96, "height": 32, "steps": 1}
    patch = LargeResPatch(pipe, 96, 32, vae_mode=vae_mode, **SMALL)
    with patch:
        expected = image(pipe, latents=latents, **options)
    pipe.to(dtype)
    with patch:
        result = image(pipe, latents=latents.to(dtype), **options)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=tolerance)


def test_upstreams_tiling_and_slicing_stay_as_the_user_set_them(pipe):
    with LargeResPatch(pipe, 96, 64, **SMALL):
        expected = image(pipe, 96, num_images_per_prompt=2)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    before = fingerprint(pipe)
    with LargeResPatch(pipe, 96, 64, **SMALL):
        torch.testing.assert_close(image(pipe, 96, num_images_per_prompt=2), expected, rtol=0, atol=1e-5)
        assert pipe.vae.use_slicing is False  # the samples run in turns all the same, see test_patch
    assert fingerprint(pipe) == before
    assert pipe.vae.use_tiling is True and pipe.vae.use_slicing is True


def test_callbacks_at_the_end_of_steps_see_and_change_latents(pipe):
    def halve(pipe, step, timestep, tensors):
        seen.append((step, tensors["latents"].shape))
        return {"latents": tensors["latents"] / 2}

    seen = []
    with LargeResPatch(pipe, 96, 64, **SMALL):
        plain = image(pipe, 96)
        assert not torch.allclose(image(pipe, 96, callback_on_step_end=halve), plain, atol=1e-3)
    assert seen == [(0, (1, 4, 8, 12)), (1, (1, 4, 8, 12))]


def test_a_call_may_be_interrupted_by_a_callback(pipe):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        steps.append(step)
        return tensors

    steps = []
    before = fingerprint(pipe)
    with LargeResPatch(pipe, 96, 64, **SMALL):
        assert image(pipe, 96, steps=3, callback_on_step_end=stop).isfinite().all()
    assert steps == [0]
    assert fingerprint(pipe) == before


def test_xformers_being_absent_is_upstreams_error_and_leaves_the_block_whole(pipe):
    with LargeResPatch(pipe, 96, 64, **SMALL):
        expected = image(pipe, 96)
        with pytest.raises((ModuleNotFoundError, ValueError)):
            pipe.enable_xformers_memory_efficient_attention()
        assert torch.equal(image(pipe, 96), expected)


def gradient(pipe):
    """Of a U-Net's output by its input."""
    with torch.enable_grad():
        sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        prompt = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
        return torch.autograd.grad(pipe.unet(sample, 500, prompt).sample.square().sum(), sample)[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_chunks_exactly_and_through_blocks(pipe, checkpointing):
    expected = gradient(pipe)
    if checkpointing:
        pipe.unet.train().enable_gradient_checkpointing()
    with LargeResPatch(pipe, 64, 64, ff_chunk_size=10):
        torch.testing.assert_close(gradient(pipe), expected, rtol=1e-3, atol=1e-5)
    with LargeResPatch(pipe, 64, 64, **SMALL, attn_context=0):
        blocked = gradient(pipe)
        if checkpointing:
            pipe.unet.disable_gradient_checkpointing()
            torch.testing.assert_close(gradient(pipe), blocked, rtol=1e-3, atol=1e-5)
    assert blocked.isfinite().all()
    assert not torch.allclose(blocked, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("context", [0, 1000])
def test_gradients_flow_through_blocks_of_a_map_that_is_normalized_as_a_whole(context):
    unet = quiet(tiny.kandinsky()).unet
    torch.manual_seed(0)
    pipe = SimpleNamespace(components={"unet": unet}, unet=unet, vae_scale_factor=8, scheduler=None)
    sample, told = torch.randn(1, 4, 12, 12, requires_grad=True), {"image_embeds": torch.randn(1, 16)}

    def gradient():
        with torch.enable_grad():
            result = unet(sample, 5, None, added_cond_kwargs=told).sample
            return torch.autograd.grad(result.square().sum(), sample)[0]

    expected = gradient()
    with LargeResPatch(pipe, 96, 96, **SMALL | {"attn_context": context}):
        found = (gradient() - expected).abs().max() / expected.abs().max()
    assert found < 1e-4 if context else 1e-3 < found < 1


@pytest.mark.parametrize("vae_mode", ["two-pass", "exact"])
def test_a_vae_in_pieces_refuses_gradients_and_a_whole_one_gives_them(pipe, vae_mode):
    def decode(rows):
        with torch.enable_grad():
            return torch.autograd.grad(pipe.vae.decode(rows).sample.sum(), rows)[0]

    latents = torch.randn(1, 4, 8, 8)
    expected = decode(latents[:, :, :6, :6].requires_grad_())
    with LargeResPatch(pipe, 64, 64, vae_mode=vae_mode, **SMALL):
        with pytest.raises(RuntimeError, match=r"VAE decoder of 8x8 latent pixels .*no gradients"):
            decode(latents.requires_grad_())
        with pytest.raises(RuntimeError, match=r"VAE encoder .*no gradients"), torch.enable_grad():
            pipe.vae.encode(torch.randn(1, 3, 64, 64, requires_grad=True))
        assert torch.equal(decode(latents[:, :, :6, :6].detach().requires_grad_()), expected)


class Denoiser(torch.nn.Module):
    """As much of a U-Net as is patched, and no more: tracing takes long."""

    def __init__(self):
        super().__init__()
        self.transformer = tiny.frozen(
            Transformer2DModel, 17, num_attention_heads=2, attention_head_dim=4, in_channels=8, norm_num_groups=4
        )

    def forward(self, sample, timestep):
        return self.transformer(sample, timestep=timestep, return_dict=False)[0]


class Pipeline:
    def __init__(self):
        self.unet, self.scheduler = Denoiser(), tiny.scheduler()
        self.scheduler.set_timesteps(2)

    @property
    def components(self):
        return {"unet": self.unet, "scheduler": self.scheduler}

    def __call__(self):
        sample = torch.randn(1, 8, 8, 4, generator=torch.Generator().manual_seed(0))
        return torch.cat([self.unet(sample, timestep) for timestep in self.scheduler.timesteps])


class AttendingMaps(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention(8, heads=2, dim_head=4, norm_num_groups=4)

    def forward(self, sample, timestep):
        return self.attention(sample)


def test_a_model_that_is_not_one_of_diffusers_is_patched_once_at_a_time():
    pipe = Pipeline()
    pipe.unet = AttendingMaps()
    with LargeResPatch(pipe, 4, 8), pytest.raises(ValueError, match="unet is patched already"):
        LargeResPatch(pipe, 4, 8).enable()
    assert "forward" not in vars(pipe.unet.attention)


def compiled_block(pipe):
    """What `compile_repeated_blocks` does."""
    pipe.unet.transformer.transformer_blocks[0].compile(backend="eager")


def compiled(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")


@pytest.mark.filterwarnings("ignore")  # of dynamo's
@pytest.mark.parametrize(("compile_", "context"), [(compiled_block, 6), (compiled, 0)])
def test_what_is_compiled_before_or_inside_is_blocked_inside_and_as_before_outside(compile_, context):
    """Graphs are traced with the replacements or without; what is checked here is that none is used stale."""
    pipe = Pipeline()
    sizes = {"attn_slice_x": 4, "attn_slice_y": 2, "attn_full_tokens": 16, "attn_context": context, "ff_chunk_size": 20}
    patch = LargeResPatch(pipe, 4, 8, **sizes)
    unpatched = pipe()
    with patch:
        patched = pipe()
        compile_(pipe)
        torch.testing.assert_close(pipe(), patched)
    assert not torch.allclose(patched, unpatched, atol=1e-3)
    torch.testing.assert_close(pipe(), unpatched)
    with patch:
        torch.testing.assert_close(pipe(), patched)
    torch.testing.assert_close(pipe(), unpatched)
    torch.compiler.reset()


def test_statistics_given_in_one_thread_are_not_seen_in_another():
    norm, x = torch.nn.GroupNorm(2, 4), torch.randn(1, 4, 3, 3)
    expected, seen = norm(x), []
    ones = GroupStatistics(9, torch.ones(1, 2), torch.ones(1, 2))
    with GivenStatistics(ones):
        thread = threading.Thread(target=lambda: seen.append(norm(x)))
        thread.start()
        thread.join()
        assert not torch.allclose(norm(x), expected)
    assert torch.equal(seen[0], expected)


def test_many_threads_enter_and_leave_patches_of_pipelines_of_their_own():
    """What is patched is noted in one table: it is looked through while others write to it."""

    def work():
        pipe = Pipeline()
        barrier.wait(timeout=60)
        for _ in range(60):
            with LargeResPatch(pipe, 4, 8):
                entered.append(1)

    entered, barrier, failures = [], threading.Barrier(8), []
    threads = [threading.Thread(target=_noting(work, failures)) for _ in range(8)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert failures == []
    assert len(entered) == 8 * 60


def _noting(work, failures):
    def noting():
        try:
            work()
        except BaseException as error:
            failures.append(error)

    return noting


@pytest.mark.filterwarnings("ignore:.*pre-hooks on 1 of its modules see pieces:RuntimeWarning")
def test_two_threads_with_a_pipeline_each_give_what_they_give_alone():
    """Step by step and tile by tile in turns, under different patches."""

    def work(i):
        with torch.no_grad(), patches[i]:
            results[i] = image(pipes[i], 96, seed=i)

    def meet(*_):
        if together:
            barrier.wait(timeout=60)
            meetings.append(threading.get_ident())

    pipes = [quiet(tiny.text_to_image()) for _ in range(2)]
    others = SMALL | {"attn_slice_x": 3, "attn_shape": "tile", "padding_mode": "circular"}
    patches = [LargeResPatch(pipes[0], 96, 64, **SMALL), LargeResPatch(pipes[1], 96, 64, **others)]
    results, together, barrier, meetings = {}, False, threading.Barrier(2), []
    for pipe in pipes:  # in the middle of blocked attention, and of a tile whose statistics are given
        for module in (pipe.unet.mid_block.attentions[0], pipe.vae.decoder.up_blocks[-1].resnets[-1].norm2):
            module.register_forward_pre_hook(meet)
    for i in range(2):
        work(i)
    alone, together = dict(results), True
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(meetings)) == 2
    assert len(meetings) == 2 * (2 + 2 * 5)  # two steps, two passes over four tiles and a sample of them
    assert all(torch.equal(results[i], alone[i]) for i in range(2))
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
