"""Flux 3: each kind of token in blocks of its own, then all together. Pipelines are modular; the model is called."""

import diffusers as d
import pytest
import torch
from joint import ALL, CLOSE, error, patch
from test_flux import pipeline

import tiny
from conftest import quiet
from family import noise
from largerespatch.techniques.joint.one_call import OneCall


def ids(number, height, width):
    return torch.cartesian_prod(torch.tensor([number]), torch.arange(height), torch.arange(width), torch.tensor([0]))


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("flow_map", [False, True])
def test_blocks_are_dense_with_enough_context(references, flow_map, monkeypatch):
    config = {"in_channels": 16, "cond_in_channels": 16, "num_layers": 2, "num_single_layers": 2}
    config |= {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
    model = tiny.frozen(d.Flux3Transformer2DModel, 34, **config, axes_dims_rope=(4, 4, 4, 4), flow_map=flow_map)
    pipe = quiet(pipeline())
    pipe.transformer = model
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
