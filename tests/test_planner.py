"""Settings that fit a budget."""

import pytest
import torch

from largerespatch import LargeResPatch
from largerespatch.memory import planner
from largerespatch.memory.counting import gibibytes
from largerespatch.memory.estimate import MemoryEstimate, bare
from largerespatch.memory.planner import Planner, free_bytes, limit_bytes
from largerespatch.options import Options
from test_patch import fingerprint

MIB = 2**20


def peak(pipe, **options):
    return LargeResPatch(pipe, 256, 256, **options).estimate().peak


def test_a_limit_that_fits_changes_nothing(pipe):
    patch = LargeResPatch(pipe, 256, 256, memory_limit=peak(pipe))
    assert "no saver needed" in repr(patch)
    assert repr(patch).splitlines()[:-1] == repr(LargeResPatch(pipe, 256, 256)).splitlines()


def test_the_first_settings_that_fit_are_picked(pipe, monkeypatch):
    full, smaller = peak(pipe), peak(pipe, vae_chunk_size_x=16, vae_chunk_size_y=16)
    monkeypatch.setattr(planner, "DENOISER_SAVERS", ())
    steps = ({"vae_chunk_size_x": 16, "vae_chunk_size_y": 16}, {"vae_chunk_size_x": 8})
    monkeypatch.setitem(planner.VAE_SAVERS, "two-pass", steps)
    patch = LargeResPatch(pipe, 256, 256, memory_limit=(full + smaller) // 2)
    assert (patch.options.vae_chunk_size_x, patch.options.vae_chunk_size_y) == (16, 16)
    assert patch.estimate().peak == smaller
    assert "vae_chunk_size_x=16, vae_chunk_size_y=16; estimated peak" in repr(patch)
    kept = LargeResPatch(pipe, 256, 256, vae_chunk_size_y=64, memory_limit=full - 1)
    assert (kept.options.vae_chunk_size_x, kept.options.vae_chunk_size_y) == (16, 64)


class Invented:
    """An estimator whose stages need what `needs` says of how many settings differ from `options`, at any size."""

    device, weights = torch.device("meta"), 100

    def __init__(self, needs, options, encodes=False):
        self.needs, self.options, self.encodes, self.tried = needs, options, encodes, []

    def peak(self, stage, height, width, options):
        assert isinstance(options, Options)
        changed = {name: value for name, value in vars(options).items() if value != getattr(self.options, name)}
        if stage == "step":
            self.tried.append(changed)
        return self.needs[stage](changed)

    def estimate(self, height, width, options):
        stages = (self.peak(stage, height, width, options) for stage in ("step", "encode", "decode"))
        return MemoryEstimate(self.weights, *stages, self.encodes)


def fewer(settings):
    return 50 - 10 * len(settings)


def least(settings):
    return 5


def test_savers_are_added_one_by_one_until_every_stage_fits():
    options = Options()
    estimator = Invented({"step": fewer, "encode": fewer, "decode": least}, options)
    plan = Planner(estimator, 130, options, frozenset()).plan(64, 64)
    assert plan.settings == {"unet_serial": True, "unet_offload": True}
    # The first: whether anything fits. The last: what is said of the plan.
    assert estimator.tried[1:-1] == [{}, {"unet_serial": True}, plan.settings]
    assert plan.estimate.unet == 30
    assert options == Options(), "settings go into options of their own"


@pytest.mark.parametrize("encodes", [False, True])
def test_what_an_encoder_needs_counts_where_the_pipeline_encodes(encodes):
    estimator = Invented({"step": least, "encode": fewer, "decode": least}, Options(), encodes)
    plan = Planner(estimator, 130, Options(), frozenset()).plan(64, 64)
    assert plan.settings == ({"vae_offload": True, "vae_attn": "blocked"} if encodes else {})


def test_what_was_given_is_kept():
    options = Options(unet_strip_rows=8, vae_mode="exact", vae_recompute=False)
    estimator = Invented({"step": least, "encode": least, "decode": least}, options)
    found = Planner(estimator, 2**40, options, frozenset({"unet_strip_rows", "vae_mode", "vae_recompute"}))
    assert found.denoiser == [{}, {"unet_serial": True}, {"unet_serial": True, "unet_offload": True}]
    assert found.vae[1] == {"vae_offload": True} and found.vae[-1] == {"vae_offload": True, "vae_chunk_size_y": 16}


def test_every_saver_is_an_option():
    for ladder in (planner.DENOISER_SAVERS, *planner.VAE_SAVERS.values()):
        assert {name for saver in ladder for name in saver} <= vars(Options()).keys()


@pytest.mark.parametrize("vae_mode", ["two-pass", "exact"])
def test_only_what_can_leave_the_device_is_tried_to(pipe, vae_mode):
    def tried():
        estimator = LargeResPatch(pipe, 64, 64)._estimator(bare)
        found = Planner(estimator, 2**40, Options(vae_mode=vae_mode), frozenset())
        return {name for settings in found.denoiser + found.vae for name in settings if name.endswith("_offload")}

    assert tried() == set()
    for model in (pipe.unet, pipe.vae):
        model.to("meta")
    assert tried() == {"unet_offload", "vae_offload"}


def test_where_nothing_fits_the_error_says_what_does(pipe, monkeypatch):
    monkeypatch.setattr(planner, "DENOISER_SAVERS", ())
    monkeypatch.setitem(planner.VAE_SAVERS, "two-pass", ({"vae_chunk_size_x": 32, "vae_chunk_size_y": 32},))
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
        ("1KiB", ValueError, r"more than the weights on cpu, which take 1\.\d\d MiB; got '1KiB'"),
        ("auto", ValueError, "'auto' needs a pipeline on a device that reports its free memory, this one is on cpu"),
    ],
)
def test_limits_that_are_none(pipe, limit, error, message):
    with pytest.raises(error, match=f"memory_limit .*{message}"):
        LargeResPatch(pipe, 64, 64, memory_limit=limit)


def test_auto_is_what_the_device_has_free_less_a_margin(pipe, monkeypatch):
    monkeypatch.setattr(planner, "free_bytes", lambda device: 100 * MIB)
    weights = LargeResPatch(pipe, 64, 64).estimate().weights
    assert limit_bytes("auto", pipe) == 95 * MIB + weights
    said = f"memory_limit of {gibibytes(95 * MIB + weights)}: no saver needed"
    assert said in repr(LargeResPatch(pipe, 64, 64, memory_limit="auto"))


def test_free_bytes_count_what_torch_has_in_its_cache(monkeypatch):
    class Backend:
        mem_get_info = staticmethod(lambda device: (1000, 5000))
        memory_reserved = staticmethod(lambda device: 300)
        memory_allocated = staticmethod(lambda device: 100)

    monkeypatch.setattr(torch, "cuda", Backend)
    assert free_bytes(torch.device("cuda")) == 1200
    assert free_bytes(torch.device("cpu")) is None
