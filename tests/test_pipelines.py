"""Whole pipelines on tiny random-weight models, all that are listed in `family`.

Each is compared with itself unpatched where nothing needs blocking (equal), and run at a size where attention, feed-
forward and VAE are all blocked (the patched path runs, the picture stays the picture, everything is restored).
The outcomes of the first three tests are the table of pipelines: `examples/benchmarks/pipeline_table.py`.
"""

from functools import cache

import pytest
import torch

from conftest import quiet
from family import CASES, SIZE, TEXT, run
from largerespatch import LargeResPatch
from largerespatch.techniques.attention import BlockedAttention
from largerespatch.techniques.chunks import Attended, ChunkedFeedForward
from largerespatch.techniques.halves import Exact
from largerespatch.techniques.two_pass import TwoPass
from test_patch import SMALL, fingerprint


@cache
def build(case):
    """The pipeline of a case, and what it makes unpatched: shared, since every test leaves it as it was."""
    pipe = quiet(CASES[case].build())
    with torch.no_grad():
        return pipe, run(pipe, CASES[case].arguments)


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

    counting("attention", BlockedAttention, "_attending")
    counting("feed-forward", ChunkedFeedForward, "__call__", lambda self, x: x.shape[:-1].numel() > self.chunk_size)
    counting("feed-forward", Attended, "__call__", lambda self, x: self.result is not None)
    counting("vae", TwoPass, "_run_tiled")
    counting("vae", Exact, "_run")
    return counts


def cut(calls):
    return {kind for kind, count in calls.items() if count}


@pytest.mark.parametrize("case", CASES)
def test_where_nothing_needs_blocking_the_result_is_the_unpatched_one(case, calls):
    pipe, expected = build(case)
    with LargeResPatch(pipe, SIZE, SIZE):
        assert torch.equal(run(pipe, CASES[case].arguments), expected)
    assert not cut(calls)


def state(pipe):
    """All but what autoencoders of films put into themselves in every call: frames of theirs that came before."""
    own = ("_conv_num", "_conv_idx", "_feat_map")
    return {
        place: (kind, [each for each in attributes if not each[0].endswith(own)], *others)
        for place, (kind, attributes, *others) in fingerprint(pipe).items()
    }


@pytest.mark.parametrize("case", CASES)
def test_all_is_blocked_and_restored(case, calls):
    pipe, expected = build(case)
    before = state(pipe)
    with LargeResPatch(pipe, SIZE, SIZE, **SMALL):
        patched = run(pipe, CASES[case].arguments)
    assert cut(calls) & CASES[case].about == CASES[case].cuts
    assert state(pipe) == before
    assert patched.shape == expected.shape
    assert patched.isfinite().all()
    assert not torch.equal(patched, expected)
    assert torch.equal(run(pipe, CASES[case].arguments), expected)


EXACT = {"ff_chunk_size": 23, "vae_mode": "exact", "vae_chunk_size_x": 5, "vae_chunk_size_y": 5}
EXACT |= {"unet_serial": True, "unet_strip_rows": 3, "unet_offload": True}


@pytest.mark.filterwarnings("ignore:unet_serial. PAG:RuntimeWarning")
@pytest.mark.parametrize("case", CASES)
def test_what_is_exact_gives_the_unpatched_result(case, calls):
    """Every exact option at once; they differ by rounding alone, which steps and tiny models amplify."""
    pipe, expected = build(case)
    with LargeResPatch(pipe, SIZE, SIZE, **EXACT):
        torch.testing.assert_close(run(pipe, CASES[case].arguments), expected, rtol=0, atol=2e-3)
    assert cut(calls) & CASES[case].about == CASES[case].cuts - {"attention"}


def test_the_xl_vae_runs_upcast_and_comes_back_in_half_precision(calls):
    pipe = quiet(CASES["Stable Diffusion XL: text-to-image"].build())
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
    build_pipe, arguments, _ = CASES["Stable Diffusion: image-to-image"]
    pipe = build_pipe()
    pipe.set_progress_bar_config(disable=False)
    with LargeResPatch(pipe, SIZE, SIZE, **SMALL):
        run(pipe, arguments)
        shown = capsys.readouterr().err
        assert "VAE encoder: 100%" in shown
        assert "VAE decoder: 100%" in shown
        quiet(pipe)
        run(pipe, arguments)
    assert capsys.readouterr() == ("", "")
