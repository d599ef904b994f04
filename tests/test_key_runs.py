"""Attention to a map that stays on the host is the attention to that map."""

import pytest
import torch
import torch.nn.functional as F

import tiny
from calls import noise
from largerespatch.core.hosts import Host
from largerespatch.core.maps import StoredMap
from largerespatch.core.patching import PatchStack
from largerespatch.core.tokens import TokenMap
from largerespatch.techniques.attention import chunked_attention as attention_room
from largerespatch.techniques.attention import key_runs
from largerespatch.techniques.attention.blocked import BlockedAttention, Blocking
from largerespatch.techniques.attention.chunked_attention import ChunkedAttention
from largerespatch.techniques.notes import StepNote


def on_host(values, passing=False):
    """A map that is elsewhere, though in the same memory."""
    made = StoredMap.of(values.clone(), Host("cpu:0", band_bytes=300), passing)
    made.leave()
    return made


@pytest.mark.parametrize("passing", [False, True])
@pytest.mark.parametrize(("queries", "keys", "scores"), [(30, 7, 2**25), (1000, 1000, 2**25), (17, 50, 64)])
@pytest.mark.parametrize(("height", "width"), [(12, 9), (1, 200), (200, 1)])
def test_keys_of_a_map_that_stays_on_the_host_come_in_runs(queries, keys, scores, height, width, passing, monkeypatch):
    monkeypatch.setattr(attention_room, "QUERIES", queries)
    monkeypatch.setattr(key_runs, "KEYS", keys)
    monkeypatch.setattr(key_runs, "SCORES", scores)
    attention = tiny.vae(mid_block_add_attention=True).decoder.mid_block.attentions[0]
    values = 3 * noise(2, 16, height, width) + torch.linspace(-2, 2, height)[:, None]
    expected, given = attention(values), on_host(values, passing)
    monkeypatch.setattr(StoredMap, "whole", None)  # cannot be called
    with PatchStack() as stack:
        technique = ChunkedAttention(attention)
        technique.applies = lambda *args: True
        stack.wrap(attention, "forward", technique, "attention.forward")
        actual = attention(given)
    assert isinstance(actual, StoredMap) and actual.away and actual.passing is passing
    torch.testing.assert_close(actual.copied(), expected, rtol=1e-4, atol=1e-5)
    if not passing:
        assert torch.equal(given.copied(), values)


def test_the_masses_of_runs_may_differ_by_any_order_of_magnitude():
    """Scores of hundreds: without their maximum taken off they would overflow, one after another would be lost."""
    query, key, value = (noise(1, 2, n, 8) * factor for n, factor in ((5, 40), (60, 40), (61, 1)))
    value = value[:, :, :60]
    key[:, :, :20] *= 3
    tokens = TokenMap.of(on_host(torch.arange(60.0).view(1, 1, 60, 1)))
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double())

    def project(some):
        places = some[0, :, 0].long()
        return key[:, :, places], value[:, :, places]

    for length in (1, 7, 60):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(key_runs, "KEYS", length)
            actual = key_runs.attend_in_runs(query, tokens, project)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context", [0, 16])
@pytest.mark.parametrize("passing", [False, True])
def test_blocks_of_a_map_that_stays_on_the_host_come_one_by_one(context, passing, monkeypatch):
    attention = tiny.vae().decoder.mid_block.attentions[0]
    values = noise(2, 16, 12, 9)
    given = on_host(values, passing)
    with PatchStack() as stack:
        blocked = BlockedAttention(attention, Blocking("brick", 3, 3, 20, context), StepNote(), 1)
        stack.wrap(attention, "forward", blocked, "attention.forward")
        expected = attention(values)
        monkeypatch.setattr(StoredMap, "whole", None)  # cannot be called
        actual = attention(given)
    assert isinstance(actual, StoredMap) and actual.away
    torch.testing.assert_close(actual.copied(), expected, rtol=1e-4, atol=1e-5)
    if not passing:
        assert torch.equal(given.copied(), values)


def test_the_kernel_that_tells_the_mass_is_there_and_is_asked_as_it_wants():
    """It is CUDA's; how it is called can be seen without one."""
    query, key, value = (torch.empty(2, 1, n, 512, dtype=torch.float16, device="meta") for n in (40, 70, 70))
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    mean, mass, *_ = kernel(query, key, value, None, True, scale=0.1)
    assert mean.shape == query.shape and mass.dtype == torch.float32
    assert mass.shape[:2] == (2, 1) and mass.shape[2] >= 40  # may be padded
