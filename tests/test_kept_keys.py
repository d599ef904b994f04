"""Of vast maps means over cells of four tokens are kept, and attended to as these would be."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from family import noise
from largerespatch.core.tilings import bricks, tiles
from largerespatch.techniques.joint import kept_keys
from largerespatch.techniques.joint.joining import Attending
from largerespatch.techniques.joint.kept_keys import KeptMaps
from largerespatch.techniques.joint.key_source import by_tiles
from largerespatch.techniques.joint.pooled import PooledMap
from largerespatch.techniques.joint.tokens import Maps

SIDES = st.tuples(st.integers(1, 13), st.integers(1, 13))


@pytest.fixture
def vast(monkeypatch):
    """Maps with as many tokens as their context has keys are."""
    monkeypatch.setattr(kept_keys, "VAST", 1)


def means_of(tokens, size):
    """Over cells of 2x2 tokens ``[B, heads, n, C]`` of a map, one by one."""
    plane = tokens.unflatten(2, size)
    rows = [
        torch.stack([plane[:, :, y : y + 2, x : x + 2].mean(dim=(2, 3)) for x in range(0, size[1], 2)], dim=2)
        for y in range(0, size[0], 2)
    ]
    return torch.cat(rows, dim=2)


@given(SIDES, st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(0, 3), st.integers(0, 3))
def test_what_is_kept_of_pieces_is_what_is_kept_of_all(size, tile, phase, first):
    """Wherever tiles meet, and whatever comes before a map's tokens and after them; of a small map all."""
    maps = Maps([size, (1, 2)])
    kept = KeptMaps(maps, max(size[0] * size[1] // kept_keys.VAST, 3))
    kept.levels = [1, 0]
    kept.sizes = Maps([(-(-size[0] // 2), -(-size[1] // 2)), (1, 2)])
    tokens = noise(2, 3, first + maps.area + 4, 5)
    image = tokens[:, :, first : first + maps.area]
    expected = torch.cat([means_of(image[:, :, :-2], size), image[:, :, -2:]], dim=2)
    whole = kept.of(tokens, first)
    torch.testing.assert_close(whole[:, :, first:-4], expected)
    assert torch.equal(whole[:, :, :first], tokens[:, :, :first])
    assert torch.equal(whole[:, :, -4:], tokens[:, :, -4:])
    by_piece = kept.empty(tokens, others=0)
    for each in map(maps.piece, tiles(*size, phase, *tile)):
        kept.put(by_piece, each, image[:, :, maps.places(each, torch.device("cpu"))])
    torch.testing.assert_close(by_piece, expected)
    counts = kept.log_counts(torch.device("cpu")).exp()
    assert counts.sum().item() == pytest.approx(maps.area)
    torch.testing.assert_close((counts[:, None] * expected).sum(dim=2), image.sum(dim=2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("context", "levels"), [(0, [0, 0]), (10, [1, 0]), (11, [0, 0])])
def test_a_map_is_vast_for_a_small_context_alone(context, levels):
    kept = KeptMaps(Maps([(32, 20), (4, 5)]), context)
    assert kept.levels == levels
    assert list(kept.sizes) == [(16, 10) if levels[0] else (32, 20), (4, 5)]
    assert (kept.log_counts(torch.device("cpu")) is None) == (not any(levels))


@given(SIDES, st.integers(0, 40), st.data())
def test_what_is_chosen_of_cells_stands_for_each_token_outside_the_tile_once(size, count, data):
    tile = data.draw(st.sampled_from(list(tiles(*size, 0, 4, 3))))
    cells = -(-size[0] // 2) * -(-size[1] // 2)
    pooled = PooledMap(noise(2, 3, cells + 5, 4), noise(2, 3, cells + 5, 6), size, count, start=5, finest=1)
    found = pooled.chosen(tile, torch.zeros(2, 3, 7, 4), torch.zeros(2, 3, 7, 1))
    weights = torch.cat([each.log_weights for each in found], dim=2)
    assert weights.shape[2] <= max(count, 1)
    outside = torch.full((2, 3), float(size[0] * size[1] - tile.area))
    torch.testing.assert_close(weights.exp().sum(dim=-1), outside, rtol=1e-4, atol=1e-4)


def masked(kind, text, image, text_first):
    """A mask that hides the text's last key."""
    if kind == "none":
        return None
    seen = torch.ones(1, 1, 1, text + image, dtype=torch.bool)
    seen[..., text - 1 if text_first else -1] = False
    return seen if kind == "of truths" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


@pytest.mark.parametrize("mask", ["none", "of truths", "added"])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("shared", [1, 2])
def test_where_tokens_of_a_cell_are_alike_a_vast_map_is_attended_as_dense(vast, mask, text_first, shared):
    """By tiles that cut through cells, and by the text; with references, and keys that heads share."""
    maps, text, heads = Maps([(12, 10), (8, 12)]), 5, 2
    keys, values = (
        torch.cat(
            [F.interpolate(noise(2 * heads, 6, h // 2, w // 2, seed=seed), (h, w)).flatten(2) for h, w in maps], -1
        )
        .view(2, heads, 6, maps.area)
        .transpose(2, 3)
        for seed in (1, 2)
    )
    order = (lambda words, image: [words, image]) if text_first else (lambda words, image: [image, words])
    keys, values = (torch.cat(order(noise(2, heads, text, 6, seed=7), each), dim=2) for each in (keys, values))
    first = text if text_first else 0
    image = slice(first, first + maps.area)
    given = {"query": 2 * noise(2, heads * shared, text + maps.area, 6, seed=3), "key": keys, "value": values}
    given |= {"attn_mask": masked(mask, text, maps.area, text_first), "enable_gqa": True}
    call = Attending(F.scaled_dot_product_attention, given, image, image)
    expected = F.scaled_dot_product_attention(**given)
    result = call.nothing()
    pieces = [maps.piece(tile) for tile in bricks(*maps[0], 1, 5, 3)]

    def place(piece):
        return slice(None), slice(None), maps.places(piece, torch.device("cpu")) + first

    words = by_tiles(
        call,
        keys,
        values,
        maps,
        60,
        pieces,
        read=lambda some: (given["query"][place(piece)] for piece in some),
        place=place,
        into=result,
    )
    assert KeptMaps(maps, 60).levels == [1, 1]
    torch.testing.assert_close(words, expected[:, :, call.text], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result[:, :, image], expected[:, :, image], rtol=1e-4, atol=1e-5)
