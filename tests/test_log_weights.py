"""Log-weights of keys: as channels they are what they are as a mask."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from calls import noise
from largerespatch.techniques.attention import log_weights as weights_room
from largerespatch.techniques.attention.log_weights import WeightedKeys, channels_are_faster, in_channels

ACCURACY = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def weights(batch, keys):
    found = torch.zeros(batch, 1, keys)
    found[..., keys // 2 :] = math.log(977)
    found[0, :, -3:] = -torch.inf
    return found


@pytest.mark.parametrize("channels", [8, 40, 64, 80])
@pytest.mark.parametrize("dtype", ACCURACY)
def test_as_channels_they_are_what_they_are_as_a_mask(dtype, channels):
    query, key, value = (noise(2, 3, tokens, channels).to(dtype) for tokens in (33, 57, 57))
    log_weights = weights(2, 57)
    expected = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=log_weights[:, None].double()
    )
    result = in_channels(F.scaled_dot_product_attention, query, key, value, log_weights=log_weights[:, None])
    assert result.dtype == dtype
    error = (result.double() - expected).abs().max()
    masked = F.scaled_dot_product_attention(query, key, value, attn_mask=log_weights[:, None].to(dtype))
    assert error <= max(ACCURACY[dtype], 1.2 * float((masked.double() - expected).abs().max()))


def test_a_scale_is_kept():
    query, key, value = (noise(1, 2, 20, 16) for _ in range(3))
    log_weights = weights(1, 20)[:, None]
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=log_weights, scale=0.1)
    result = in_channels(F.scaled_dot_product_attention, query, key, value, log_weights=log_weights, scale=0.1)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_a_part_of_the_batch_gets_its_own_and_other_calls_none():
    query, key, value = (noise(1, 2, 20, 16) for _ in range(3))
    log_weights = weights(2, 20)
    plain = F.scaled_dot_product_attention(query, key[:, :, :10], value[:, :, :10])
    with WeightedKeys(log_weights) as weighted:
        assert torch.equal(F.scaled_dot_product_attention(query, key[:, :, :10], value[:, :, :10]), plain)
        assert not weighted.met
        result = F.scaled_dot_product_attention(query, key, value)
    assert weighted.met
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=log_weights[:1, None])
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    ("channels", "capability", "faster"),
    [(40, (9, 0), True), (80, (9, 0), True), (64, (9, 0), False), (128, (10, 0), False), (64, (8, 6), True)],
)
def test_channels_are_added_where_there_is_room_for_them_or_no_kernel_for_masks(
    monkeypatch, channels, capability, faster
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, shape=(2, 8, 100, channels))
    assert channels_are_faster(query) is faster
    query.dtype = torch.float32
    assert not channels_are_faster(query)


def test_where_channels_are_faster_the_result_is_that_of_a_mask(monkeypatch):
    query, key, value = (noise(1, 2, 20, 16) for _ in range(3))
    widths, attend = [], F.scaled_dot_product_attention

    def watched(func, query, *others, **kwargs):
        widths.append(query.shape[-1])
        return in_channels(func, query, *others, **kwargs)

    monkeypatch.setattr(weights_room, "in_channels", watched)
    results = []
    for faster in (False, True):
        monkeypatch.setattr(weights_room, "channels_are_faster", lambda query, faster=faster: faster)
        with WeightedKeys(weights(1, 20)):
            results.append(attend(query, key, value))
    assert widths == [16]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
