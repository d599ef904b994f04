from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

import live
import tiny
from calls import noise
from conftest import quiet
from largerespatch import LargeResPatch
from largerespatch.core.families import family_of
from test_patch import SMALL, fingerprint

PIPELINES = {
    "SD": lambda: (StableDiffusionPipeline(**tiny.components()), {}),
    "XL, two prompts": lambda: (
        StableDiffusionXLPipeline(**tiny.xl_components()),
        {"prompt": ["a house", "the sea"]},
    ),
    "ControlNet": lambda: (
        StableDiffusionControlNetPipeline(**tiny.components(controlnet=tiny.controlnet())),
        {"image": noise(1, 3, 72, 56).sigmoid()},
    ),
}


@pytest.mark.parametrize("case", PIPELINES)
def test_a_pipeline_run_serially_gives_the_picture_of_whole_batches(case):
    pipe, arguments = PIPELINES[case]()
    quiet(pipe)
    sizes = {}
    for name in ("unet", "controlnet"):
        if model := getattr(pipe, name, None):
            model.conv_in.register_forward_pre_hook(lambda _, args, name=name: sizes[name].add(len(args[0])))
    latents = {}
    for serial in (False, True):
        sizes |= {"unet": set(), "controlnet": set()}
        before = fingerprint(pipe)
        # On the host the second option changes nothing.
        with LargeResPatch(pipe, 56, 72, **SMALL, unet_serial=serial, unet_offload=serial) as patch:
            assert ("one sample at a time, skip connections off the device" in repr(patch)) is serial
            given = {"prompt": "a house", "width": 56, "height": 72, "num_inference_steps": 3} | arguments
            latents[serial] = pipe(**given, generator=torch.Generator().manual_seed(0), output_type="latent").images
        assert all(size == {1} for size in sizes.values() if size) is serial
        assert not serial or fingerprint(pipe) == before  # text encoders change by themselves in the first run
    torch.testing.assert_close(latents[True], latents[False], rtol=1e-3, atol=1e-4)  # three steps, guidance


@pytest.mark.parametrize("value", [1, "yes", None])
def test_switches_are_true_or_false(pipe, value):
    with pytest.raises(TypeError, match=f"unet_serial must be one of True, False; got {value!r}"):
        LargeResPatch(pipe, 64, 64, unet_serial=value)


@pytest.mark.parametrize(("value", "error"), [("map", ValueError), ("", ValueError), (1, TypeError), (None, TypeError)])
def test_what_is_offloaded_is_one_of_the_words_for_it(pipe, value, error):
    before = fingerprint(pipe)
    accepted = f"unet_offload must be one of False, 'skips', 'maps', or True for 'skips'; got {value!r}"
    with pytest.raises(error, match=accepted):
        LargeResPatch(pipe, 64, 64, unet_offload=value)
    assert fingerprint(pipe) == before


def test_true_means_skip_connections(pipe):
    assert LargeResPatch(pipe, 64, 64, unet_offload=True).options.unet_offload == "skips"
    assert LargeResPatch(pipe, 64, 64, unet_offload=False).options.unet_offload is False
    assert "maps of at least 64 MiB on the host" in repr(LargeResPatch(pipe, 64, 64, unet_offload="maps"))


def peaks(build, batch=1, size=64, **options):
    """Most live bytes on accelerator and host during one call of a patched U-Net, weights and arguments aside."""
    with live.fake():
        with torch.device("meta"):
            model, sample, words = build(), torch.empty(batch, 4, size, size), torch.empty(batch, 7, 32)
        pipe = SimpleNamespace(components={"unet": model}, scheduler=None, vae_scale_factor=8)
        options = {"ff_chunk_size": 1024, "attn_full_tokens": 4096} | options
        with LargeResPatch(pipe, 8 * size, 8 * size, **options), live.LiveBytes() as counted:
            output = model(sample, 500, words).sample
            assert (type(output), output.device.type, output.shape) == (type(sample), "meta", sample.shape)
            del output
    assert counted.now["meta"] == 0  # nothing is kept when the call is over
    return counted.peak["meta"], counted.peak["cpu"]


MAP = 16 * 64 * 64 * 4  # bytes of one map of one sample at the finest level


def deeper():
    return tiny.unet(layers_per_block=2)


def test_one_sample_at_a_time_needs_the_memory_of_one():
    one, _ = peaks(tiny.unet)
    three, _ = peaks(tiny.unet, batch=3, unet_serial=True)
    outputs = 3 * 4 * 64 * 64 * 4
    assert one < three <= one + outputs


def test_skip_connections_are_on_the_host_while_they_wait():
    held, none = peaks(deeper)
    light, host = peaks(deeper, unet_offload=True)
    skips = (3 + 1 / 4 + 2 / 2) * MAP  # at the finest level, between the levels, at the level with twice the channels
    assert none < 100  # the timestep
    assert skips <= host <= skips + 2 * MAP  # and the input of the finest up block, which the U-Net holds meanwhile
    # At the peak, in the finest up block, two skip connections wait, one is being read, and that input has left.
    assert light <= held - (2 + 2) * MAP


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: copies run on a stream of their own there")
@pytest.mark.parametrize("serial", [False, True])
def test_on_cuda_skip_connections_leave_and_return(serial):
    model = tiny.unet(block_out_channels=(64, 128), layers_per_block=2).cuda()
    sample, words = noise(2, 4, 256, 192).cuda(), noise(2, 7, 32).cuda()
    pipe = SimpleNamespace(components={"unet": model}, scheduler=None, vae_scale_factor=8)
    options = {"attn_full_tokens": 2**20, "unet_serial": serial}
    results, used = {}, {}
    for offload in (False, True):
        with LargeResPatch(pipe, 192 * 8, 256 * 8, unet_offload=offload, **options):
            for _ in range(3):  # memory of earlier steps is used again, before and after its copies are done
                torch.cuda.reset_peak_memory_stats()
                results[offload] = model(sample, 500, words).sample
                used[offload] = torch.cuda.max_memory_allocated()
    torch.testing.assert_close(results[True], results[False], rtol=1e-3, atol=1e-4)  # TF32 convolutions
    assert used[True] < 0.85 * used[False]


def test_several_controlnets_halve_as_often_as_the_deepest_of_them():
    nets = [tiny.controlnet() for _ in range(2)]
    several = MultiControlNetModel(nets)
    assert family_of(several).halvings(several) == family_of(nets[0]).halvings(nets[0]) == 1
