"""Whole pipelines around U-Nets and others on tiny random-weight models, all that are listed in `family`."""

import torch
from table import TableTests

from conftest import quiet
from family import CASES, SIZE, TEXT, run
from largerespatch import LargeResPatch
from test_patch import SMALL


class TestPipelines(TableTests):
    cases = CASES

    def test_the_xl_vae_runs_upcast_and_comes_back_in_half_precision(self, calls):
        pipe = quiet(CASES["Stable Diffusion XL: text-to-image"].build())
        latents = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(0))
        seen = []
        pipe.vae.to(torch.float16)
        pipe.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
        with LargeResPatch(pipe, SIZE, SIZE, **SMALL):
            image = run(pipe, TEXT, latents=latents)
        assert calls["vae"]
        assert seen == [torch.float32]
        assert image.isfinite().all()
        assert pipe.vae.dtype == torch.float16


def test_tiles_run_under_the_pipelines_progress_bar(capsys):
    build_pipe, arguments, _ = CASES["Stable Diffusion: image-to-image"]
    pipe = build_pipe()
    pipe.set_progress_bar_config(disable=False)
    with LargeResPatch(pipe, SIZE, SIZE, **SMALL):
        run(pipe, arguments)
        shown = capsys.readouterr().err
        assert "VAE encoder: 100%" in shown
        assert "VAE decoder: 100%" in shown
        quiet(pipe)
        run(pipe, arguments)
    assert capsys.readouterr() == ("", "")
