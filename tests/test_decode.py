"""An image that is written as it is decoded has the pipeline's pixels, and needs no memory for them in floats."""

import numpy as np
import pytest
import test_kl
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from products import in_pairs
from test_tiny import autoencoder as preview

import tiny
from calls import noise
from conftest import quiet
from halves import live
from largerespatch import LargeResPatch
from largerespatch.techniques.vae import images
from test_patch import fingerprint

TILES = {"vae_chunk_size_x": 8, "vae_chunk_size_y": 8}
WAYS = {
    "two-pass": TILES,
    "exact": TILES | {"vae_mode": "exact"},
    "exact, recomputed": TILES | {"vae_mode": "exact", "vae_recompute": True},
    "of one tile": {},
}
PIPELINES = {
    "SD": lambda: StableDiffusionPipeline(**tiny.components()),
    "XL": lambda: StableDiffusionXLPipeline(**tiny.xl_components()),
    "XL, statistics of latents": lambda: StableDiffusionXLPipeline(
        **tiny.xl_components(vae=tiny.vae(latents_mean=[0.1, -0.2, 0.3, 0], latents_std=[1.5, 2, 1, 0.5]))
    ),
}
SCALED = "SD, previewed"  # what its decoder makes is scaled before it is the picture
PIPELINES[SCALED] = lambda: StableDiffusionPipeline(**tiny.components(vae=preview()))


@pytest.fixture
def written(monkeypatch):
    """Sizes of the parts that were written."""
    sizes, write = [], images.ImageMap.write
    monkeypatch.setattr(
        images.ImageMap, "write", lambda self, tile, *rest: sizes.append(tile) or write(self, tile, *rest)
    )
    return sizes


@in_pairs({"way": WAYS, "case": PIPELINES, "height, width": [(17, 11), (10, 19)]})
def test_it_is_the_pipelines_image(case, way, height, width, written):
    pipe = quiet(PIPELINES[case]())
    arguments = {"prompt": "a house", "height": 8 * height, "width": 8 * width, "num_inference_steps": 1}
    patch = LargeResPatch(pipe, 8 * width, 8 * height, **WAYS[way])
    with patch:
        expected = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images[0]
        latents = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent").images
        assert written == []
        inside = patch.decode(latents)
    before = fingerprint(pipe)
    outside = patch.decode(latents)
    assert fingerprint(pipe) == before
    for actual in (inside, outside):
        assert isinstance(actual, Image.Image) and actual.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))
    assert (len(written) > 4) == (way != "of one tile" and case != SCALED)


def test_it_needs_no_memory_for_the_image_in_floats():
    pipe = quiet(StableDiffusionPipeline(**tiny.components(vae=tiny.vae(block_out_channels=(4, 4, 4, 4)))))
    patch = LargeResPatch(pipe, 8 * 16, 8 * 200, vae_chunk_size_x=16, vae_chunk_size_y=8)
    latents, image = noise(1, 4, 200, 16), 3 * 128 * 1600 * 4
    with patch:
        usual = live(lambda: pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, output_type="pt"))
        assert live(lambda: patch.decode(latents)) < image < 2 * image < usual


BAD = {
    "none": (None, TypeError, "NoneType"),
    "two images": (torch.zeros(2, 4, 8, 8), ValueError, r"\[2, 4, 8, 8\]"),
    "packed": (torch.zeros(1, 64, 16), ValueError, r"\[1, 64, 16\]"),
    "of other channels": (torch.zeros(1, 16, 8, 8), ValueError, r"\[1, 16, 8, 8\]"),
    "empty": (torch.zeros(1, 4, 0, 8), ValueError, r"\[1, 4, 0, 8\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_latents_is_named(pipe, case):
    latents, error, told = BAD[case]
    before = fingerprint(pipe)
    with pytest.raises(
        error, match=rf"latents must be a tensor \[1, 4, height, width\] of latent pixels.*; got {told}"
    ):
        LargeResPatch(pipe, 64, 64).decode(latents)
    assert fingerprint(pipe) == before


@pytest.mark.parametrize("build", [lambda: None, test_kl.flux_2], ids=["none", "of latents that are normalized"])
def test_without_such_an_autoencoder_it_says_so(pipe, build):
    pipe.vae = build()
    with pytest.raises(
        ValueError, match=r"must have an autoencoder that makes images .*; StableDiffusionPipeline has none"
    ):
        LargeResPatch(pipe, 64, 64).decode(torch.zeros(1, 4, 8, 8))


def test_there_is_no_image_where_there_is_no_memory_for_it(pipe, monkeypatch, written):
    """Before anything is decoded."""

    def new(*args):
        raise MemoryError

    monkeypatch.setattr(images.Image, "new", new)
    monkeypatch.setattr(pipe.vae, "decode", None)
    with pytest.raises(MemoryError):
        LargeResPatch(pipe, 64, 64).decode(torch.zeros(1, 4, 8, 8))
    assert images._WANTED.get() is None


def test_an_image_cannot_be_read_as_a_map():
    made = images.ImageMap((1, 3, 4, 5), torch.zeros(1), Image.new("RGB", (5, 4)))
    with pytest.raises(RuntimeError, match="cannot be read as a map"):
        made + 1
