"""Flux 3: each kind of token in blocks of its own, then all together. Its pipelines are modular."""

from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import diffusers as d
import pytest
import torch
from joint import ALL, CLOSE, Case, JointTests, embeds, error, patch
from test_flux2 import IMAGE, flux_2

import tiny
from family import noise
from largerespatch.autoencoders.kl import progress_bar_of
from largerespatch.techniques.joint.one_call import OneCall

MODEL = {"in_channels": 16, "cond_in_channels": 16, "num_layers": 2, "num_single_layers": 2}
MODEL |= {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 4, 4)}
TEXT = embeds(32)
NEGATIVE = embeds(32, seed=7, negative=True)


def transformer(**changes):
    return tiny.frozen(d.Flux3Transformer2DModel, 34, **MODEL | changes)


def pipeline(distilled=False, **changes):
    """All but the text's encoder, called as other pipelines are."""
    from diffusers.modular_pipelines.flux3 import modular_blocks_flux3 as flux3
    from diffusers.modular_pipelines.flux3 import modular_blocks_flux3_distilled as flux3_distilled
    from diffusers.modular_pipelines.flux3.modular_pipeline import Flux3ModularPipeline
    from diffusers.modular_pipelines.modular_pipeline import SequentialPipelineBlocks

    class Pipeline(Flux3ModularPipeline):
        def __call__(self, output_type, **given):
            if output_type != "latent":
                return [super().__call__(output="images", output_type=output_type, **given)]
            steps = self._blocks.sub_blocks  # it would decode all the same
            with mock.patch.object(self._blocks, "sub_blocks", {name: steps[name] for name in ("encode", "denoise")}):
                return [super().__call__(output="latents", **given)]

    core = flux3_distilled.Flux3DistilledAutoCoreDenoiseStep if distilled else flux3.Flux3AutoCoreDenoiseStep
    steps = {"encode": flux3.Flux3AutoVaeEncoderStep(), "denoise": core(), "decode": flux3.Flux3DecodeStep()}
    pipe = Pipeline(SequentialPipelineBlocks.from_blocks_dict(steps))
    pipe.update_components(transformer=transformer(**changes), vae=flux_2())
    return pipe


class TestFlux3(JointTests):
    family = "Flux 3"
    prompt: ClassVar = embeds(32, tokens=77)
    cases: ClassVar = {
        "text": Case(pipeline, TEXT | NEGATIVE),
        "distilled": Case(lambda: pipeline(True, flow_map=True), TEXT),
        "references": Case(pipeline, TEXT | NEGATIVE | IMAGE),
    }


def ids(number, height, width):
    return torch.cartesian_prod(torch.tensor([number]), torch.arange(height), torch.arange(width), torch.tensor([0]))


def test_progress_is_shown_by_the_first_block_that_has_a_bar(capsys):
    pipe = pipeline()
    bar = progress_bar_of(pipe)
    assert type(bar.__self__).__name__ == "Flux3DenoiseStep"
    with patch(pipe, vae_chunk_size_x=8, vae_chunk_size_y=8):
        pipe.vae.decode(noise(1, 4, 18, 22))
    assert "VAE decode" in capsys.readouterr().err


def test_where_no_block_has_a_bar_none_is_seen(capsys):
    with progress_bar_of(SimpleNamespace(_blocks=SimpleNamespace(sub_blocks={})))(total=3) as bar:
        bar.set_description("VAE decode")
        bar.update()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("flow_map", [False, True])
def test_blocks_are_dense_with_enough_context(references, flow_map, monkeypatch):
    model = transformer(flow_map=flow_map)
    pipe = pipeline()
    pipe.update_components(transformer=model)
    told = {"hidden_states": noise(2, 11 * 13, 16), "encoder_hidden_states": noise(2, 5, 32), "return_dict": False}
    told |= {"timestep": torch.tensor([0.5, 0.5]), "img_ids": ids(0, 11, 13), "txt_ids": torch.zeros(5, 4)}
    told |= {"target_timestep": torch.tensor([0.2, 0.2])} if flow_map else {}
    if references:
        told |= {"image_cond_hidden_states": noise(2, 6 * 9 + 3 * 2, 16)}
        told |= {"image_cond_ids": torch.cat([ids(10, 6, 9), ids(20, 3, 2)])}
    dense, errors, runs, run = model(**told)[0], [], [], OneCall.run
    monkeypatch.setattr(OneCall, "run", lambda self, *given: runs.append(self.maps) or run(self, *given))
    for context in (0, 48, ALL):
        with patch(pipe, attn_context=context) as active:
            errors.append(error(model(**told)[0], dense))
        assert "4 transformer blocks in bricks" in repr(active)
    assert errors[0] > errors[1] > 10 * CLOSE > CLOSE > errors[2]
    maps = [(11, 13), (6, 9), (3, 2)] if references else [(11, 13)]
    assert list(map(list, runs)) == 3 * [maps[:1], maps[:1], maps, maps]
    assert patch(pipe).estimate().step > 0
