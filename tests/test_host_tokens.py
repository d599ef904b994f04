"""A transformer whose tokens are on the host is the transformer, and its tokens come tile by tile."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import in_pairs

import streams
import tiny
from calls import UNETS, assert_same, noise, text
from largerespatch.core.families import family_of, install
from largerespatch.core.hosts import Host
from largerespatch.core.maps import StoredMap
from largerespatch.core.patching import PatchStack
from largerespatch.core.tilings import Runs, Tile, bricks
from largerespatch.core.tokens import JoinedTokens, TokenMap, picked, runs_of
from largerespatch.denoisers import unet as unets
from largerespatch.options import Options
from largerespatch.techniques.attention import host_tokens

SMALL = {"attn_slice_x": 3, "attn_slice_y": 3, "attn_full_tokens": 12, "attn_context": 16, "ff_chunk_size": 7}


def elsewhere(least=0):
    """The host of a device that shares its memory: "cpu:0" is another name of it, which a tensor's device never has."""
    return Host("cpu:0", band_bytes=1500, least=least)


@contextmanager
def patched(model, host=None, **options):
    """As a pipeline's U-Net is; with its maps on a host, if that is given."""
    pipe = SimpleNamespace(components={"unet": model}, scheduler=None, vae_scale_factor=8)
    options = SMALL | options | ({} if host is None else {"unet_offload": "maps", "unet_strip_rows": 4})
    with mock.patch.object(unets, "Host", lambda least: host), PatchStack() as stack:
        install(stack, family_of(model).sites(model, "unet", Options(**options), pipe))
        yield


@pytest.fixture
def tiled(monkeypatch):
    """Notes of each block that was given tokens on the host whether it ran tile by tile."""
    notes, call = [], host_tokens.TiledBlock.__call__

    def noting(self, original, tokens, *args, **kwargs):
        result = call(self, original, tokens, *args, **kwargs)
        notes.append(isinstance(result, TokenMap))
        return result

    monkeypatch.setattr(host_tokens.TiledBlock, "__call__", noting)
    return notes


@in_pairs({"case": UNETS, "batch, height, width": [(3, 9, 7), (1, 14, 14)], "shape": ["brick", "tile"]})
def test_a_unet_whose_tokens_are_on_the_host_is_the_unet(case, batch, height, width, shape, tiled):
    build, arguments = UNETS[case]
    model, sample = build(), noise(batch, 4, height, width)
    with patched(model, attn_shape=shape):
        expected = model(sample, **arguments(batch, height, width)).sample
    with patched(model, elsewhere(), attn_shape=shape):
        actual = model(sample, **arguments(batch, height, width)).sample
    assert type(actual) is torch.Tensor
    assert_same(actual, expected)
    assert any(tiled) == (case not in ("GLIGEN", "IP-Adapters, masks as a tensor", "IP-Adapters, masks as a list"))


@settings(max_examples=16)
@given(
    st.sampled_from(["SD", "XL"]),
    st.integers(1, 3),
    st.integers(2, 17),
    st.integers(2, 9),
    st.sampled_from([0, 9, 400]),
    st.sampled_from(["constant", "circular", "replicate"]),
    st.booleans(),
    st.sampled_from([0, 2000]),
)
def test_it_is_for_any_size_context_and_padding(case, batch, height, width, context, mode, serial, least):
    build, arguments = UNETS[case]
    model, sample = build(), noise(batch, 4, height, width)
    options = {"attn_context": context, "padding_mode": mode, "unet_serial": serial}
    arguments = arguments(batch, height, width)
    with patched(model, **options):
        expected = model(sample, **arguments).sample
    with patched(model, elsewhere(least), **options):
        assert_same(model(sample, **arguments).sample, expected)


def test_with_all_tokens_as_context_it_is_dense_attention():
    model, sample = tiny.unet(), noise(2, 4, 9, 7)
    expected = model(sample, **text(2)).sample
    with patched(model, elsewhere(), attn_context=2 * 63):
        assert_same(model(sample, **text(2)).sample, expected)


def test_what_a_hook_keeps_of_tokens_stays_right():
    model, sample, kept = tiny.unet(**tiny.XL_UNET | {"sample_size": 8}), noise(2, 4, 18, 14), []
    arguments = UNETS["XL"][1](2, 18, 14)
    model.down_blocks[1].attentions[0].transformer_blocks[0].register_forward_hook(lambda *call: kept.append(call[-1]))
    with patched(model):
        model(sample, **arguments)
    with patched(model, elsewhere()):
        model(sample, **arguments)
    expected, actual = kept
    assert isinstance(actual, TokenMap)
    assert_same(actual + 0, expected)


@pytest.mark.parametrize(("shape", "serial"), [("brick", False), ("tile", True)])
def test_copies_on_streams_of_their_own_are_waited_for(shape, serial):
    """As on CUDA, on streams that are played."""
    model, sample, host = tiny.unet(), noise(2, 4, 9, 6), elsewhere()
    options = {"attn_shape": shape, "unet_serial": serial}
    with patched(model, **options):
        expected = model(sample, **text(2)).sample
    with streams.play(host) as watch, patched(model, host, **options):
        for _ in range(2):
            assert_same(model(sample, **text(2)).sample, expected)
    assert [stream.total > 100 for stream in watch.sides] == [True, True]
    assert watch.sound()


# --- maps of tokens ----------------------------------------------------------------------------------------------


def tokens_of(plane, host=None):
    made = StoredMap.of(plane.clone(), host)
    if host is not None:
        made.leave()
    return TokenMap.of(made)


HOSTS = pytest.mark.parametrize("host", [None, elsewhere()], ids=["here", "there"])
PLANE = torch.randn(2, 3, 11, 7, generator=torch.Generator().manual_seed(0))
TOKENS = PLANE.flatten(2).transpose(1, 2)


@HOSTS
def test_tokens_are_the_cells_row_after_row(host):
    made = tokens_of(PLANE, host)
    assert made.shape == TOKENS.shape and made.map_size == (11, 7) and made.away == (host is not None)
    assert torch.equal(made * 1, TOKENS)
    assert torch.equal(made[:, 5:9], TOKENS[:, 5:9])
    assert torch.equal(tokens_of(PLANE, host)[:, :, 1:2], TOKENS[:, :, 1:2])
    assert torch.equal(torch.cat([tokens_of(PLANE, host), TOKENS], dim=1), torch.cat([TOKENS, TOKENS], dim=1))


@HOSTS
@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 80))
def test_tokens_are_read_in_tiles_and_runs(host, phase, slice_y, slice_x, length):
    made, cells = tokens_of(PLANE, host), TOKENS.view(2, 11, 7, 3)
    cover = bricks(11, 7, phase, slice_y, slice_x)
    for tile, block in zip(cover, made.tiles(cover), strict=True):
        assert torch.equal(block, cells[:, tile.rows, tile.columns].flatten(1, 2))
    runs = Runs(77, length)
    for each in (made, TOKENS):
        assert torch.equal(torch.cat(list(runs_of(each, runs)), dim=1), TOKENS)


@HOSTS
def test_single_tokens_are_picked_for_each_sample(host):
    places = torch.randint(77, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = torch.stack([TOKENS[i, places[i]] for i in range(2)])
    assert torch.equal(picked(tokens_of(PLANE, host), places), expected)
    assert torch.equal(picked(TOKENS, places), expected)


def test_tokens_in_bands_of_pinned_memory_are_picked_when_they_have_arrived():
    host = Host("cpu:0", band_bytes=300)
    with streams.play(host) as watch:
        stored = StoredMap.empty(PLANE.shape, PLANE, host)
        assert len(stored.memory.bands) > 3
        for top in range(11):
            stored[:, :, top : top + 1] = PLANE[:, :, top : top + 1]  # under way
        places = torch.tensor([[0, 76, 40, 41], [76, 3, 3, 20]])
        assert torch.equal(TokenMap.of(stored).picked(places), TOKENS.gather(1, places[..., None].expand(-1, -1, 3)))
        tile = Tile(2, 1, 9, 4)
        for block in TokenMap.of(stored).tiles([tile]):
            assert torch.equal(block, TOKENS.view(2, 11, 7, 3)[:, tile.rows, tile.columns].flatten(1, 2))
        stored[:, :, 3:8, 2:6] = 0 * PLANE[:, :, 3:8, 2:6]
        for part in (stored[:1], stored[1:]):
            assert not part[:, :, 3:8].flatten(0, 1)[..., 2:6].any()
            assert part[:, :, 8:].any()
        assert watch.sound()


# --- tokens of several parts -------------------------------------------------------------------------------------


def joined(host, before=2, after=1):
    """Of other tokens, those of a map, and others."""
    first, last = TOKENS[:, :before] + 1, TOKENS[:, :after] + 2
    return torch.cat([first, tokens_of(PLANE, host), last], dim=1), torch.cat([first, TOKENS, last], dim=1)


def test_tokens_that_are_joined_to_others_stay_where_they_are():
    host = elsewhere()
    tokens, expected = joined(host)
    assert isinstance(tokens, JoinedTokens) and tokens.away and tokens.shape == expected.shape
    assert isinstance(tokens[:, 2:79], TokenMap) and torch.equal(tokens[:, 2:79, ...] + 0, TOKENS)
    assert torch.equal(tokens[:, :2], expected[:, :2]) and torch.equal(tokens[:, 79:], expected[:, 79:])
    more = torch.cat([expected[:, :4], tokens], dim=1)
    assert [part.shape[1] for part in more.parts] == [4, 2, 77, 1]
    assert more[:, 6:83] is tokens.parts[1], "the very same"


def test_all_else_is_done_to_the_whole_of_joined_tokens():
    tokens, expected = joined(elsewhere())
    assert torch.equal(tokens * 2, expected * 2)
    assert torch.equal(tokens[:, 1:79], expected[:, 1:79]) and torch.equal(tokens[1:], expected[1:])
    assert torch.equal(tokens[:, 2:79, 0], expected[:, 2:79, 0])
    assert torch.equal(torch.cat([tokens, tokens], dim=0), torch.cat([expected, expected]))
    assert not tokens.away and torch.equal(tokens[:, 2:79], TOKENS), "now it is on the device"
    (run,) = runs_of(tokens.contiguous(), [(1, 50)])
    assert torch.equal(run, expected[:, 1:50])


def test_what_is_not_alike_is_not_joined():
    tokens = tokens_of(PLANE, elsewhere())
    assert type(torch.cat([tokens, TOKENS.double()], dim=1)) is torch.Tensor
    assert type(torch.cat([tokens, TOKENS], dim=2)) is torch.Tensor
    assert torch.equal(torch.cat([tokens, TOKENS], dim=2), torch.cat([TOKENS, TOKENS], dim=2))


def test_a_single_part_is_itself():
    tokens = tokens_of(PLANE, elsewhere())
    assert JoinedTokens.of([TOKENS[:, :0], tokens, TOKENS[:, :0]]) is tokens
