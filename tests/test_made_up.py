"""The test of the house: a denoiser and an autoencoder that nobody knows are one family each, and nothing else.

Everything that is asked here is asked of `LargeResPatch`, which has no line for either.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from largerespatch import LargeResPatch
from largerespatch.core.families import Family, Order, Site, register, unregister
from largerespatch.core.pieces import assemble
from test_patch import fingerprint

FACTOR, CHANNELS = 4, 8


class Mixer(nn.Module):
    """A denoiser: token by token, but for a mean of all."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(CHANNELS, 16 * CHANNELS), nn.Linear(16 * CHANNELS, CHANNELS)
        self.steps = []

    def forward(self, sample, timestep):
        tokens = sample.flatten(2).transpose(1, 2)
        return self.rest(tokens + tokens.mean(dim=1, keepdim=True)).transpose(1, 2).reshape(sample.shape)

    def rest(self, tokens):
        return self.outer(self.inner(tokens).relu())


class Painter(nn.Module):
    """An autoencoder that decodes each latent pixel to a square of sample pixels."""

    def __init__(self):
        super().__init__()
        self.painting = nn.Linear(CHANNELS, 3 * FACTOR**2)

    def encode(self, image):
        return image.unfold(2, FACTOR, FACTOR).unfold(3, FACTOR, FACTOR).mean(dim=(1, 4, 5))[:, None].repeat(1, 8, 1, 1)

    def forward(self, latent):
        squares = self.painting(latent.permute(0, 2, 3, 1)).unflatten(-1, (3, FACTOR, FACTOR))
        return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class Studio:
    """A pipeline, as far as anybody asks."""

    def __init__(self):
        torch.manual_seed(0)
        self.mixer, self.painter = Mixer().requires_grad_(False), Painter().requires_grad_(False)
        self.shown, self._progress_bar_config = [], {"disable": False}

    @property
    def components(self):
        return {"mixer": self.mixer, "painter": self.painter, "name": "studio"}

    def progress_bar(self, total):
        if not self._progress_bar_config["disable"]:
            self.shown.append(total)
        return nullcontext()

    def __call__(self, latent, steps=2, guidance_scale=1.0):
        for step in range(steps):
            latent = self.mixer(latent, timestep=step)
        return self.painter(latent)


class InRuns:
    """Runs of tokens: exact."""

    note = staticmethod(lambda length: None)

    def __init__(self, length):
        self.length = length

    def __call__(self, original, tokens):
        def compute(run):
            self.note(tokens[:, run].shape[1])
            return original(tokens[:, run])

        count = tokens.shape[1]
        return assemble(
            [slice(start, start + self.length) for start in range(0, count, self.length)],
            compute,
            place=lambda run: (slice(None), run),
            make=lambda result: result.new_empty(len(result), count, result.shape[2]),
        )


class InBands:
    """Bands of rows, under the pipeline's progress bar."""

    def __init__(self, length, progress_bar):
        self.length, self.progress_bar = length, progress_bar

    def __call__(self, original, latent):
        count = latent.shape[2]
        bands = [(start, min(start + self.length, count)) for start in range(0, count, self.length)]
        with self.progress_bar(total=len(bands)):
            return assemble(
                bands,
                lambda band: original(latent[:, :, slice(*band)]),
                place=lambda band: (slice(None), slice(None), slice(band[0] * FACTOR, band[1] * FACTOR)),
                make=lambda result: result.new_empty(*result.shape[:2], count * FACTOR, result.shape[3]),
            )


class Mixers(Family):
    stages = ("step",)

    def matches(self, model):
        return isinstance(model, Mixer)

    def sites(self, model, name, options, pipe) -> Iterator[Site]:
        says = f"mixed in runs of {options.ff_chunk_size} tokens"
        yield Site(model, name, Order.IN_CHUNKS, InRuns(options.ff_chunk_size), attribute="rest", says=says)
        if options.unet_serial:
            yield Site(model, name, Order.BATCH_IN_TURNS, one_by_one, says="one sample at a time")

    def call(self, stage, model, pipe, height, width):
        like = model.inner.weight
        model(torch.empty(2, CHANNELS, height // FACTOR, width // FACTOR, device=like.device), timestep=0)


class Painters(Family):
    stages = ("encode", "decode")

    def matches(self, model):
        return isinstance(model, Painter)

    def sites(self, model, name, options, pipe) -> Iterator[Site]:
        bands = InBands(options.vae_chunk_size_y, pipe.progress_bar)
        yield Site(model, name, Order.IN_STRIPS, bands, says=f"painted in bands of {options.vae_chunk_size_y} rows")

    def call(self, stage, model, pipe, height, width):
        device = model.painting.weight.device
        if stage == "encode":
            model.encode(torch.empty(1, 3, height, width, device=device))
        else:
            model(torch.empty(1, CHANNELS, height // FACTOR, width // FACTOR, device=device))

    def factor(self, model):
        return FACTOR


def one_by_one(original, sample, timestep):
    return assemble(
        range(len(sample)),
        lambda i: original(sample[i : i + 1], timestep),
        place=lambda i: slice(i, i + 1),
        make=lambda result: result.new_empty(len(sample), *result.shape[1:]),
    )


@pytest.fixture
def studio():
    register(Mixers)
    register(Painters)
    yield Studio()
    unregister(Mixers)
    unregister(Painters)


def latent(batch=1, height=12, width=10):
    return torch.randn(batch, CHANNELS, height, width, generator=torch.Generator().manual_seed(1))


def test_without_its_families_the_pipeline_is_refused():
    with pytest.raises(ValueError, match=r"pipe must hold something to patch.*mixer \(Mixer\), painter \(Painter\)"):
        LargeResPatch(Studio(), 40, 48)


def test_both_are_found_cut_and_restored(studio):
    before, whole = fingerprint(studio), studio(latent())
    with LargeResPatch(studio, 40, 48, ff_chunk_size=7, vae_chunk_size_y=5):
        assert fingerprint(studio) != before
        torch.testing.assert_close(studio(latent()), whole)
        assert studio.shown == [3]  # 12 rows in bands of 5
    assert fingerprint(studio) == before
    assert torch.equal(studio(latent()), whole)


def test_repr_says_what_the_families_say(studio):
    patch = LargeResPatch(studio, 40, 48, ff_chunk_size=7, vae_chunk_size_y=5, unet_serial=True)
    assert repr(patch).splitlines() == [
        "LargeResPatch on Studio, 40x48 sample pixels, not active",
        "  mixer (Mixer): mixed in runs of 7 tokens, one sample at a time",
        "  painter (Painter): painted in bands of 5 rows",
    ]


def test_sizes_follow_the_factor_of_the_family(studio):
    with pytest.raises(ValueError, match="width must be a multiple of 4 sample pixels; got 42, nearest: 40 and 44"):
        LargeResPatch(studio, 42, 48)


def test_the_estimate_plays_the_calls_of_the_families(studio):
    """Hidden layers, 16 times as wide as their input, take the most: of all tokens unpatched, else of a run."""
    tokens, hidden = 2 * 120, 16 * CHANNELS * 4  # bytes
    unpatched = LargeResPatch(studio, 40, 48).estimate(patched=False)
    assert 2 * tokens * hidden <= unpatched.step <= 2.3 * tokens * hidden
    chunked = LargeResPatch(studio, 40, 48, ff_chunk_size=10).estimate()
    assert chunked.step < unpatched.step / 4
    assert (
        chunked.weights
        == unpatched.weights
        == sum(p.nbytes for m in (studio.mixer, studio.painter) for p in m.parameters())
    )
    assert studio.shown == []  # nothing is shown, nothing is left


def test_memory_limit_picks_what_the_family_can_do(studio, monkeypatch):
    monkeypatch.setattr("largerespatch.memory.planner.margin", lambda limit: 0)  # larger than this model
    needs = {serial: LargeResPatch(studio, 40, 48, unet_serial=serial).estimate().peak for serial in (False, True)}
    assert needs[True] < needs[False]
    limit = (needs[True] + needs[False]) // 2
    patch = LargeResPatch(studio, 40, 48, memory_limit=limit)
    assert patch.options.unet_serial
    assert "unet_serial=True" in repr(patch)
    with pytest.raises(ValueError, match="does not fit"):
        LargeResPatch(studio, 40, 48, memory_limit=needs[True] - 1, unet_serial=True)


def test_the_techniques_of_the_families_really_run(studio, monkeypatch):
    lengths = []
    monkeypatch.setattr(InRuns, "note", staticmethod(lengths.append))
    with LargeResPatch(studio, 40, 48, ff_chunk_size=50, unet_serial=True):
        studio(latent(batch=2), steps=1)
    assert lengths == [50, 50, 20] * 2


def test_it_cannot_be_patched_twice(studio):
    before = fingerprint(studio)
    with LargeResPatch(studio, 40, 48), pytest.raises(ValueError, match=r"pipe\.mixer is patched already"):
        LargeResPatch(studio, 40, 48).enable()
    assert fingerprint(studio) == before
