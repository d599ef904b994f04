"""Two-pass against its oracles: equal to the untiled result under full-plane statistics, close to it otherwise."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import in_pairs
from torch import nn

import streams
import tiny
from halves import BOTH, HALVES, INPUTS, Bar, cutting, latent, picture
from largerespatch.core.families import install
from largerespatch.core.hosts import Host, HostRows
from largerespatch.core.patching import PatchStack
from largerespatch.core.statistics import record
from largerespatch.memory import counting
from largerespatch.techniques.padding import padding_sites
from largerespatch.techniques.vae import tiled_part
from largerespatch.techniques.vae import two_pass as room
from largerespatch.techniques.vae.shared_norms import SharedGroupNorm
from largerespatch.techniques.vae.stages import decoder_splits, encoder_splits, scale_of
from largerespatch.techniques.vae.two_pass import TwoPass
from live import LiveBytes, fake

LEVELS = 4

# Not where the model runs, though the same memory.
ELSEWHERE = Host("cpu:0", band_bytes=1500)


def install_two_pass(stack, vae, size, wrap=False, splits=slice(None), passes=2, host=None):
    """Both halves of `vae` in `passes`, `size` = (height, width) of a tile in latent pixels."""
    for half, split, latent_scale in (("encoder", encoder_splits, 8), ("decoder", decoder_splits, 1)):
        model = getattr(vae, half)
        pieces = cutting(size, latent_scale, wrap)
        two_pass = TwoPass(model, f"vae.{half}", split(model)[splits], pieces, passes, host)
        stack.wrap(model, "forward", two_pass, f"vae.{half}.forward")


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


@in_pairs(
    {
        "half": HALVES,
        "split": range(LEVELS - 1),
        "mode": ["constant", "circular", "reflect", "replicate"],
        "shape, size": [((2, 9, 15), (5, 6)), ((1, 36, 5), (13, 5))],
    }
)
def test_with_full_plane_statistics_tiles_equal_the_untiled_result(monkeypatch, half, split, mode, shape, size):
    """So halo, crop, wrap and padding are right at every split, and only the statistics are approximate."""
    vae, x, run = tiny.vae(), INPUTS[half](*shape), HALVES[half]
    with PatchStack() as stack:
        install(stack, padding_sites(vae, "vae", mode))
        expected = run(vae, x)
        use_true_statistics(monkeypatch, vae, lambda: run(vae, x))
        install_two_pass(stack, vae, size, mode == "circular", slice(split, split + 1))
        # a dozen normalized layers of float32
        torch.testing.assert_close(run(vae, x), expected, rtol=0, atol=2e-4)
    assert Bar.last.updates == Bar.last.total > 2


@BOTH
def test_two_pass_is_closer_than_upstreams_tiling(half):
    vae, x, run = tiny.vae(), INPUTS[half](1, 48, 32), HALVES[half]
    expected = run(vae, x)
    with PatchStack() as stack:
        install_two_pass(stack, vae, (16, 16))
        error = (run(vae, x) - expected).square().mean()
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 128, 16
    upstream = (run(vae, x) - expected).square().mean()
    assert 0 < error < upstream / 4


def psnr(result, expected):
    return float(-10 * torch.log10((result - expected).double().square().mean() / expected.var()))


@pytest.mark.parametrize(("half", "wrap"), [("encode", False), ("decode", True)])
def test_every_pass_makes_one_more_norm_exact(half, wrap):
    """Of the last split's tiled part, which has them all but the mid block's. Until then more passes come closer."""
    vae, x, run = tiny.vae(layers_per_block=1), INPUTS[half](1, 11, 9), HALVES[half]
    norms = {"encode": 8, "decode": 17}[half]
    close = 100  # decibels: what float32 rounds in that many layers
    with PatchStack() as padding:
        if wrap:
            install(padding, padding_sites(vae, "vae", "circular"))
        expected = run(vae, x)
        fidelity = []
        for passes in (2, 4, norms + 1):
            with PatchStack() as stack:
                install_two_pass(stack, vae, (6, 5), wrap, slice(2, 3), passes)
                fidelity.append(psnr(run(vae, x), expected))
            assert Bar.last.total == Bar.last.updates == passes * (4 + 1)
    assert fidelity[-1] > close
    assert all(more > less or less > close for less, more in pairwise(fidelity)), fidelity


@BOTH
def test_an_input_that_fits_one_tile_runs_unpatched(half):
    vae, x, run = tiny.vae(), INPUTS[half](1, 16, 12), HALVES[half]
    expected = run(vae, x)
    Bar.last = None
    with PatchStack() as stack:
        install_two_pass(stack, vae, (16, 12))
        assert torch.equal(run(vae, x), expected)
        assert Bar.last is None
    with PatchStack() as stack:
        install_two_pass(stack, vae, (16, 11))
        assert not torch.equal(run(vae, x), expected)
    assert Bar.last.total == 6  # two tiles and a sample, twice


@BOTH
def test_a_batch_of_two_equals_two_batches_of_one(half):
    vae, run = tiny.vae(), HALVES[half]
    x = torch.cat([INPUTS[half](1, 24, 20), 3 + 5 * INPUTS[half](1, 24, 20)])
    with PatchStack() as stack:
        install_two_pass(stack, vae, (10, 10))
        together = run(vae, x)
        apart = torch.cat([run(vae, each) for each in x.split(1)])
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-5)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_its_accuracy(half, dtype):
    vae, x, run = tiny.vae(), INPUTS[half](1, 20, 20), HALVES[half]
    with PatchStack() as stack:
        install_two_pass(stack, vae, (10, 10))
        exact = run(vae, x)
    untiled = run(vae, x)
    for parameter in vae.parameters():
        parameter.data = parameter.to(dtype)
    untiled_error = (run(vae, x.to(dtype)).float() - untiled).square().mean()
    with PatchStack() as stack:
        install_two_pass(stack, vae, (10, 10))
        result = run(vae, x.to(dtype))
    assert result.dtype == dtype
    assert (result.float() - exact).square().mean() < 2 * untiled_error


@settings(max_examples=8)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 11), st.integers(1, 11), st.booleans())
def test_any_size_and_any_tile(height, width, tile_height, tile_width, wrap):
    vae = tiny.vae()
    with PatchStack() as stack, pytest.MonkeyPatch.context() as monkeypatch:
        if wrap:
            install(stack, padding_sites(vae, "vae", "circular"))
        z, x = latent(1, height, width), picture(1, 8 * height, 8 * width)
        both = lambda: (vae.decode(z).sample, vae.encode(x).latent_dist.mode())  # noqa: E731
        expected = both()
        use_true_statistics(monkeypatch, vae, both)
        install_two_pass(stack, vae, (tile_height, tile_width), wrap)
        torch.testing.assert_close(both(), expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("size", [(32, 32), (9, 10)], ids=["one tile", "many tiles"])
def test_circular_padding_commutes_with_rolling(size):
    """A picture whose left edge continues at its right one cannot tell where it was cut."""
    vae, z = tiny.vae(), latent(1, 20, 28)
    with PatchStack() as stack:
        install(stack, padding_sites(vae, "vae", "circular"))
        untiled = vae.decode(z).sample
        install_two_pass(stack, vae, size, wrap=True)
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
    two_pass = TwoPass(vae.decoder, "decoder", decoder_splits(vae.decoder), cutting((16, 16)))
    by_limit = {}
    for limit in (10**9, 10**6, 1):
        monkeypatch.setattr(room, "WHOLE_BYTES", limit)
        by_limit[limit] = two_pass.choose(x.shape, x.element_size()).split.tiled.start
    assert by_limit == {10**9: 4, 10**6: 3, 1: 2}


@pytest.mark.parametrize(("fitting", "grid"), [((32, 32), 2 * 2), ((16, 32), 4 * 2), ((16, 16), 4 * 3)])
def test_tiles_that_would_be_too_large_are_halved_as_often_as_need_be(monkeypatch, fitting, grid):
    split = decoder_splits(tiny.vae().decoder)[-1]
    monkeypatch.setattr(tiled_part, "TILE_VALUES", split.tile_values(*fitting))
    assert len(tiled_part.TiledPart(split, cutting((32, 32)), 64, 48).windows) == grid


@given(
    st.sampled_from([(half, i) for half in HALVES for i in range(LEVELS - 1)]),
    st.tuples(st.integers(4, 40), st.integers(4, 40)),
    st.tuples(st.integers(2, 20), st.integers(2, 20)),
)
def test_a_sample_shows_as_much_edge_as_the_plane_has(split, shape, size):
    """Its windows are alike, on the grid, no larger than a tile's in all, and none is margin only."""
    half, i = split
    splits = {"encode": encoder_splits, "decode": decoder_splits}[half](getattr(tiny.vae(), f"{half}r"))
    unit = 8 if half == "encode" else 1
    sides = [unit * int(scale_of(splits[i].stages[: splits[i].tiled.start]) * side) for side in shape]
    part = tiled_part.TiledPart(splits[i], cutting(size, unit), *sides)
    step = max(int(1 / splits[i].scale), 1)
    ((outer, tile, _), *_), wide = part.sample, part.windows[0].outer
    assert {(each.outer.size(), each.tile.size()) for each in part.sample} == {(outer.size(), tile.size())}
    assert all(edge % step == 0 for each in part.sample for edge in (*each.outer, *each.tile))
    assert min(tile.size()) > 0
    assert sum(each.outer.area for each in part.sample) <= max(wide.area, (4 * step) ** 2)
    margins = [whole - own for whole, own in zip(outer.size(), tile.size(), strict=True)]
    edge_of_plane = 1 - (sides[0] - margins[0]) * (sides[1] - margins[1]) / (sides[0] * sides[1])
    edge_shown = part.edge * (1 - tile.area / outer.area)
    assert edge_shown == pytest.approx(edge_of_plane)
    assert 0 <= part.edge <= 1
    assert tiled_part.TiledPart(splits[i], cutting(size, unit, wrap=True), *sides).edge == 0


@in_pairs({"half": HALVES, "wrap": [False, True], "split": range(LEVELS - 1), "strip_bytes": [2**24, 2**17]})
def test_maps_that_wait_on_a_host_change_nothing(half, wrap, split, strip_bytes, monkeypatch):
    monkeypatch.setattr(room, "TILE_STRIP_BYTES", strip_bytes)
    vae, x, run = tiny.vae(), INPUTS[half](2, 11, 6), HALVES[half]
    results = []
    for host in (None, ELSEWHERE):
        with PatchStack() as stack:
            install(stack, padding_sites(vae, "vae", "circular" if wrap else "constant"))
            install_two_pass(stack, vae, (5, 4), wrap, slice(split, split + 1), host=host)
            results.append(run(vae, x))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_while_tiles_run_the_map_that_they_are_cut_from_is_all_there_is(monkeypatch):
    """The strips before them keep nothing for later."""
    vae, x, run_tiled, alive = tiny.vae(), latent(1, 17, 17), TwoPass._run_tiled, []

    def noting(self, run, plane, *args):
        alive.append(count.alive / plane.nbytes)
        return run_tiled(self, run, plane, *args)

    monkeypatch.setattr(TwoPass, "_run_tiled", noting)
    with PatchStack() as stack, counting.LiveBytes("cpu") as count:
        install_two_pass(stack, vae, (5, 4), splits=slice(2, 3))  # the mid block runs last before them
        vae.decode(x)
    assert len(alive) == 1
    assert alive[0] < 1.5  # the latent has a quarter of the map's channels


def test_what_cannot_run_in_strips_stays_on_the_device(monkeypatch):
    vae, x, shapes, empty = tiny.vae(), latent(1, 17, 9), [], HostRows.empty
    vae.decoder.mid_block.resnets[0].norm1 = nn.BatchNorm2d(16).eval()
    monkeypatch.setattr(
        HostRows, "empty", lambda host, shape, *others: shapes.append(shape) or empty(host, shape, *others)
    )
    with PatchStack() as stack:
        install_two_pass(stack, vae, (5, 4), host=ELSEWHERE)
        assert vae.decode(x).sample.shape == (1, 3, 136, 72)
    assert set(shapes) == {(1, 3, 136, 72)}  # but for the picture


@pytest.mark.parametrize("large", [False, True])
def test_a_large_picture_is_made_on_the_host_and_what_is_encoded_is_not(large):
    """Played by fake tensors on ``meta`` and on ``cpu``: nothing is computed."""
    with fake(), torch.device("meta"):
        vae, x, image = tiny.vae(), torch.empty(1, 4, 17, 9), torch.empty(1, 3, 136, 72)
    host = Host(band_bytes=image.nbytes // 4 if large else image.nbytes)
    with fake(), PatchStack() as stack:
        install_two_pass(stack, vae, (5, 4), host=host)
        assert vae.decoder(x).device.type == ("cpu" if large else "meta")
        assert vae.encoder(image).device.type == "meta"


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
                stack.wrap(model, "forward", TwoPass(model, half, splits, pieces, host=Host()), half)
                result = model(x)
            assert result.device.type == "meta"
        image = x if half == "encoder" else result
        return count.peak["meta"] - image.nbytes, count.peak["cpu"]

    (device, host), (larger_device, larger_host) = held(48), held(96)
    assert larger_device <= 1.2 * device
    assert larger_host >= 3.5 * host


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

    pieces = cutting((10, 10), bar=Stopping)
    for stop_at in range(1, 9):
        patch = TwoPass(vae.decoder, "vae.decoder", decoder_splits(vae.decoder), pieces)
        with PatchStack() as stack:
            stack.wrap(vae.decoder, "forward", patch, "vae.decoder.forward")
            with pytest.raises(Stop):
                vae.decode(x)
        assert Bar.last.updates == stop_at
        assert {name: dict(vars(module)) for name, module in vae.named_modules()} == before


@pytest.mark.parametrize(("half", "wrap"), [("encode", True), ("decode", False)])
def test_copies_on_streams_of_their_own_are_waited_for(half, wrap):
    """As on CUDA, on streams that are played."""
    vae, x, run = sd_like(), INPUTS[half](2, 14, 6), HALVES[half]
    host = Host("cpu:0", band_bytes=1500)
    results = []
    for where in (None, host):
        with nullcontext() if where is None else streams.play(host) as watch, PatchStack() as stack:
            install(stack, padding_sites(vae, "vae", "circular" if wrap else "constant"))
            install_two_pass(stack, vae, (3, 4), wrap, host=where)
            results.append(run(vae, x))
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)  # layers by the dozen in float32
    assert [stream.total > 10 for stream in watch.sides] == [True, True]
    assert watch.sound()


def sd_like():
    """All that Stable Diffusion's VAE has: widening and narrowing blocks, with and without a shortcut."""
    return tiny.vae(block_out_channels=(8, 16, 32, 32), layers_per_block=2, norm_num_groups=8)


def listen(model):
    """Returns what each module gives, by path: as hooks get and keep it, and as it is at that moment."""
    kept = {}

    def hook(path):
        return lambda _, __, output: kept.setdefault(path, []).append((output, output + 0))

    for path, module in model.named_modules():
        module.register_forward_hook(hook(path))
    return kept


def model_of(vae, half):
    return vae.encoder if half == "encode" else vae.decoder


def runs_whole(model, half):
    """What sees no pieces where the first of the splits is taken, and is called: by path."""
    blocks = ["mid_block.attentions.0", "mid_block.resnets.0", "mid_block.resnets.1", "mid_block"]
    if half == "encode":
        return {"", *blocks, *whole_blocks("down_blocks", (2, 3), model), "conv_norm_out", "conv_act", "conv_out"}
    return {"", "conv_in", *blocks, *whole_blocks("up_blocks", (0, 1), model)}


def whole_blocks(name, which, model):
    ends = {"down_blocks": "downsamplers", "up_blocks": "upsamplers"}
    for i in which:
        block = getattr(model, name)[i]
        yield f"{name}.{i}"
        yield from (f"{name}.{i}.resnets.{j}" for j in range(len(block.resnets)))
        yield from (f"{name}.{i}.{ends[name]}.0" for _ in getattr(block, ends[name]) or ())


@in_pairs({"half": ["encode", "decode"], "host": [None, ELSEWHERE], "rows": [3, 7]})
def test_what_a_hook_is_given_is_right_and_stays_so_or_it_is_not_called(half, host, rows):
    vae, x, run = sd_like(), INPUTS[half](1, 12, 6), HALVES[half]
    model = model_of(vae, half)
    splits = slice(1, 2) if half == "encode" else slice(0, 1)
    kept = listen(model)
    with PatchStack() as stack:
        untiled = run(vae, x)
        expected = dict(kept)
        kept.clear()
        install_two_pass(stack, vae, (rows, 4), splits=splits, host=host)
        with pytest.warns(RuntimeWarning, match=r"VAE half runs in pieces, so the forward hooks on \d+ of") as caught:
            result = run(vae, x)
            run(vae, x + 1)
        assert len(caught) == 1
    assert set(kept) == runs_whole(model, half)
    error = (result - untiled).norm() / untiled.norm()
    for path, calls in kept.items():
        (first, then), (second, _) = calls  # once a call
        assert torch.equal(first + 0, then + 0), path  # still what it was
        assert not torch.equal(first + 0, second + 0)
        right = expected[path][0][0]
        # What runs before the tiles is exact.
        close = 1e-5 if half == "decode" and path else 4 * error + 1e-5
        assert (first - right).norm() < close * right.norm(), path
    run(vae, x)
    assert set(kept) == set(expected)


@BOTH
def test_hooks_that_give_or_take_something_else_count_once(half):
    """A stage is called once for each part of the whole, and passes on what it is given in all but one."""
    vae, x, run = sd_like(), INPUTS[half](1, 12, 6), HALVES[half]
    model = model_of(vae, half)
    first = model.conv_in if half == "decode" else model.mid_block
    first.register_forward_hook(lambda _, __, output: 0.5 * output)
    model.mid_block.register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    model.mid_block.resnets[0].register_forward_hook(lambda _, __, output: 0.5 * output)
    expected = run(vae, x)
    with PatchStack() as stack:
        install_two_pass(stack, vae, (32, 32))
        assert torch.equal(run(vae, x), expected)
    with PatchStack() as stack:
        install_two_pass(stack, vae, (6, 4), passes=18)
        assert (run(vae, x) - expected).norm() < 0.02 * expected.norm()


@BOTH
def test_a_hook_before_a_module_that_sees_pieces_is_called_and_told_of(half):
    vae, x, run, seen = sd_like(), INPUTS[half](1, 12, 6), HALVES[half], []
    block = vae.encoder.down_blocks[0] if half == "encode" else vae.decoder.up_blocks[-1]
    block.resnets[0].conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with PatchStack() as stack:
        install_two_pass(stack, vae, (6, 4))
        text = r"VAE half runs in pieces, so the forward pre-hooks on 1 of its modules see pieces \(vae\.\S+conv1\);"
        with pytest.warns(RuntimeWarning, match=text) as caught:
            run(vae, x)
            run(vae, x)
    assert len(caught) == 1
    assert len(seen) == 2 * Bar.last.total


@BOTH
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_hooks_that_make_weights_are_no_news(half):
    vae, x, run = sd_like(), INPUTS[half](1, 12, 6), HALVES[half]
    with PatchStack() as stack:
        install_two_pass(stack, vae, (6, 4))
        expected = run(vae, x)
    for model in (vae.encoder, vae.decoder):
        for module in (model.conv_in, model.mid_block.resnets[0].conv1, model.conv_out):
            nn.utils.weight_norm(module)
    with PatchStack() as stack:
        install_two_pass(stack, vae, (6, 4))
        torch.testing.assert_close(run(vae, x), expected, rtol=0, atol=1e-4)


def test_hooks_on_all_modules_there_are_are_told_of():
    vae, x, seen = sd_like(), latent(1, 12, 6), []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        with PatchStack() as stack:
            install_two_pass(stack, vae, (6, 4))
            with pytest.warns(
                RuntimeWarning, match="so hooks that are registered for every module there is see pieces;"
            ) as caught:
                vae.decode(x)
                vae.decode(x)
    finally:
        handle.remove()
    assert len(caught) == 1
    assert seen
