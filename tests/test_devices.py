"""Where models run, and where their weights are."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module

import tiny
from largerespatch import LargeResPatch
from largerespatch.memory import shadow
from largerespatch.memory.devices import device_of, execution_device, weights_now, weights_on

CPU, META = torch.device("cpu"), torch.device("meta")


def size(*models):
    return sum(weight.nbytes for model in models for weight in [*model.parameters(), *model.buffers()])


def test_weights_count_where_they_are_on_the_device(pipe):
    patch = LargeResPatch(pipe, 64, 64)
    assert patch.estimate().weights == size(pipe.unet, pipe.vae, pipe.text_encoder)
    for model in (pipe.unet, pipe.vae):
        model.to("meta")
    assert patch.estimate().weights == size(pipe.unet, pipe.vae), "the text encoder is on the host"


def test_models_offloaded_by_accelerate_count_one_at_a_time(pipe):
    whole = LargeResPatch(pipe, 64, 64).estimate()
    sizes = [size(model) for model in (pipe.unet, pipe.vae)]
    for model in (pipe.text_encoder, pipe.unet, pipe.vae):
        add_hook_to_module(model, CpuOffload("meta"))
    offloaded = LargeResPatch(pipe, 64, 64).estimate()
    assert offloaded.weights == max(sizes) < whole.weights
    assert min(offloaded.step - whole.step, offloaded.decode - whole.decode) >= shadow.LIBRARIES  # not on the host


def test_weights_that_wait_elsewhere_are_not_there_now(pipe):
    assert weights_now(pipe, CPU) == weights_on(pipe, CPU) == size(pipe.unet, pipe.vae, pipe.text_encoder)
    for model in (pipe.unet, pipe.vae):
        add_hook_to_module(model, CpuOffload("meta"))
    assert weights_now(pipe, META) == 0
    assert weights_on(pipe, META) == max(size(pipe.unet), size(pipe.vae))
    assert weights_now(pipe, CPU) == size(pipe.unet, pipe.vae, pipe.text_encoder)


class OnDevice(torch.Tensor):
    """A weight that is said to be on a device that may not be there."""

    @staticmethod
    def __new__(cls, like, device):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.detach.default
        return cls(args[0], args[0].device)


def put(model, device):
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(OnDevice(weight, device), requires_grad=False)


@pytest.mark.parametrize("current", [0, 1])
def test_two_devices_of_a_type_count_apart(pipe, current, monkeypatch):
    """One without a number is the current one."""
    backend = SimpleNamespace(is_available=lambda: True, current_device=lambda: current)
    monkeypatch.setattr(torch, "get_device_module", lambda device: backend)
    put(pipe.unet, "cuda:0")
    put(pipe.vae, "cuda:1")
    unet, vae, text = size(pipe.unet), size(pipe.vae), size(pipe.text_encoder)
    for count in (weights_now, weights_on):
        assert count(pipe, torch.device("cuda:0")) == unet
        assert count(pipe, torch.device("cuda:1")) == vae
        assert count(pipe, torch.device("cuda")) == [unet, vae][current]
        assert count(pipe, torch.device("cuda:2")) == count(pipe, torch.device("xpu:0")) == 0
        assert count(pipe, CPU) == count(pipe, torch.device("cpu:0")) == text
    put(pipe.vae, "cuda")
    assert weights_on(pipe, torch.device("cuda:0")) == unet + (vae if current == 0 else 0)
    add_hook_to_module(pipe.text_encoder, CpuOffload("cuda:2"))
    assert weights_on(pipe, torch.device("cuda:2")) == text
    assert weights_on(pipe, torch.device("cuda:0")) == unet + (vae if current == 0 else 0)


def test_a_device_that_is_not_there_has_no_current_one(pipe):
    put(pipe.unet, "cuda:0")
    assert weights_now(pipe, torch.device("cuda")) == (0 if torch.cuda.is_available() else size(pipe.unet))
    assert weights_now(pipe, torch.device("cpu:0")) == size(pipe.vae, pipe.text_encoder)
    assert weights_now(pipe, META) == 0


def test_the_device_is_the_denoisers_and_where_there_is_none_the_vaes(pipe):
    pipe.unet.to("meta")
    assert execution_device(pipe) == META and device_of(pipe.vae) == CPU
    pipe.unet = None
    assert execution_device(pipe) == CPU
    pipe.vae.to("meta")
    assert execution_device(pipe) == META
    pipe.vae = None
    assert execution_device(pipe) == CPU


def test_a_controlnet_does_not_say_where_the_pipeline_runs():
    from diffusers import StableDiffusionControlNetPipeline

    pipe = StableDiffusionControlNetPipeline(**tiny.components(controlnet=tiny.controlnet()))
    pipe.controlnet.to("meta")
    assert execution_device(pipe) == CPU
