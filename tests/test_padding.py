import pytest
import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from torch import nn

import tiny
from largerespatch.core.families import install, told
from largerespatch.core.patching import PatchStack
from largerespatch.techniques.padding import padding_sites

MODES = ["circular", "reflect", "replicate"]


@pytest.mark.parametrize("mode", MODES)
def test_convolutions_pad_by_the_mode(mode):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 1)), torch.randn(1, 2, 5, 6)
    expected = model[1](F.conv2d(F.pad(x, (1, 1, 1, 1), mode=mode), model[0].weight, model[0].bias))
    with PatchStack() as stack:
        install(stack, padding_sites(model, "unet", mode))
        torch.testing.assert_close(model(x), expected)
        assert model[1].padding_mode == "zeros"  # nothing to pad, nothing to replace
    assert model[0].padding_mode == "zeros"


@pytest.mark.parametrize("mode", MODES)
def test_the_row_and_column_that_a_downsampler_adds_follow_the_mode(mode):
    torch.manual_seed(0)
    model, x = Downsample2D(2, use_conv=True, padding=0), torch.randn(1, 2, 6, 8)
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1), mode=mode), model.conv.weight, model.conv.bias, stride=2)
    with PatchStack() as stack:
        install(stack, padding_sites(model, "vae", mode))
        torch.testing.assert_close(model(x), expected)
    assert "forward" not in vars(model.conv)


def test_constant_replaces_nothing():
    with PatchStack() as stack:
        install(stack, padding_sites(tiny.unet(), "unet", "constant"))
        assert not stack.active


def test_under_circular_padding_a_unet_commutes_with_rolling():
    unet = tiny.unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    x, prompt = torch.randn(1, 4, 8, 12), torch.randn(1, 3, 32)

    def error():
        rolled = unet(x.roll((2, 4), (2, 3)), 500, prompt).sample
        return (rolled - unet(x, 500, prompt).sample.roll((2, 4), (2, 3))).abs().max()

    with PatchStack() as stack:
        install(stack, padding_sites(unet, "unet", "circular"))
        assert error() < 1e-5
    assert error() > 1e-3


def test_under_circular_padding_a_t2i_adapter_commutes_with_rolling():
    adapter, x = tiny.t2i_adapter(), torch.rand(1, 3, 64, 96)

    def error():
        whole, rolled = adapter(x), adapter(x.roll((16, 32), (2, 3)))
        return max(
            (a.roll((16 // s, 32 // s), (2, 3)) - b).abs().max() for a, b, s in zip(whole, rolled, (8, 16), strict=True)
        )

    with PatchStack() as stack:
        install(stack, padding_sites(adapter, "adapter", "circular"))
        assert error() < 1e-5
    assert error() > 1e-3


def test_which_models_pad():
    assert told(padding_sites(tiny.t2i_adapter(), "adapter", "circular")) == "convolutions pad by 'circular'"
    assert not list(
        padding_sites(
            nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 2, stride=2), nn.Conv1d(2, 2, 3, padding=1)),
            "model",
            "circular",
        )
    )
