"""What is asked of all pipelines that are listed: `examples/benchmarks/pipeline_table.py` makes a table of it.

Each is compared with itself unpatched where nothing needs blocking (equal), and run at a size where all that its family
says is cut up (the patched path runs, the picture stays the picture, everything is restored).
"""

import gc
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from waits import waits

from conftest import quiet
from family import CASES, ONE_STEP, SIZE, run
from largerespatch import LargeResPatch
from largerespatch.techniques.attention.blocked import BlockedAttention
from largerespatch.techniques.chunks import Attended, ChunkedFeedForward
from largerespatch.techniques.joint.one_call import OneCall
from largerespatch.techniques.vae.halves import Exact
from largerespatch.techniques.vae.two_pass import TwoPass
from test_patch import SMALL, fingerprint

EXACT = {"ff_chunk_size": 23, "vae_mode": "exact", "vae_chunk_size_x": 7, "vae_chunk_size_y": 7}
EXACT |= {"unet_serial": True, "unet_strip_rows": 5, "unet_offload": True}

_drawn = {}  # by case: shared, since every test leaves its pipeline as it was


def transformers():
    """What is asked of each family of transformers in which text and image attend to one another."""
    rooms = sorted(path for path in Path(__file__).parent.glob("test_*.py") if "(JointTests)" in path.read_text())
    kinds = [kind for path in rooms for kind in vars(import_module(path.stem)).values() if hasattr(kind, "family")]
    return list(dict.fromkeys(kind for kind in kinds if hasattr(kind, "cases")))


def listed():
    """The names of all pipelines that are asked, by their families."""
    return {f"{kind.family}: {name}" for kind in transformers() for name in kind.cases} | set(CASES)


def cut(calls):
    return {kind for kind, count in calls.items() if count}


@pytest.mark.filterwarnings("ignore:SanaTransformer2DModel is a denoiser of no known kind:RuntimeWarning")
class TableTests:
    """`cases` of pipelines by family and name; `size` in sample pixels, at which `blocks` cut all up.

    `waits` are what a step waits for on an accelerator, see `waits.waits`.
    """

    cases: ClassVar[dict[str, Any]]
    size: ClassVar = (SIZE, SIZE)
    blocks: ClassVar = SMALL
    waits: ClassVar[set[str]] = set()

    def draw(self, pipe, case):
        return run(pipe, ONE_STEP | case.arguments)

    @pytest.fixture
    def drawn(self, case):
        """The pipeline and what it makes unpatched."""
        if id(case) not in _drawn:
            pipe = quiet(case.build())
            _drawn[id(case)] = pipe, self.draw(pipe, case)
            gc.freeze()  # it stays, so it need not be searched for garbage
        return _drawn[id(case)]

    @pytest.fixture
    def calls(self, monkeypatch):
        """How often each kind of replacement really cut something up."""
        counts = dict.fromkeys(("attention", "feed-forward", "vae"), 0)

        def counting(kind, target, method, cuts=lambda *args: True):
            real = getattr(target, method)

            def wrapper(this, *args, **kwargs):
                counts[kind] += cuts(this, *args)
                return real(this, *args, **kwargs)

            monkeypatch.setattr(target, method, wrapper)

        counting("attention", BlockedAttention, "_attending")
        counting("attention", OneCall, "run")
        counting(
            "feed-forward", ChunkedFeedForward, "__call__", lambda this, _, x: x.shape[:-1].numel() > this.chunk_size
        )
        counting("feed-forward", Attended, "__call__", lambda this, *_: this.result is not None)
        counting("vae", TwoPass, "_run_tiled")
        counting("vae", Exact, "_run")
        return counts

    def test_where_nothing_needs_blocking_the_result_is_the_unpatched_one(self, case, drawn, calls):
        pipe, expected = drawn
        with LargeResPatch(pipe, *self.size):
            assert torch.equal(self.draw(pipe, case), expected)
        assert not cut(calls)

    def test_all_is_blocked_and_restored(self, case, drawn, calls):
        pipe, expected = drawn
        before = fingerprint(pipe)
        with LargeResPatch(pipe, *self.size, **self.blocks):
            patched = self.draw(pipe, case)
        after = fingerprint(pipe)
        assert cut(calls) == case.cuts
        assert patched.shape == expected.shape
        assert patched.isfinite().all()
        assert not torch.equal(patched, expected)
        assert torch.equal(self.draw(pipe, case), expected)
        kept = {key for key, each in fingerprint(pipe).items() if each == after[key]}  # not what calls change anyway
        assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
        assert len(kept) >= len(before) - 1

    def test_a_step_is_known_and_waits_for_no_device(self, case):
        """As an estimate has it, which is what picks the settings on an accelerator."""
        options = self.blocks | {"attn_context": 24}  # fewer tokens than there are
        assert set(waits(quiet(case.build()), "step", *self.size, **options)) == self.waits

    @pytest.mark.filterwarnings("ignore:unet_serial. PAG:RuntimeWarning")
    def test_what_is_exact_gives_the_unpatched_result(self, case, drawn, calls):
        """Every exact option at once; they differ by rounding alone, which steps and tiny models amplify."""
        pipe, expected = drawn
        with LargeResPatch(pipe, *self.size, **EXACT):
            torch.testing.assert_close(self.draw(pipe, case), expected, rtol=0, atol=2e-3)
        assert cut(calls) == case.cuts - {"attention"}
