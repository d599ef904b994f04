"""What holds of every joint-attention transformer whose blocks run tile by tile. A family's test inherits it."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from table import TableTests
from torch.utils._pytree import tree_leaves
from waits import waits

from conftest import quiet
from family import ONE_STEP, noise
from largerespatch import LargeResPatch
from largerespatch.core.calls import held
from largerespatch.core.families import family_of
from largerespatch.core.patching import PatchStack
from largerespatch.memory.counting import LiveBytes
from largerespatch.memory.estimate import bare
from largerespatch.techniques.attention.blocked import Blocking
from largerespatch.techniques.joint import kept_keys
from test_patch import fingerprint

# 9 by 11 tokens of 16 sample pixels, neither of which tiles of 4 divide.
HEIGHT, WIDTH = 144, 176
TOKENS = 99
TILES = {"attn_slice_x": 4, "attn_slice_y": 4, "attn_full_tokens": 64}
ALL = 10**4  # more tokens than there are
CLOSE = 1e-4  # of the largest value: rounding in float32, in another order


class Case(NamedTuple):
    """How to build a pipeline, what to call it with besides a size, and what is cut up where everything is."""

    build: Callable[[], Any]
    arguments: dict[str, Any]
    cuts: frozenset[str] = frozenset({"attention", "vae"})


def paint(pipe, arguments, **changes):
    """Latents; on two steps, since only from the second one on is the phase another."""
    generator = torch.Generator().manual_seed(0)
    options = {"width": WIDTH, "height": HEIGHT, "num_inference_steps": 2, "output_type": "latent"}
    return pipe(**options | {"generator": generator} | arguments | changes)[0]


def patch(pipe, **changes):
    return LargeResPatch(pipe, WIDTH, HEIGHT, **TILES | changes)


def error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def strayed(pipe, block, arguments):
    """How far behind a block of one stream each token is from what it is unpatched, without any context: ``[N]``."""
    behind = []
    handle = block.register_forward_hook(lambda module, given, result: behind.append(result[0]))
    paint(pipe, arguments, num_inference_steps=1)
    with patch(pipe, attn_context=0):
        paint(pipe, arguments, num_inference_steps=1)
    handle.remove()
    dense, blocked = behind[0], behind[len(behind) // 2]
    return (blocked - dense).abs().amax(dim=-1) / dense.abs().max()


def embeds(width, pooled=None, tokens=5, batch=1, seed=5, negative=False):
    """Prompts, told as most of these pipelines want them."""
    prefix = "negative_" if negative else ""
    told = {f"{prefix}prompt_embeds": noise(batch, tokens, width, seed=seed)}
    if pooled is not None:
        told[f"{prefix}pooled_prompt_embeds"] = noise(batch, pooled, seed=seed + 1)
    return told


class JointTests(TableTests):
    """`cases` are all ways in which pipelines call the model, the plainest first; `family` is what the model is called.

    `prompt` are arguments for it with as many tokens of text as its pipeline makes of a prompt.
    """

    family: ClassVar[str]
    cases: ClassVar[dict[str, Case]]
    prompt: ClassVar[dict[str, Any]] = {}
    size = (WIDTH, HEIGHT)
    blocks: ClassVar = TILES | {"vae_chunk_size_x": 12, "vae_chunk_size_y": 12}

    def draw(self, pipe, case):
        return torch.as_tensor(paint(pipe, ONE_STEP | case.arguments, output_type="pt"))

    @pytest.fixture
    def plain(self):
        case = next(iter(self.cases.values()))
        return quiet(case.build()), case.arguments

    def test_with_enough_context_blocks_are_dense(self, case, calls):
        pipe = quiet(case.build())
        dense = paint(pipe, case.arguments)
        with patch(pipe, attn_context=ALL):
            assert error(paint(pipe, case.arguments), dense) < CLOSE
        assert calls["attention"]  # so there were blocks

    def test_a_vast_map_waits_for_no_device(self, plain, monkeypatch):
        monkeypatch.setattr(kept_keys, "VAST", 1)
        assert set(waits(plain[0], "step", *self.size, **self.blocks | {"attn_context": 24})) == self.waits

    def test_some_context_is_better_than_none(self, plain):
        pipe, arguments = plain[0], ONE_STEP | plain[1]
        dense = paint(pipe, arguments)
        with patch(pipe, attn_context=0):
            alone = error(paint(pipe, arguments), dense)
        assert alone > 10 * CLOSE
        with patch(pipe, attn_context=64, attn_shape="tile"):
            assert error(paint(pipe, arguments), dense) < alone

    def test_what_needs_no_blocks_stays_bit_for_bit(self, plain):
        pipe, arguments = plain
        dense = paint(pipe, arguments)
        for changes in ({"attn_full_tokens": TOKENS}, {"attn_slice_x": 16, "attn_slice_y": 16}):
            with patch(pipe, **changes):
                assert torch.equal(paint(pipe, arguments), dense)

    def test_the_picture_follows_from_the_seed_alone(self, plain):
        pipe, arguments = plain
        with patch(pipe, attn_context=24):
            first = paint(pipe, arguments, num_inference_steps=1)
            paint(pipe, arguments, width=WIDTH + 32, num_inference_steps=1)
            assert torch.equal(paint(pipe, arguments, num_inference_steps=1), first)

    def test_a_size_other_than_the_patchs(self, plain):
        pipe, arguments = plain
        dense = paint(pipe, arguments, width=208, height=112)
        with patch(pipe, attn_context=ALL):
            assert error(paint(pipe, arguments, width=208, height=112), dense) < CLOSE

    def test_nothing_is_left_behind(self, plain):
        pipe, arguments = plain
        dense, before = paint(pipe, arguments), fingerprint(pipe)
        with patch(pipe) as active:
            assert fingerprint(pipe) != before
            assert "transformer blocks in bricks of 8x4 and 4x8 tokens with 3072 of context" in repr(active)
            paint(pipe, arguments)
        assert fingerprint(pipe) == before
        assert torch.equal(paint(pipe, arguments), dense)

    def test_steps_are_told_apart(self, plain, monkeypatch):
        """So all edges between tiles are moved about, whatever the unit that the model is told its time in."""
        pipe, arguments = plain
        phases, cover = [], Blocking.cover

        def look(blocking, height, width, phase):
            phases.append(phase)
            return cover(blocking, height, width, phase)

        monkeypatch.setattr(Blocking, "cover", look)
        with patch(pipe):
            paint(pipe, arguments, num_inference_steps=4)
        calls = len(phases) // 4
        steps = [phases[i * calls : (i + 1) * calls] for i in range(4)]
        assert [[(phase + 1) % 4 for phase in step] for step in steps[:-1]] == steps[1:]

    def test_what_keys_do_not_depend_on_runs_once(self, plain):
        """In the walk that finds them it does not."""
        pipe, arguments = plain
        runs = Counter()

        def count(key, original, *args, **kwargs):
            runs[key] += 1
            return original(*args, **kwargs)

        kinds = family_of(pipe.transformer).kinds(pipe.transformer)
        blocks = [
            (path, block, (*getattr(tokens, "idle", ()), *getattr(tokens, "asking", ())))
            for path, tokens in kinds.items()
            for block in pipe.transformer.get_submodule(path)
        ]
        with PatchStack() as stack:
            for path, block, _ in blocks:
                for name, module in block.named_modules():
                    if isinstance(module, torch.nn.Linear):
                        stack.wrap(module, "forward", partial(count, (id(block), name)), f"{path}.{name}.forward")
            with patch(pipe):
                paint(pipe, arguments, num_inference_steps=1)
        for _, block, idle in blocks:
            found = {name: runs for (of, name), runs in runs.items() if of == id(block)}
            twice = {name for name, runs in found.items() if runs == max(found.values())}
            assert twice and not twice & set(idle)
            for name in set(idle) & set(found):
                assert 2 * found[name] == max(found.values())

    def test_what_others_keep_stays_as_it_was(self, plain):
        pipe, arguments = plain
        kept = []

        def keep(block, args, kwargs, result):
            tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
            kept.extend((each, each.clone()) for each in tensors)

        def painted():
            with patch(pipe, attn_context=24):
                return paint(pipe, arguments, num_inference_steps=1)

        alone = painted()
        blocks = [block for block in pipe.transformer.modules() if type(block).__name__.endswith("Block")]
        handles = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks]
        assert torch.equal(painted(), alone)
        assert kept and all(torch.equal(tensor, as_it_was) for tensor, as_it_was in kept)
        for handle in handles:
            handle.remove()
        assert torch.equal(painted(), alone)

    def test_memory_is_told_and_grows_less(self, plain):
        pipe, _ = plain
        blocked = LargeResPatch(pipe, 1024, 1024, attn_slice_x=8, attn_slice_y=8, attn_full_tokens=64, attn_context=64)
        step, dense = (blocked._estimator(way).peak("step", 1024, 1024, blocked.options) for way in (blocked._on, bare))
        assert 0 < step < dense

    def test_the_estimate_of_a_step_is_what_a_real_one_holds(self, plain):
        pipe, arguments = plain
        changes = {"attn_slice_x": 8, "attn_slice_y": 8, "attn_full_tokens": 64, "attn_context": 64}
        patch = LargeResPatch(pipe, 384, 320, **changes)
        with patch, LiveBytes("cpu") as count:
            paint(pipe, arguments | self.prompt, width=384, height=320, num_inference_steps=1)
        pictures = sum(each.nbytes for each in held(pipe, 320, 384))  # that might have been given
        estimated, real = patch.estimate().step, count.peak + pictures
        assert abs(estimated - real) < 0.1 * count.peak
