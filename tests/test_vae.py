"""Two-pass against its oracles: equal to the untiled result under full-plane statistics, close to it otherwise."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tiny
from largerespatch import memory
from largerespatch import vae as vae_room
from largerespatch.groupnorm import SharedGroupNorm, record
from largerespatch.padding import install_padding
from largerespatch.patching import PatchStack
from largerespatch.vae import Cutting, TwoPass, can_be_tiled, decoder_splits, encoder_splits, measure
from live import LiveBytes, fake

LEVELS = 4


class Bar(nullcontext):
    """A progress bar that counts."""

    def __init__(self, total):
        super().__init__(self)
        self.total, self.updates = total, 0
        Bar.last = self

    def update(self):
        self.updates += 1

    def set_description(self, title):
        self.title = title


def cutting(size, latent_scale=1, wrap=False, bar=Bar):
    return Cutting(*size, latent_scale, wrap, bar, "VAE half")


def install(stack, vae, size, wrap=False, splits=slice(None), passes=2, host=None):
    """Both halves of `vae` in `passes`, `size` = (height, width) of a tile in latent pixels."""
    encoder = TwoPass(encoder_splits(vae.encoder)[splits], cutting(size, 8, wrap), passes, host)
    decoder = TwoPass(decoder_splits(vae.decoder)[splits], cutting(size, 1, wrap), passes, host)
    stack.wrap(vae.encoder, "forward", encoder, "vae.encoder.forward")
    stack.wrap(vae.decoder, "forward", decoder, "vae.decoder.forward")


def picture(batch, height, width, seed=0):
    """Smooth light and dark regions, so that group statistics differ from tile to tile."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, 4, 5, generator=generator)
    fine = torch.randn(batch, 3, height, width, generator=generator)
    return (nn.functional.interpolate(coarse, (height, width), mode="bicubic") + fine / 4).clamp(-1, 1)


def latent(batch, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 4, 3, 4, generator=generator)
    fine = torch.randn(batch, 4, height, width, generator=generator)
    return nn.functional.interpolate(coarse, (height, width), mode="bicubic") * 2 + fine / 4


HALVES = {"encode": lambda vae, x: vae.encode(x).latent_dist.mode(), "decode": lambda vae, x: vae.decode(x).sample}
INPUTS = {"encode": lambda batch, height, width: picture(batch, 8 * height, 8 * width), "decode": latent}
BOTH = pytest.mark.parametrize("half", ["encode", "decode"])


def use_true_statistics(monkeypatch, model, run):
    """Have the last pass apply what the untiled `run` sees at each group norm, in place of what was recorded."""
    seen = {}
    hooks = [
        norm.register_forward_pre_hook(lambda norm, args: seen.update({norm.weight: record(args[0], norm.num_groups)}))
        for block in [*model.encoder.down_blocks, *model.decoder.up_blocks, model.decoder.conv_norm_out]
        for norm in block.modules()
        if isinstance(norm, nn.GroupNorm)
    ]
    run()
    for hook in hooks:
        hook.remove()
    created, applied = SharedGroupNorm.__init__, SharedGroupNorm.apply

    def init(self, norm):
        created(self, norm)
        self.true = seen[norm.weight]

    def apply(self):
        self.statistics = self.true
        applied(self)

    monkeypatch.setattr(SharedGroupNorm, "__init__", init)
    monkeypatch.setattr(SharedGroupNorm, "apply", apply)


@BOTH
@pytest.mark.parametrize("split", range(LEVELS - 1))
@pytest.mark.parametrize("mode", ["constant", "circular", "reflect", "replicate"])
@pytest.mark.parametrize(("shape", "size"), [((2, 9, 15), (5, 6)), ((1, 36, 5), (13, 5))], ids=["grid", "column"])
def test_with_full_plane_statistics_tiles_equal_the_untiled_result(monkeypatch, half, split, mode, shape, size):
    """So halo, crop, wrap and padding are right at every split, and only the statistics are approximate."""
    vae, x, run = tiny.vae(), INPUTS[half](*shape), HALVES[half]
    with PatchStack() as stack:
        install_padding(stack, vae, "vae", mode)
        expected = run(vae, x)
        use_true_statistics(monkeypatch, vae, lambda: run(vae, x))
        install(stack, vae, size, mode == "circular", slice(split, split + 1))
        # a dozen normalized layers of float32
        torch.testing.assert_close(run(vae, x), expected, rtol=0, atol=2e-4)
    assert Bar.last.updates == Bar.last.total > 2


@BOTH
def test_two_pass_is_closer_than_upstreams_tiling(half):
    vae, x, run = tiny.vae(), INPUTS[half](1, 48, 32), HALVES[half]
    expected = run(vae, x)
    with PatchStack() as stack:
        install(stack, vae, (16, 16))
        error = (run(vae, x) - expected).square().mean()
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 128, 16
    upstream = (run(vae, x) - expected).square().mean()
    assert 0 < error < upstream / 4


def psnr(result, expected):
    return float(-10 * torch.log10((result - expected).double().square().mean() / expected.var()))


@BOTH
@pytest.mark.parametrize("wrap", [False, True])
def test_every_pass_makes_one_more_norm_exact(half, wrap):
    """Of the last split's tiled part, which has them all but the mid block's. Until then more passes come closer."""
    vae, x, run = tiny.vae(layers_per_block=1), INPUTS[half](2, 24, 20), HALVES[half]
    norms = {"encode": 8, "decode": 17}[half]
    close = 100  # decibels: what float32 rounds in that many layers
    with PatchStack() as padding:
        if wrap:
            install_padding(padding, vae, "vae", "circular")
        expected = run(vae, x)
        fidelity = []
        for passes in (2, 3, 5, norms + 1):
            with PatchStack() as stack:
                install(stack, vae, (10, 10), wrap, slice(2, 3), passes)
                fidelity.append(psnr(run(vae, x), expected))
            assert Bar.last.total == Bar.last.updates == passes * (6 + 1)
    assert fidelity[-1] > close
    assert all(more > less or less > close for less, more in pairwise(fidelity)), fidelity


@BOTH
def test_an_input_that_fits_one_tile_runs_unpatched(half):
    vae, x, run = tiny.vae(), INPUTS[half](1, 16, 12), HALVES[half]
    expected = run(vae, x)
    Bar.last = None
    with PatchStack() as stack:
        install(stack, vae, (16, 12))
        assert torch.equal(run(vae, x), expected)
        assert Bar.last is None
    with PatchStack() as stack:
        install(stack, vae, (16, 11))
        assert not torch.equal(run(vae, x), expected)
    assert Bar.last.total == 6  # two tiles and a sample, twice


@BOTH
def test_a_batch_of_two_equals_two_batches_of_one(half):
    vae, run = tiny.vae(), HALVES[half]
    x = torch.cat([INPUTS[half](1, 24, 20), 3 + 5 * INPUTS[half](1, 24, 20)])
    with PatchStack() as stack:
        install(stack, vae, (10, 10))
        together = run(vae, x)
        apart = torch.cat([run(vae, each) for each in x.split(1)])
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-5)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_its_accuracy(half, dtype):
    vae, x, run = tiny.vae(), INPUTS[half](1, 20, 20), HALVES[half]
    with PatchStack() as stack:
        install(stack, vae, (10, 10))
        exact = run(vae, x)
    untiled = run(vae, x)
    for parameter in vae.parameters():
        parameter.data = parameter.to(dtype)
    untiled_error = (run(vae, x.to(dtype)).float() - untiled).square().mean()
    with PatchStack() as stack:
        install(stack, vae, (10, 10))
        result = run(vae, x.to(dtype))
    assert result.dtype == dtype
    assert (result.float() - exact).square().mean() < 2 * untiled_error


@settings(max_examples=20)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 11), st.integers(1, 11), st.booleans())
def test_any_size_and_any_tile(height, width, tile_height, tile_width, wrap):
    vae = tiny.vae()
    with PatchStack() as stack, pytest.MonkeyPatch.context() as monkeypatch:
        if wrap:
            install_padding(stack, vae, "vae", "circular")
        z, x = latent(1, height, width), picture(1, 8 * height, 8 * width)
        both = lambda: (vae.decode(z).sample, vae.encode(x).latent_dist.mode())  # noqa: E731
        expected = both()
        use_true_statistics(monkeypatch, vae, both)
        install(stack, vae, (tile_height, tile_width), wrap)
        torch.testing.assert_close(both(), expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("size", [(32, 32), (9, 10)], ids=["one tile", "many tiles"])
def test_circular_padding_commutes_with_rolling(size):
    """A picture whose left edge continues at its right one cannot tell where it was cut."""
    vae, z = tiny.vae(), latent(1, 20, 28)
    with PatchStack() as stack:
        install_padding(stack, vae, "vae", "circular")
        untiled = vae.decode(z).sample
        install(stack, vae, size, wrap=True)
        decoded, rolled = vae.decode(z).sample, vae.decode(z.roll((7, 11), (2, 3))).sample
    rolled = rolled.roll((-56, -88), (2, 3))
    if size == (32, 32):
        torch.testing.assert_close(rolled, decoded, rtol=0, atol=1e-5)
    else:
        error = (decoded - untiled).square().mean()
        assert (rolled - decoded).square().mean() < 4 * error + 1e-9  # two such errors
    assert (vae.decode(z.roll(7, 2)).sample.roll(-56, 2) - untiled).abs().max() > 1e-2  # restored: edges are edges


def test_the_plane_is_split_by_what_fits_whole(monkeypatch):
    vae, x = tiny.vae(), latent(1, 32, 32)
    by_limit = {}
    for limit in (10**9, 10**6, 1):
        monkeypatch.setattr(vae_room, "WHOLE_BYTES", limit)
        by_limit[limit] = TwoPass(decoder_splits(vae.decoder), cutting((16, 16))).choose(x).tiled.start
    assert by_limit == {10**9: 4, 10**6: 3, 1: 2}


# Not where the model runs, though the same memory.
ELSEWHERE = torch.device("cpu", 0)


@BOTH
@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("split", range(LEVELS - 1))
def test_maps_that_wait_on_a_host_change_nothing(half, wrap, split):
    vae, x, run = tiny.vae(), INPUTS[half](2, 17, 9), HALVES[half]
    results = []
    for host in (None, ELSEWHERE):
        with PatchStack() as stack:
            install_padding(stack, vae, "vae", "circular" if wrap else "constant")
            install(stack, vae, (5, 4), wrap, slice(split, split + 1), host=host)
            results.append(run(vae, x))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_while_tiles_run_the_map_that_they_are_cut_from_is_all_there_is(monkeypatch):
    """The strips before them keep nothing for later."""
    vae, x, run_tiled, alive = tiny.vae(), latent(1, 33, 33), TwoPass._run_tiled, []

    def noting(self, run, plane, *args):
        alive.append(count.alive / plane.nbytes)
        return run_tiled(self, run, plane, *args)

    monkeypatch.setattr(TwoPass, "_run_tiled", noting)
    with PatchStack() as stack, memory.LiveBytes("cpu") as count:
        install(stack, vae, (5, 4), splits=slice(2, 3))  # the mid block runs last before them
        vae.decode(x)
    assert len(alive) == 1
    assert alive[0] < 1.5  # the latent has a quarter of the map's channels


def test_what_cannot_run_in_strips_stays_on_the_device(monkeypatch):
    vae, x = tiny.vae(), latent(1, 17, 9)
    vae.decoder.mid_block.resnets[0].norm1 = nn.BatchNorm2d(16).eval()
    monkeypatch.setattr(vae_room, "known_replacements", lambda module, strips, path: [])
    monkeypatch.setattr(vae_room, "Shuttle", None)  # cannot be called
    with PatchStack() as stack:
        install(stack, vae, (5, 4), host=ELSEWHERE)
        assert vae.decode(x).sample.shape == (1, 3, 136, 72)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_with_a_host_the_device_holds_little_more_for_a_larger_image(half):
    """Beside the picture itself, played by fake tensors on ``meta`` and on ``cpu``: nothing is computed."""

    def held(side):
        with fake(), LiveBytes() as count:
            with torch.device("meta"):
                model = getattr(tiny.vae(block_out_channels=(4, 4, 32, 32), norm_num_groups=4), half)
                x = torch.empty(1, 3, 8 * side, 8 * side) if half == "encoder" else torch.empty(1, 4, side, side)
            model.mid_block.attentions[0] = None  # attention takes its whole map to the device
            splits = encoder_splits(model)[-1:] if half == "encoder" else decoder_splits(model)[-1:]
            pieces = cutting((16, 16), 8 if half == "encoder" else 1)
            with PatchStack() as stack:
                stack.wrap(model, "forward", TwoPass(splits, pieces, host=torch.device("cpu")), half)
                result = model(x)
            assert result.device.type == "meta"
        image = x if half == "encoder" else result
        return count.peak["meta"] - image.nbytes, count.peak["cpu"]

    (device, host), (larger_device, larger_host) = held(64), held(128)
    assert larger_device <= 1.2 * device
    assert larger_host >= 3.5 * host


def test_sd_splits_have_the_halos_that_their_convolutions_need():
    shape = {"block_out_channels": (32, 32, 32, 32), "norm_num_groups": 4, "layers_per_block": 2}
    vae = tiny.vae(**shape)
    assert [split.halo for split in decoder_splits(vae.decoder)] == [10, 12, 13]
    assert [split.scale for split in decoder_splits(vae.decoder)] == [2, 4, 8]
    assert [split.halo for split in encoder_splits(vae.encoder)] == [8, 20, 48]
    assert measure(vae.decoder.mid_block).scale == 1


def test_modules_are_untouched_between_calls_and_after_a_failure():
    vae, x = tiny.vae(), latent(1, 20, 20)
    before = {name: dict(vars(module)) for name, module in vae.named_modules()}

    class Stop(BaseException):
        pass

    class Stopping(Bar):
        def update(self):
            super().update()
            if self.updates == stop_at:
                raise Stop

    for stop_at in range(1, 9):
        patch = TwoPass(decoder_splits(vae.decoder), cutting((10, 10), bar=Stopping))
        with PatchStack() as stack:
            stack.wrap(vae.decoder, "forward", patch, "vae.decoder.forward")
            with pytest.raises(Stop):
                vae.decode(x)
        assert Bar.last.updates == stop_at
        assert {name: dict(vars(module)) for name, module in vae.named_modules()} == before


def test_attention_outside_the_mid_blocks_is_not_tiled():
    assert can_be_tiled(tiny.vae())
    assert not can_be_tiled(tiny.vae(up_block_types=("UpDecoderBlock2D",) * 3 + ("AttnUpDecoderBlock2D",)))
