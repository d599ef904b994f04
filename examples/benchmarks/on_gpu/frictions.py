"""Small things: host synchronizations, launches, half precision, memory format, compiling, bfloat16."""

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from _common import Candidate, interleaved
from largerespatch import LargeResPatch
from largerespatch.core.statistics import record_by_rows

from .copies import length, profiled, union
from .lab import Lab, Row, attempts, stage, timed

LAUNCHES = 10  # rounds
KERNELS = 14  # that are told


def rows(lab: Lab) -> Iterator[Row]:
    parts = (synchronizations, launches, where_time_goes, group_statistics, memory_format, bfloat16)
    for part in parts:
        if lab.clock.left() < 0:
            return
        yield from attempts(named(part, lab))
        lab.clear()


def named(part: Callable[[Lab], Iterator[Row]], lab: Lab) -> Iterator[Row]:
    for row in part(lab):
        yield {"of": part.__name__} | row


def synchronizations(lab: Lab) -> Iterator[Row]:
    """Places where the host is made to wait for the device: in the parts, and in a denoising loop as the pipeline has
    it, where a scheduler has its own."""
    size = lab.sizes[1]
    for model, name, settings in (
        ("sd15", "step", {}),
        ("sd15", "decode", {}),
        ("sd15", "decode", {"vae_mode": "exact"}),
        ("flux", "step", {}),
    ):
        candidate = stage(lab.pipeline(model), name, size, settings)
        with candidate.context(), torch.no_grad():
            candidate.run()
            yield {
                "model": model,
                "stage": name,
                "settings": settings,
                "size": size,
                "waits": waits(lab, candidate.run),
            }
    for model in ("sd15", "flux"):
        pipe = lab.pipeline(model)
        patched = partial(LargeResPatch, pipe, size, size, memory_limit=None)
        for way, context in (("unpatched", nullcontext), ("patched", patched)):
            with context():
                denoise(lab, pipe, size, 1)
                few, many = (waits(lab, partial(denoise, lab, pipe, size, steps)) for steps in (2, 6))
            in_a_step = {place: (count - few[place]) / 4 for place, count in many.items() if count != few[place]}
            row = {"model": model, "stage": "denoising", "way": way, "size": size}
            yield row | {"waits_in_a_step": in_a_step, "other_waits": few}


def denoise(lab: Lab, pipe: Any, size: int, steps: int) -> None:
    """A pipeline's own loop, whatever it says of the words."""

    def words(*shape: int) -> torch.Tensor:
        return torch.zeros(1, *shape, device=lab.device, dtype=pipe.vae.dtype)

    if hasattr(pipe, "unet"):
        width = pipe.unet.config.cross_attention_dim
        told = {"prompt_embeds": words(77, width), "negative_prompt_embeds": words(77, width)}
    else:
        config = pipe.transformer.config
        told = {"prompt_embeds": words(512, config.joint_attention_dim)}
        told["pooled_prompt_embeds"] = words(config.pooled_projection_dim)
    pipe(**told, output_type="latent", height=size, width=size, num_inference_steps=steps)


def waits(lab: Lab, run: Callable[[], Any]) -> Counter[str]:
    """Places where that makes the host wait, and how often."""
    if not lab.cuda:
        run()
        return Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter("/".join(each.filename.split("/")[-3:]) + f":{each.lineno}" for each in caught)


def launches(lab: Lab) -> Iterator[Row]:
    """Patched against unpatched where nothing is blocked: what the patch itself costs, in all and until the host has
    asked for everything."""
    for model in ("sd15", "sdxl"):
        pipe, size = lab.pipeline(model), lab.sizes[0]
        both = {"unpatched": stage(pipe, "step", size, None), "patched": stage(pipe, "step", size, {})}
        with torch.no_grad():
            interleaved(both, 2, lab.device)
            samples = {"": interleaved(both, LAUNCHES, lab.device), "host_": asked(lab, both)}
        row: Row = {"model": model, "size": size}
        for name, kept in samples.items():
            median = {way: statistics.median(each) for way, each in kept.items()}
            row |= {f"{name}median": median, f"{name}ratio": median["patched"] / median["unpatched"]}
        yield row


def asked(lab: Lab, candidates: dict[str, Candidate]) -> dict[str, list[float]]:
    """Seconds until the host has asked for all, while the device has nothing else to do."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(LAUNCHES):
        for name, candidate in candidates.items():
            with candidate.context():
                lab.synchronize()
                since = time.perf_counter()
                candidate.run()
                samples[name].append(time.perf_counter() - since)
    lab.synchronize()
    return samples


def where_time_goes(lab: Lab) -> Iterator[Row]:
    """The kernels that take longest, and how much of the time there is one."""
    pipe, size = lab.pipeline("sd15"), lab.sizes[-2]
    for name, settings in (("step", {}), ("decode", {}), ("decode", {"vae_mode": "exact"})) if lab.cuda else ():
        candidate = stage(pipe, name, size, settings)
        timed(lab, candidate, rounds=1)
        events = profiled(candidate)
        spans = union((each.time_range.start, each.time_range.end) for each in events)
        kernels: Counter[str] = Counter()
        for each in events:
            kernels[each.name[:90]] += each.time_range.elapsed_us()
        whole = spans[-1][1] - spans[0][0]
        shares = {kernel: took / whole for kernel, took in kernels.most_common(KERNELS)}
        yield {"stage": name, "settings": settings, "size": size, "busy": length(spans) / whole} | {"shares": shares}
        lab.clear()


def group_statistics(lab: Lab) -> Iterator[Row]:
    """Of a map whose values lie far from zero, against float64."""
    for offset in (0.0, 100.0):
        plane = (torch.randn(1, 64, 512, 512, device=lab.device) + offset).half()
        found, exact = record_by_rows(plane, 32), record_by_rows(plane.double(), 32)
        error = ((found.variance.double() - exact.variance) / exact.variance).abs().max()
        yield {"offset": offset, "relative_error_of_variance": float(error)}


def memory_format(lab: Lab) -> Iterator[Row]:
    pipe, size = lab.pipeline("sd15"), lab.sizes[1]
    found: dict[str, dict[str, float]] = {}
    for form in (torch.contiguous_format, torch.channels_last):
        pipe.unet.to(memory_format=form)
        pipe.vae.to(memory_format=form)
        for name in ("step", "decode"):
            for way, settings in (("unpatched", None), ("patched", {})):
                with torch.no_grad():
                    median = statistics.median(timed(lab, stage(pipe, name, size, settings)))
                found.setdefault(f"{name}, {way}", {})[str(form)] = median
    for model in (pipe.unet, pipe.vae):
        model.to(memory_format=torch.contiguous_format)
    yield {"size": size, "median": found}


def bfloat16(lab: Lab) -> Iterator[Row]:
    """How far half precision takes a step and a decode from float32, unpatched and patched."""
    size = lab.sizes[1]
    for model, name in (("unet", "step"), ("vae", "decode")):
        pipe = lab.pipeline("sd15")
        net, before = getattr(pipe, model), getattr(pipe, model).dtype
        net.float()
        exact = {way: output(lab, pipe, model, size, settings) for way, settings in (("plain", None), ("patched", {}))}
        for dtype in (torch.float16, torch.bfloat16):
            net.to(dtype)
            for way, settings in (("plain", None), ("patched", {})):
                result = output(lab, pipe, model, size, settings)
                error = (result - exact[way]).norm() / exact[way].norm()
                yield {"stage": name, "way": way, "dtype": str(dtype), "relative_error": float(error)}
        net.to(before)


def output(lab: Lab, pipe: Any, model: str, size: int, settings: Any) -> torch.Tensor:
    net = getattr(pipe, model)
    noise = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
    latent = noise.to(lab.device, net.dtype)
    words = torch.zeros(1, 77, getattr(net.config, "cross_attention_dim", 1), device=lab.device, dtype=net.dtype)
    call = {"unet": lambda: net(latent, 500, words).sample, "vae": lambda: net.decode(latent).sample}[model]
    with stage(pipe, "step", size, settings).context(), torch.no_grad():
        return call().float()


def compiled(lab: Lab) -> Iterator[Row]:
    """`compile_repeated_blocks` with inductor: first call, warm step, what it changes.."""
    pipe, size = lab.pipeline("sd15"), lab.sizes[1]
    eager = output(lab, pipe, "unet", size, {})
    with torch.no_grad():
        plain = timed(lab, stage(pipe, "step", size, {}))
        pipe.unet.compile_repeated_blocks()
        with LargeResPatch(pipe, size, size, memory_limit=None):
            run = Candidate(stage(pipe, "step", size, None).run)
            first = interleaved({"first": run}, 1, lab.device)["first"][0]
            warm = timed(lab, run)
    result = output(lab, pipe, "unet", size, {})
    error = float((result - eager).norm() / eager.norm())
    yield {"size": size, "first": first, "eager": plain, "compiled": warm, "relative_change": error}
