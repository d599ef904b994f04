"""Settings that fit a budget."""

import logging
import warnings
from unittest import mock

import pytest
import test_flux
import torch

from largerespatch import LargeResPatch
from largerespatch.core.patching import PatchStack
from largerespatch.memory import devices, host_room, planner
from largerespatch.memory.counting import gibibytes
from largerespatch.memory.estimate import bare
from largerespatch.memory.planner import Planner, Saver, changing, free_bytes, limit_bytes, margin
from largerespatch.options import Options
from test_patch import fingerprint

MIB, GIB = 2**20, 2**30


@pytest.fixture
def no_margin(monkeypatch):
    """These models are smaller than any margin."""
    monkeypatch.setattr(planner, "margin", lambda limit: 0)


def peak(pipe, **options):
    return LargeResPatch(pipe, 256, 256, **options).estimate().peak


def test_a_limit_that_fits_changes_nothing(pipe, no_margin):
    patch = LargeResPatch(pipe, 256, 256, memory_limit=peak(pipe))
    assert "no saver needed" in repr(patch)
    assert repr(patch).splitlines()[:-1] == repr(LargeResPatch(pipe, 256, 256)).splitlines()


def test_the_first_settings_that_fit_are_picked(pipe, monkeypatch, no_margin):
    full, smaller = peak(pipe), peak(pipe, vae_chunk_size_x=16, vae_chunk_size_y=16)
    monkeypatch.setattr(planner, "DENOISER_SAVERS", ())
    steps = (Saver({"vae_chunk_size_x": 16, "vae_chunk_size_y": 16}), Saver({"vae_chunk_size_x": 8}))
    monkeypatch.setitem(planner.VAE_SAVERS, "two-pass", steps)
    patch = LargeResPatch(pipe, 256, 256, memory_limit=(full + smaller) // 2)
    assert (patch.options.vae_chunk_size_x, patch.options.vae_chunk_size_y) == (16, 16)
    assert patch.estimate().peak == smaller
    said = (
        f"vae_chunk_size_x=16, vae_chunk_size_y=16; estimated peak {gibibytes(smaller)}, without them {gibibytes(full)}"
    )
    assert said in repr(patch)
    kept = LargeResPatch(pipe, 256, 256, vae_chunk_size_y=64, memory_limit=full - 1)
    assert (kept.options.vae_chunk_size_x, kept.options.vae_chunk_size_y) == (16, 64)


class Invented:
    """An estimator whose stages need what `needs` says of how many settings differ from `options`, at any size."""

    device, weights, host = torch.device("meta"), 100, 0

    def __init__(self, needs, options, encodes=False):
        self.needs, self.options, self.encodes, self.tried = needs, options, encodes, []

    def peak(self, stage, height, width, options):
        assert isinstance(options, Options)
        changed = {name: value for name, value in vars(options).items() if value != getattr(self.options, name)}
        if stage == "step":
            self.tried.append(changed)
        return self.needs[stage](changed)

    def fits(self, stage, height, width, options, room):
        return self.peak(stage, height, width, options) <= room

    def saves(self, stages, option, value):
        return True

    def host_peak(self, stage, height, width, options):
        return self.host if options.unet_offload or options.vae_offload else 0


def fewer(settings):
    return 50 - 10 * len(settings)


def least(settings):
    return 5


def test_the_fewest_savers_are_taken_with_which_every_stage_fits(no_margin):
    options = Options()
    estimator = Invented({"step": fewer, "encode": fewer, "decode": least}, options)
    plan = Planner(estimator, 130, options, frozenset()).plan(64, 64)
    assert plan.settings == {"unet_serial": True, "unet_offload": "skips"}
    estimator.tried.clear()
    assert Planner(estimator, 140, options, frozenset()).plan(64, 64).settings == {"unet_serial": True}
    assert all(each in ({}, {"unet_serial": True}) for each in estimator.tried), "no more than has to be is counted"
    assert (plan.peak, plan.without) == (130, 150)
    assert options == Options(), "settings go into options of their own"


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
@pytest.mark.parametrize("room", [19, 20, 29, 30, 37, 40, 49, 50])
def test_where_a_search_begins_makes_no_difference_to_what_it_finds(room, share, no_margin, monkeypatch):
    savers = [saver._replace(leaves=share) for saver in planner.DENOISER_SAVERS]
    monkeypatch.setattr(planner, "DENOISER_SAVERS", savers)
    picked = [{"unet_serial": True, "unet_offload": "skips", "unet_strip_rows": 64, "ff_chunk_size": 4096}]
    picked += [{"unet_serial": True, "unet_offload": "skips"}, {"unet_serial": True}, {}]
    options = Options(ff_chunk_size=4096)
    estimator = Invented({"step": fewer, "decode": least}, options)
    planning = Planner(estimator, 100 + room, options, frozenset())
    if room < 20:
        with pytest.raises(planner.DoesNotFitError, match="which need at least"):
            planning.plan(64, 64)
    else:
        assert planning.plan(64, 64).settings == picked[room // 10 - 2]
    assert estimator.tried[0] == {}


@pytest.mark.parametrize("encodes", [False, True])
def test_what_an_encoder_needs_counts_where_the_pipeline_encodes(encodes, no_margin):
    estimator = Invented({"step": least, "encode": fewer, "decode": least}, Options(), encodes)
    plan = Planner(estimator, 130, Options(), frozenset()).plan(64, 64)
    assert plan.settings == ({"vae_offload": True, "vae_attn": "blocked"} if encodes else {})


def test_what_was_given_is_kept():
    options = Options(unet_strip_rows=8, vae_mode="exact", vae_recompute=False)
    estimator = Invented({"step": least, "encode": least, "decode": least}, options)
    kept = frozenset({"unet_strip_rows", "ff_chunk_size", "vae_mode", "vae_recompute"})
    found = Planner(estimator, 2**40, options, kept)
    offloads = [{"unet_serial": True, "unet_offload": each} for each in ("skips", "maps")]
    denoiser, vae = ([saver.settings for saver in ladder] for ladder in (found.denoiser, found.vae))
    assert denoiser == [{}, {"unet_serial": True}, *offloads]
    assert vae[1] == {"vae_offload": True} and vae[-1] == {"vae_offload": True, "vae_chunk_size_y": 8}


def test_what_the_host_has_no_memory_for_is_done_without_it_or_refused(no_margin, monkeypatch):
    estimator = Invented({"step": fewer, "encode": least, "decode": least}, Options())
    estimator.host = 3 * 2**30
    planning = Planner(estimator, 130, Options(), frozenset())
    waiting = {"unet_serial": True, "unet_offload": "skips"}
    assert planning.plan(64, 64).settings == waiting
    assert planning.plan(64, 64).host == estimator.host
    assert "3.00 GiB on the host" in str(planning.plan(64, 64))
    monkeypatch.setattr(planner, "host_bytes", lambda: 2**31)
    strips = {"unet_serial": True, "unet_strip_rows": 64, "ff_chunk_size": 4096}
    assert planning.plan(64, 64).settings == strips
    assert planning.plan(64, 64).host == 0
    assert "on the host" not in str(planning.plan(64, 64))
    whole = Planner(estimator, 130, Options(), frozenset({"unet_strip_rows", "ff_chunk_size", "vae_attn"}))
    with pytest.raises(planner.DoesNotFitError, match=r"need 3.00 GiB of the host's memory") as refused:
        whole.plan(64, 64)
    tiles = {"vae_chunk_size_x": 32, "vae_chunk_size_y": 32}
    assert refused.value.settings == {"unet_serial": True} | tiles, "all that needs no host"
    monkeypatch.setattr(planner, "host_bytes", lambda: None)  # where it does not say
    assert whole.plan(64, 64).settings == waiting


def test_what_saves_nothing_is_not_tried():
    """A transformer of today has no skip connections, no convolutions to run in strips, and runs tile by tile."""
    pipe = test_flux.pipeline()
    for model in (pipe.transformer, pipe.vae):
        model.to("meta")
    found = Planner(LargeResPatch(pipe, 64, 64)._estimator(bare), 2**40, Options(), frozenset())
    assert [saver.settings for saver in found.denoiser] == [{}, {"unet_offload": "maps"}]
    assert found.vae[1].settings == {"vae_offload": True}


ON_HOST = {
    "maps": {"unet_offload": "maps"},
    "the VAE": {"vae_offload": True},
    "both": {"unet_offload": "skips", "vae_offload": True},
}


@pytest.mark.parametrize(("case", "limit"), [("maps", None), ("the VAE", "auto"), ("both", None), ("both", "auto")])
def test_without_an_amount_too_a_host_without_the_memory_is_told_before_anything_is_changed(
    case, limit, pipe, monkeypatch
):
    options = ON_HOST[case]
    for model in (pipe.unet, pipe.vae):
        model.to("meta")
    patch = LargeResPatch(pipe, 16384, 8192, **options, memory_limit=limit)
    before = fingerprint(pipe)
    needed = patch.estimate().host
    assert 0 < needed < host_room.MOST_BYTES_A_PIXEL * 16384 * 8192
    monkeypatch.setattr(host_room, "host_bytes", lambda: needed - 1)
    told = ".*".join(f"{name}={value!r}" for name, value in options.items())
    with pytest.raises(ValueError, match=rf"{told}: maps of 16384x8192 .* need .* it has .*; accepted .* .*=False"):
        patch.enable()
    assert fingerprint(pipe) == before
    for enough in (needed, None):
        monkeypatch.setattr(host_room, "host_bytes", lambda enough=enough: enough)
        with patch:
            assert fingerprint(pipe) != before
    assert fingerprint(pipe) == before


def test_where_maps_fit_in_any_case_or_stay_there_is_no_estimate(pipe, monkeypatch):
    estimator = mock.Mock(side_effect=AssertionError("there is one"))
    monkeypatch.setattr(LargeResPatch, "_estimator", estimator)
    monkeypatch.setattr(host_room, "host_bytes", lambda: 1)
    for options in ({}, ON_HOST["both"]):  # these models are on the host
        with LargeResPatch(pipe, 16384, 8192, **options):
            pass
    for model in (pipe.unet, pipe.vae):
        model.to("meta")
    with LargeResPatch(pipe, 16384, 8192):
        pass
    monkeypatch.setattr(host_room, "host_bytes", lambda: host_room.MOST_BYTES_A_PIXEL * 16384 * 8192)
    with LargeResPatch(pipe, 16384, 8192, **ON_HOST["both"]):
        pass
    assert not estimator.called


def test_the_host_says_what_it_has():
    assert devices.host_bytes() > 2**28


def test_every_saver_is_an_option():
    for ladder in (planner.DENOISER_SAVERS, *planner.VAE_SAVERS.values()):
        assert {name for saver in ladder for name in saver.settings} <= vars(Options()).keys()
        assert [saver.exact for saver in ladder] == sorted([saver.exact for saver in ladder], reverse=True)


@pytest.mark.parametrize("vae_mode", ["two-pass", "exact"])
def test_only_what_can_leave_the_device_is_tried_to(pipe, vae_mode):
    def tried():
        estimator = LargeResPatch(pipe, 64, 64)._estimator(bare)
        found = Planner(estimator, 2**40, Options(vae_mode=vae_mode), frozenset())
        return {name for saver in found.denoiser + found.vae for name in saver.settings if name.endswith("_offload")}

    assert tried() == set()
    for model in (pipe.unet, pipe.vae):
        model.to("meta")
    assert tried() == {"unet_offload", "vae_offload"}


def test_where_nothing_fits_the_error_says_what_does(pipe, monkeypatch, no_margin):
    monkeypatch.setattr(planner, "DENOISER_SAVERS", ())
    monkeypatch.setitem(planner.VAE_SAVERS, "two-pass", (Saver({"vae_chunk_size_x": 32, "vae_chunk_size_y": 32}),))
    before = fingerprint(pipe)
    limit = peak(pipe, vae_chunk_size_x=32, vae_chunk_size_y=32) - MIB
    with pytest.raises(ValueError, match=r"does not fit 512x256 sample pixels, which need .* MiB") as refused:
        LargeResPatch(pipe, 512, 256, memory_limit=limit)
    width, height = map(int, str(refused.value).split()[-1].split("x"))
    assert width == 2 * height
    assert LargeResPatch(pipe, width, height, memory_limit=limit).estimate().peak <= limit
    with pytest.raises(ValueError, match="does not fit"):
        LargeResPatch(pipe, 2 * (height + 64), height + 64, memory_limit=limit)
    assert fingerprint(pipe) == before


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        ("8", ValueError, "a positive amount such as '8GiB'.*got '8'"),
        ("0GiB", ValueError, "got '0GiB'"),
        (0, ValueError, "got 0"),
        (-(2**33), ValueError, "got -8589934592"),
        (8.0e9, TypeError, r"whole number of bytes.*got 8000000000\.0"),
        (float("nan"), TypeError, "got nan"),
        (True, TypeError, "got True"),
        ([], TypeError, r"got \[\]"),
        ("1KiB", ValueError, r"more than the weights on cpu, which take 1\.\d\d MiB, and a margin of .* got '1KiB'"),
        ("512MiB", ValueError, r"and a margin of 0\.50 GiB that stays free; got '512MiB'"),
    ],
)
def test_limits_that_are_none(pipe, limit, error, message):
    with pytest.raises(error, match=f"memory_limit .*{message}"):
        LargeResPatch(pipe, 64, 64, memory_limit=limit)


class Sized(Invented):
    """What is needed depends on the size alone; in `fitted` are those that fit."""

    def __init__(self, needs, options):
        super().__init__(needs, options)
        self.fitted = set()

    def peak(self, stage, height, width, options):
        return self.needs(stage, height, width)

    def fits(self, stage, height, width, options, room):
        fits = super().fits(stage, height, width, options, room)
        self.fitted |= {(stage, height)} if fits else set()
        return fits


def largest(needs, limit):
    """The height of the largest image of 2:1 that fits, as a refusal tells it, and the sizes that were seen to fit."""
    options = Options()
    estimator = Sized(needs, options)
    found = Planner(estimator, limit, options, frozenset({"vae_attn"}))
    found._scaled = lambda height, width, short: (short, 2 * short)
    with pytest.raises(ValueError, match="does not fit 16384x8192 sample pixels, which need") as refused:
        found.plan(8192, 16384)
    width, height = map(int, str(refused.value).split()[-1].split("x"))
    assert width == 2 * height
    return height, estimator.fitted


@pytest.mark.parametrize("limit", [10_100, 30_100, 200_100, 1_000_100])
def test_the_largest_size_is_found_in_few_counts(limit, no_margin):
    """What is needed is not quite in proportion to the area. What does not fit is known soon, so what fits is few."""

    def needs(stage, height, width):
        return height * width // 64 + 40 * (height // 512) + (5000 if stage == "decode" else 0)

    height, fitted = largest(needs, limit)
    assert needs("decode", height, 2 * height) <= limit - 100 < needs("decode", 3 * height // 2, 3 * height)
    assert len(fitted) <= 4


def test_where_a_smaller_image_needs_more_the_largest_that_is_told_fits_all_the_same(no_margin):
    """That its VAE takes little of the larger ones says nothing of it."""

    def needs(stage, height, width):
        return (10_000 if height == 512 else 0) if stage == "decode" else height * width // 64

    assert largest(needs, 9_000)[0] == 384


@pytest.mark.parametrize(("limit", "kept"), [(GIB, GIB // 2), (5 * GIB, GIB // 2), (40 * GIB, 4 * GIB)])
def test_a_tenth_of_a_limit_stays_free_and_at_least_half_a_gibibyte(limit, kept):
    assert margin(limit) == kept
    options = Options()
    assert Planner(Invented({}, options), limit, options, frozenset()).room == limit - kept - 100


def test_what_changes_a_result_is_known():
    picked = {"unet_serial": True, "vae_offload": True, "vae_attn": "blocked", "vae_chunk_size_y": 32}
    assert changing(picked, "two-pass") == {"vae_attn": "blocked", "vae_chunk_size_y": 32}
    assert changing({"vae_recompute": True, "vae_chunk_size_y": 32, "unet_strip_rows": 16}, "exact") == {}


def test_auto_is_what_the_device_has_free_and_the_weights_that_are_there(pipe, monkeypatch):
    assert limit_bytes("auto", pipe) is None, "a host does not say"
    monkeypatch.setattr(planner, "free_bytes", lambda device: 100 * MIB)
    assert limit_bytes("auto", pipe) == 100 * MIB + LargeResPatch(pipe, 64, 64).estimate().weights


@pytest.fixture
def accelerator(monkeypatch, no_margin):
    """Takes a number of bytes: the models are on a device that has so many free."""

    def has(free):
        monkeypatch.setattr(planner, "free_bytes", lambda device: free)

    return has


def drawn(pipe):
    seed = torch.manual_seed(0)
    return pipe("a lake", width=256, height=256, num_inference_steps=1, output_type="np", generator=seed).images


def needed(pipe, **options):
    """Beside the weights."""
    estimate = LargeResPatch(pipe, 256, 256, memory_limit=None, **options).estimate()
    return estimate.peak - estimate.weights


def test_on_the_host_nothing_is_planned_unless_asked(pipe, monkeypatch):
    monkeypatch.setattr(LargeResPatch, "_planner", None)
    with LargeResPatch(pipe, 256, 256) as patch:
        drawn(pipe)
    assert "memory_limit" not in repr(patch)


LESS = {"vae_chunk_size_x": 16, "vae_chunk_size_y": 16}


def test_settings_are_planned_when_the_first_call_starts(pipe, accelerator, monkeypatch, caplog):
    monkeypatch.setitem(planner.VAE_SAVERS, "two-pass", (Saver(LESS),))
    accelerator(2**40)
    before = fingerprint(pipe)
    full, less = needed(pipe), needed(pipe, **LESS)
    assert less < full
    with caplog.at_level(logging.INFO, "largerespatch"), LargeResPatch(pipe, 256, 256) as patch:
        assert "memory_limit 'auto': settings are planned when the first call starts" in repr(patch)
        accelerator((full + less) // 2)  # what is attached meanwhile counts
        assert patch.options.vae_chunk_size_x == 64 and not caplog.records
        image = drawn(pipe)
        assert (patch.options.vae_chunk_size_x, patch.options.vae_chunk_size_y) == (16, 16)
        assert "vae_chunk_size_x=16, vae_chunk_size_y=16; estimated peak" in repr(patch)
        assert [record.getMessage() for record in caplog.records] == [repr(patch).splitlines()[-1].strip()]
        accelerator(1)
        drawn(pipe)
        assert len(caplog.records) == 1, "planned once"
    assert fingerprint(pipe) == before
    with LargeResPatch(pipe, 256, 256, memory_limit=None, **LESS):
        assert (drawn(pipe) == image).all()
    accelerator(2**40)
    with patch:
        assert patch.options.vae_chunk_size_x == 64, "planned anew"
        drawn(pipe)
        assert "no saver needed" in repr(patch)
    assert fingerprint(pipe) == before


def test_where_the_models_are_when_the_first_call_starts_is_what_counts(pipe, accelerator):
    before = fingerprint(pipe)
    with LargeResPatch(pipe, 256, 256) as patch:
        assert "memory_limit" not in repr(patch)
        accelerator(2**40)  # they move there
        drawn(pipe)
        assert "no saver needed" in repr(patch)
    assert fingerprint(pipe) == before


@pytest.mark.parametrize("first", ["decode", "encode"])
def test_a_vae_that_is_called_first_is_planned_for(pipe, accelerator, monkeypatch, first):
    accelerator(2**40)
    pipe.vae.use_tiling = True
    seen = {"decode": torch.ones(1, 4, 8, 8), "encode": torch.ones(1, 3, 64, 64)}[first]
    with LargeResPatch(pipe, 64, 64) as patch:
        getattr(pipe.vae, first)(seen)
        assert "no saver needed" in repr(patch)
        assert pipe.vae.use_tiling is False
    assert pipe.vae.use_tiling is True


def test_approximate_settings_come_with_one_warning_that_names_them(pipe, accelerator, monkeypatch):
    monkeypatch.setattr(planner, "DENOISER_SAVERS", ())
    monkeypatch.setitem(planner.VAE_SAVERS, "two-pass", (Saver(LESS, exact=False),))
    accelerator(needed(pipe) - 1)
    names = "vae_chunk_size_x=16, vae_chunk_size_y=16"
    with LargeResPatch(pipe, 256, 256) as patch:
        with pytest.warns(RuntimeWarning, match=f"memory_limit 'auto' has picked {names}, since nothing that leaves"):
            drawn(pipe)
        assert patch.options.vae_chunk_size_x == 16
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            drawn(pipe)


def test_where_nothing_fits_every_saver_is_on_and_one_warning_says_what_is_needed(pipe, accelerator):
    accelerator(1)
    with LargeResPatch(pipe, 256, 256) as patch:
        with pytest.warns(RuntimeWarning, match="does not fit 256x256 sample pixels, which need .* MiB with every"):
            drawn(pipe)
        assert patch.options.unet_serial and patch.options.unet_strip_rows == 16 and patch.options.vae_attn == "blocked"
        assert "does not fit 256x256" in repr(patch)
        drawn(pipe)


def test_auto_keeps_what_was_given(pipe, accelerator):
    accelerator(1)
    with LargeResPatch(pipe, 256, 256, unet_serial=False, vae_attn="full") as patch, pytest.warns(RuntimeWarning):
        drawn(pipe)
    assert not patch.options.unet_serial and patch.options.vae_attn == "full" and patch.options.unet_strip_rows == 16


@pytest.mark.parametrize("error", [ValueError("it is not known how"), NotImplementedError("no such operation")])
def test_without_an_estimate_auto_plans_nothing_and_says_so(pipe, accelerator, monkeypatch, error):
    def refuse(*args):
        raise error

    accelerator(1)
    monkeypatch.setattr("largerespatch.memory.estimate.play", refuse)
    with LargeResPatch(pipe, 256, 256) as patch:
        drawn(pipe)
    assert f"memory_limit 'auto': nothing is planned, since there is no estimate: {error}" in repr(patch)
    assert patch.options == Options()


def test_none_switches_it_off(pipe, accelerator):
    accelerator(1)
    with LargeResPatch(pipe, 256, 256, memory_limit=None) as patch:
        drawn(pipe)
    assert patch.options == Options(memory_limit=None) and "memory_limit" not in repr(patch)


@pytest.mark.parametrize("path", ["unet", "unet.mid_block.resnets.0", "vae.decoder"])
def test_what_others_have_put_over_a_replacement_stays_and_nothing_is_planned(pipe, accelerator, path):
    accelerator(1)
    calls, patch = [], LargeResPatch(pipe, 256, 256, unet_strip_rows=16)
    patch.enable()
    model, _, rest = path.partition(".")
    module = getattr(pipe, model).get_submodule(rest)
    ours = module.forward
    theirs = module.forward = lambda *args, **kwargs: calls.append(1) or ours(*args, **kwargs)
    drawn(pipe)
    assert len(calls) == 1 and module.forward is theirs and not patch.options.unet_serial
    assert f"nothing is planned, since other code has replaced {path}.forward" in repr(patch)
    with pytest.raises(RuntimeError, match=f"{path}.forward"):
        patch.disable()
    del module.forward
    assert not patch._stack.active and not patch._first_call.stack.active


def test_an_offload_hook_stays_around_what_is_planned(pipe, accelerator):
    from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module

    accelerator(1)
    for model in (pipe.unet, pipe.vae):
        add_hook_to_module(model, CpuOffload("cpu"))
    before = fingerprint(pipe)
    with LargeResPatch(pipe, 256, 256) as patch, pytest.warns(RuntimeWarning, match="does not fit"):
        drawn(pipe)
    assert patch.options.unet_serial
    assert fingerprint(pipe) == before
    for model in (pipe.unet, pipe.vae):
        remove_hook_from_module(model)


@pytest.mark.parametrize("fails_at", range(6))
def test_a_failure_while_entering_leaves_nothing(pipe, accelerator, monkeypatch, fails_at):
    accelerator(1)
    before, wrapped, wrap = fingerprint(pipe), [], PatchStack.wrap

    def failing(self, target, method, around, label):
        if method in ("encode", "decode") or label == "unet.forward":
            wrapped.append(label)
            if len(wrapped) > fails_at:
                raise KeyError(label)
        wrap(self, target, method, around, label)

    monkeypatch.setattr(PatchStack, "wrap", failing)
    patch = LargeResPatch(pipe, 64, 64)
    if fails_at < 4:
        with pytest.raises(KeyError):
            patch.enable()
    else:
        patch.enable().disable()
    assert fingerprint(pipe) == before


def test_free_bytes_count_what_torch_has_in_its_cache(monkeypatch):
    class Backend:
        mem_get_info = staticmethod(lambda device: (1000, 5000))
        memory_reserved = staticmethod(lambda device: 300)
        memory_allocated = staticmethod(lambda device: 100)

    monkeypatch.setattr(torch, "cuda", Backend)
    assert free_bytes(torch.device("cuda")) == 1200
    assert free_bytes(torch.device("cpu")) is None
