"""The log-weights of a context's keys, added to attention's scores: as a mask, or as part of the dot product.

A mask keeps flash attention away, and costs any kernel time. Where channels are to be had for little, some of each key
hold its weight and the same ones of each query a constant. Exact, but for half precision: the weight is split into what
a half number holds and what that rounds off.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# Channels that are added: kernels want a multiple of eight.
CHANNELS = 8

# What stands for minus infinity, which a dot product cannot hold: the weight of nothing in any precision.
NOTHING = -(2.0**12)

HALVES = (torch.float16, torch.bfloat16)

# Kernels work on whole multiples of so many channels.
LANES = 64

# From this one on torch prefers cuDNN's attention, which is as fast with a mask.
TAKES_MASKS = (9, 0)


# Of ``F.scaled_dot_product_attention``, in their order.
PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")

Corrected = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class WeightedKeys(TorchFunctionMode):
    """Adds log-weights ``[B, 1, K]`` to the scores of ``F.scaled_dot_product_attention`` calls over K keys.

    For processors that pass no mask on, or pass it for a part of the batch (which then is its first part). Where there
    is something that corrects, it makes of the keys and values ``[B, heads, K, C]`` of a call other values, and
    log-weights ``[B, heads, K]``.
    """

    def __init__(self, log_weights: torch.Tensor, corrected: Corrected | None = None) -> None:
        super().__init__()
        self.log_weights = log_weights
        self.corrected = corrected
        self.met = False

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            given = dict(zip(PARAMETERS, args, strict=False)) | (kwargs or {})
            query, key = given["query"], given["key"]
            ours = query.ndim == 4 and key.shape[-2] == self.log_weights.shape[-1]
            if ours and given.get("attn_mask") is None:
                self.met = True
                log_weights = self.log_weights[: len(query)]
                if self.corrected is not None:
                    given["value"], log_weights = self.corrected(key, given["value"])
                return weighted(func, given, log_weights)
        return func(*args, **(kwargs or {}))


def weighted(attend: Callable[..., torch.Tensor], given: Mapping[str, Any], log_weights: torch.Tensor) -> torch.Tensor:
    """A call of attention, of arguments by name and without a mask, with log-weights ``[B, 1 or heads, K]``."""
    log_weights, query = log_weights[:, :, None], given["query"]
    if channels_are_faster(query):
        rest = {name: each for name, each in given.items() if name not in PARAMETERS[:4]}
        return in_channels(attend, query, given["key"], given["value"], log_weights=log_weights, **rest)
    return attend(**{**given, "attn_mask": log_weights.to(query.dtype)})


def channels_are_faster(query: torch.Tensor) -> bool:
    """Measured, for queries ``[B, heads, N, C]`` on an H200.

    40 and 80 channels: 8 % faster than a mask, 64 and 128: 12 and 17 % slower. Without cuDNN, which torch does not
    prefer on older devices, the mask takes twice as long at 40 and at 64.
    """
    if query.device.type != "cuda" or query.dtype not in HALVES:
        return False
    width = query.shape[-1]
    to_spare = -(-width // LANES) == -(-(width + CHANNELS) // LANES)
    return to_spare or torch.cuda.get_device_capability(query.device) < TAKES_MASKS


def in_channels(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_weights: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """`attend` with log-weights ``[B, 1 or heads, 1, K]`` that no kernel knows of.

    Queries and keys are ``[B, heads, N, C]``.
    """
    scale = kwargs.pop("scale", None) or 1 / math.sqrt(query.shape[-1])
    constant = 2.0 ** round(-math.log2(scale))  # a power of two, for it has to be exact
    wanted = (log_weights.float() / (scale * constant)).clamp(min=NOTHING).transpose(-1, -2)
    coarse = wanted.to(key.dtype)
    weights = F.pad(torch.cat([coarse, (wanted - coarse.float()).to(key.dtype)], dim=-1), (0, CHANNELS - 2))
    constants = query.new_full((*query.shape[:-1], CHANNELS), constant)
    return attend(
        torch.cat([query, constants], dim=-1),
        torch.cat([key, weights.expand(*key.shape[:-1], CHANNELS)], dim=-1),
        F.pad(value, (0, CHANNELS)),
        scale=scale,
        **kwargs,
    )[..., : value.shape[-1]]
