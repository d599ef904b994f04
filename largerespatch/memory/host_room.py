"""Whether the host has room for what options put there."""

from collections.abc import Callable
from typing import Any

from .counting import gibibytes
from .devices import HOST, execution_device, host_bytes
from .estimate import STAGES, Estimator

# Of the host's memory for one of an image's pixels, at most: an exact VAE in float32 needs the most, 1536. Smaller
# images fit, whatever they need in particular.
MOST_BYTES_A_PIXEL = 2**11

_OFFLOADS = ("unet_offload", "vae_offload")


def check_host(pipe: Any, options: Any, height: int, width: int, estimator: Callable[[], Estimator]) -> None:
    """That the machine has the memory for maps on the host of an image of ``height x width`` sample pixels.

    Only where it is a question there is an estimate, which takes a second or two.

    Raises:
        ValueError: it has not.
    """
    there, asked = host_bytes(), {name: getattr(options, name) for name in _OFFLOADS if getattr(options, name)}
    if there is None or MOST_BYTES_A_PIXEL * height * width <= there:
        return
    if not asked or execution_device(pipe).type == HOST:
        return
    found = estimator()
    stages = STAGES if found.encodes else ("step", "decode")
    needed = max(_needed(found, stage, height, width, options) for stage in stages)
    if needed > there:
        told = ", ".join(f"{name}={value!r}" for name, value in asked.items())
        raise ValueError(
            f"{told}: maps of {width}x{height} sample pixels need {gibibytes(needed)} of the host's memory, and it has "
            f"{gibibytes(there)}; accepted is what fits: a smaller image, or maps that stay on the device "
            f"({'=False, '.join(asked)}=False)"
        )


def _needed(estimator: Estimator, stage: str, height: int, width: int, options: Any) -> int:
    try:
        return estimator.host_peak(stage, height, width, options)
    except ValueError:  # it is not known how this model is called
        return 0
