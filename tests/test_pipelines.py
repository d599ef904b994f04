"""Whole pipelines on tiny random-weight models.

Each is compared with itself unpatched where nothing needs blocking (equal), and run at a size where attention, feed-
forward and VAE are all blocked (the patched path runs, the picture stays the picture, everything is restored).
"""

from contextlib import nullcontext

import diffusers as d
import pytest
import torch
from peft import LoraConfig
from tqdm import tqdm

import tiny
from conftest import quiet
from largerespatch import LargeResPatch
from largerespatch.attention import BlockedAttention
from largerespatch.feedforward import ChunkedFeedForward
from largerespatch.vae import Exact, TwoPass
from test_patch import SMALL, fingerprint

SIZE = 96  # sample pixels


def picture(batch=1, channels=3):
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(batch, channels, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear")


def mask():
    result = torch.zeros(1, 1, SIZE, SIZE)
    result[:, :, 20:70, 30:80] = 1
    return result


TEXT = {"prompt": "a house", "width": SIZE, "height": SIZE}
IMAGE = {"prompt": "a house", "image": picture(), "strength": 0.7}
CONTROL = {"image": picture()}
INPAINT = IMAGE | {"mask_image": mask(), "width": SIZE, "height": SIZE}


def with_lora(pipe):
    """A LoRA on self-, cross-attention and feed-forward that changes the picture, loaded as users load one."""
    torch.manual_seed(6)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    weights = {f"unet.{key}": value for key, value in pipe.unet.state_dict().items() if "lora_" in key}
    weights = {key.replace(".default.", "."): value for key, value in weights.items()}
    pipe.unet.delete_adapters("default")
    pipe.load_lora_weights(weights)
    return pipe


SD = {
    "text-to-image": (d.StableDiffusionPipeline, {}, TEXT),
    "text-to-image, guidance off": (d.StableDiffusionPipeline, {}, TEXT | {"guidance_scale": 1.0}),
    "text-to-image, two prompts": (d.StableDiffusionPipeline, {}, TEXT | {"prompt": ["a house", "the sea"]}),
    "text-to-image, two images": (d.StableDiffusionPipeline, {}, TEXT | {"num_images_per_prompt": 2}),
    "image-to-image": (d.StableDiffusionImg2ImgPipeline, {}, IMAGE),
    "inpaint": (d.StableDiffusionInpaintPipeline, {}, INPAINT),
    "inpaint, 9 channels": (d.StableDiffusionInpaintPipeline, {"unet": tiny.unet(in_channels=9)}, INPAINT),
    "ControlNet": (d.StableDiffusionControlNetPipeline, {"controlnet": tiny.controlnet()}, TEXT | CONTROL),
}
XL = {
    "XL": (d.StableDiffusionXLPipeline, {}, TEXT),
    "XL, guidance off": (d.StableDiffusionXLPipeline, {}, TEXT | {"guidance_scale": 1.0}),
    "XL, two prompts": (d.StableDiffusionXLPipeline, {}, TEXT | {"prompt": ["a house", "the sea"]}),
    "XL, two images": (d.StableDiffusionXLPipeline, {}, TEXT | {"num_images_per_prompt": 2}),
    "XL image-to-image": (d.StableDiffusionXLImg2ImgPipeline, {}, IMAGE),
    "XL ControlNet": (d.StableDiffusionXLControlNetPipeline, {"controlnet": tiny.controlnet(xl=True)}, TEXT | CONTROL),
}
LORA = {"text-to-image, LoRA": "text-to-image", "XL, LoRA": "XL"}
CASES = [*SD, *XL, *LORA]


def build(case):
    """The pipeline of a case and the arguments it is called with."""
    plain = LORA.get(case, case)
    kind, changes, arguments = (SD | XL)[plain]
    pipe = quiet(kind(**(tiny.components if plain in SD else tiny.xl_components)(**changes)))
    return (with_lora(pipe) if case in LORA else pipe), arguments


def run(pipe, arguments, **changes):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "generator": generator, "output_type": "pt"} | arguments | changes
    return pipe(**options).images


@pytest.fixture
def calls(monkeypatch):
    """How often each kind of replacement really cut something up."""
    counts = dict.fromkeys(("attention", "feed-forward", "vae"), 0)

    def counting(kind, target, method, cuts=lambda *args: True):
        real = getattr(target, method)

        def wrapper(self, original, x, *args, **kwargs):
            counts[kind] += cuts(self, x)
            return real(self, original, x, *args, **kwargs)

        monkeypatch.setattr(target, method, wrapper)

    counting("attention", BlockedAttention, "_blocked")
    counting("feed-forward", ChunkedFeedForward, "__call__", lambda self, x: x.shape[:-1].numel() > self.chunk_size)
    counting("vae", TwoPass, "_run_tiled")
    return counts


@pytest.mark.parametrize("case", CASES)
def test_pipeline(case, calls):
    pipe, arguments = build(case)
    expected, before = run(pipe, arguments), fingerprint(pipe)

    with LargeResPatch(pipe, SIZE, SIZE):
        assert torch.equal(run(pipe, arguments), expected)
    assert not any(calls.values())

    with LargeResPatch(pipe, SIZE, SIZE, **SMALL):
        patched = run(pipe, arguments)
    assert all(calls.values())
    assert fingerprint(pipe) == before
    assert patched.shape == expected.shape
    assert patched.isfinite().all()
    assert not torch.equal(patched, expected)
    assert torch.equal(run(pipe, arguments), expected)


@pytest.mark.parametrize("case", ["image-to-image", "inpaint", "XL", "XL image-to-image"])
def test_with_an_exact_vae_and_whole_attention_the_result_is_the_unpatched_one(case, monkeypatch):
    pipe, arguments = build(case)
    expected, runs = run(pipe, arguments), []
    monkeypatch.setattr(Exact, "_progress", lambda self, total: runs.append(total) or nullcontext(tqdm(disable=True)))
    with LargeResPatch(pipe, SIZE, SIZE, vae_mode="exact", vae_chunk_size_x=5, vae_chunk_size_y=5, ff_chunk_size=23):
        torch.testing.assert_close(run(pipe, arguments), expected, rtol=0, atol=2e-3)
    assert runs


@pytest.mark.parametrize("case", CASES)
def test_where_blocks_are_as_large_as_the_map_the_result_is_the_unpatched_one(case, calls):
    """Feed-forward in chunks is exact, so with whole attention and one VAE tile nothing differs but rounding."""
    pipe, arguments = build(case)
    expected = run(pipe, arguments)
    with LargeResPatch(pipe, SIZE, SIZE, ff_chunk_size=23):
        torch.testing.assert_close(run(pipe, arguments), expected, rtol=0, atol=2e-3)
    assert calls["feed-forward"] and not calls["attention"] and not calls["vae"]


def test_the_xl_vae_runs_upcast_and_comes_back_in_half_precision(calls):
    pipe, _ = build("XL")
    latents = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    seen = []
    pipe.vae.to(torch.float16)
    pipe.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with LargeResPatch(pipe, SIZE, SIZE, **SMALL):
        image = run(pipe, TEXT, latents=latents)
    assert calls["vae"]
    assert seen == [torch.float32]
    assert image.isfinite().all()
    assert pipe.vae.dtype == torch.float16


def test_tiles_run_under_the_pipelines_progress_bar(capsys):
    pipe, _ = build("image-to-image")
    pipe.set_progress_bar_config(disable=False)
    with LargeResPatch(pipe, SIZE, SIZE, **SMALL):
        run(pipe, IMAGE)
        shown = capsys.readouterr().err
        assert "VAE encoder: 100%" in shown
        assert "VAE decoder: 100%" in shown
        quiet(pipe)
        run(pipe, IMAGE)
    assert capsys.readouterr() == ("", "")
