"""Every option of `LargeResPatch` once: its default, unit, check and a line of help.

The signature, the docstring, the checks, `repr`, the planner and the README's table read them from here.
"""

import difflib
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, Field, dataclass, field, fields
from typing import Any

from .core.agreement import process_group
from .core.checks import boolean, one_of, one_of_or_none, switch_or_one_of, whole_number, whole_number_or_none
from .core.tilings import COVERS
from .memory.counting import amount

PADDING_MODES = ("constant", "circular", "reflect", "replicate")
VAE_MODES = ("two-pass", "exact")
VAE_ATTENTIONS = ("full", "blocked")
UNET_OFFLOADS = ("skips", "maps")

_HOST = "since rows that other processes ask for are not looked for on the host"
# What options have to be where several processes share an image, and why.
WITH_A_GROUP = {
    "vae_mode": ("exact", "whose processes pool the statistics of the whole map"),
    "vae_recompute": (False, "since maps that are not there have no rows for other processes"),
    "unet_strip_rows": (None, "since each process has the U-Net run on its band as it is"),
    "unet_offload": (False, _HOST),
    "vae_offload": (False, _HOST),
}

Check = Callable[[str, object], Any]


def _option(default: Any, check: Check, accepts: str, text: str) -> Any:
    """A field with what is to be known of it: `accepts` completes "accepted is ..."."""
    return field(default=default, metadata={"check": check, "accepts": accepts, "help": text})


def _count(default: int, unit: str, text: str, least: int = 1) -> Any:
    accepts = f"a whole number{f' of {unit}' if unit else ''}, at least {least}"
    return _option(default, lambda option, value: whole_number(option, value, unit, least), accepts, text)


def _count_or_none(unit: str, text: str, least: int = 1) -> Any:
    accepts = f"None or a whole number of {unit}, at least {least}"
    return _option(None, lambda option, value: whole_number_or_none(option, value, unit, least), accepts, text)


def _quoted(accepted: Sequence[str]) -> str:
    return " or ".join(f'"{each}"' for each in accepted)


def _word(default: str, accepted: Sequence[str], text: str) -> Any:
    return _option(
        default,
        lambda option, value: one_of(option, value, accepted),
        _quoted(accepted),
        text,
    )


def _switch(text: str) -> Any:
    return _option(False, boolean, "True or False", text)


@dataclass(frozen=True)
class Options:
    """Checked when they are made; to try others is `dataclasses.replace`.

    Raises:
        TypeError, ValueError: an option is not what is accepted, or does not go with another one.
    """

    attn_slice_x: int = _count(64, "tokens", "width of a tile, half the width of a wide brick")
    attn_slice_y: int = _count(64, "tokens", "height of a tile, half the height of a tall brick")
    attn_shape: str = _word(
        "brick", tuple(COVERS), '"brick" for the four running-bond tilings, "tile" for four shifted grids'
    )
    ff_chunk_size: int = _count(
        32768,
        "tokens",
        "tokens that pass at once through all that follows self-attention in a transformer block",
    )
    padding_mode: str = _word(
        "constant",
        PADDING_MODES,
        'what convolutions of denoiser and VAE see beyond the image\'s edge: "constant" (as trained), "circular" (the '
        'image continues at its opposite edge), "reflect" or "replicate"',
    )
    vae_chunk_size_x: int = _count(64, "latent pixels", "width of a VAE tile")
    vae_chunk_size_y: int = _count(64, "latent pixels", "height of a VAE tile, and at most of an exact VAE's strips")
    _: KW_ONLY
    attn_full_tokens: int = _count(16384, "tokens", "maps of at most so many are attended whole")
    attn_context: int | None = _count_or_none(
        "tokens",
        "tokens outside it that a block attends to, too: *heavy* ones, which most queries want, and *sampled* ones, "
        "corrected; in joint attention *own* favourites and *pooled* cells. None: 512, there 3072. 0 for none",
        least=0,
    )
    vae_mode: str = _option(
        None,
        lambda option, value: one_of_or_none(option, value, VAE_MODES),
        f"None or {_quoted(VAE_MODES)}",
        '"two-pass" (approximate, in tiles) or "exact": strip by strip with the statistics of the whole map, as fast '
        'as untiled in half of its memory. None: "two-pass"; "exact" with a `process_group`',
    )
    vae_passes: int = _count(2, "", 'passes of "two-pass": the more, the closer to exact', least=2)
    vae_attn: str = _word(
        "full",
        VAE_ATTENTIONS,
        '"blocked": the VAE\'s mid-block attention is blocked by the same `attn_` options. Approximate; saves most of '
        "a decode's time beyond about 4096 x 4096",
    )
    vae_recompute: bool = _switch(
        "whether an exact VAE computes its largest maps anew whenever they are read: about 27 % "
        "of the untiled memory, 30 % more time for a decode. Exact"
    )
    vae_offload: bool = _switch(
        "whether maps of the VAE are in (pinned) host memory while strips or tiles visit the device. An image of 64 "
        "MiB or more is given back on the host. Exact; on the host it changes nothing"
    )
    unet_serial: bool = _switch(
        "whether denoiser and ControlNet run the samples of a batch (two with guidance) one by one. Exact"
    )
    unet_strip_rows: int | None = _count_or_none(
        "rows of the feature map",
        "run residual blocks and upsamplers of U-Nets and ControlNets in strips of at most so many rows (exact; "
        'less memory at about the same time); None: whole, or 16 with unet_offload "maps"',
    )
    unet_offload: bool | str = _option(
        False,
        lambda option, value: switch_or_one_of(option, value, UNET_OFFLOADS),
        'False, "skips" (or True, which means that), "maps"',
        'what of a denoiser is in (pinned) host memory: "skips" for skip connections, "maps" for every map of 64 MiB '
        "or more, keys and values of joint attention too, so that a larger image needs little more. Exact; on the host "
        "it changes nothing",
    )
    memory_limit: str | int | None = _option(
        "auto",
        amount,
        'None, "auto", or an amount such as "8GiB" or a number of bytes',
        "what the pipeline may take on its device, weights included; a tenth, at least 512 MiB, stays free. The "
        "cheapest settings that fit are picked, those that change no result first; what you give stays; `repr` tells. "
        '"auto" is what an accelerator has free when the first call in the block starts; on the host nothing is '
        "picked. None: never",
    )
    process_group: Any = _option(  # noqa: RUF009  a field, as the others
        None,
        process_group,
        "None, a `torch.distributed.ProcessGroup` that this process is a member of, or a DeviceMesh of dimensions "
        '"guidance" and "rows"',
        "of `torch.distributed`, whose processes make one image, a band of its rows each. Exact",
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            checked = option.metadata["check"](option.name, getattr(self, option.name))
            object.__setattr__(self, option.name, checked)  # the way of frozen dataclasses to finish themselves
        if self.vae_mode is None:
            object.__setattr__(self, "vae_mode", "two-pass" if self.process_group is None else "exact")
        if self.process_group is not None:
            self._check_shared()
        if self.vae_mode != "exact" and self.vae_recompute:
            raise ValueError(f"vae_recompute=True needs vae_mode 'exact'; got vae_mode {self.vae_mode!r}")
        if self.vae_mode != "two-pass" and self.vae_passes != 2:
            raise ValueError(f"vae_passes={self.vae_passes} needs vae_mode 'two-pass'; got vae_mode {self.vae_mode!r}")

    def _check_shared(self) -> None:
        for name, (only, why) in WITH_A_GROUP.items():
            if (value := getattr(self, name)) != only:
                raise ValueError(f"{name} must be {only!r} with a process_group, {why}; got {value!r}")


def signature(**leading: type) -> inspect.Signature:
    """Of a callable that takes the `leading` parameters and then every option."""
    first = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
        for name, kind in leading.items()
    ]
    own = list(inspect.signature(Options).parameters.values())
    return inspect.Signature([*first, *own])


def given(call: inspect.Signature, args: Sequence[object], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a caller gave of a signature's parameters, by name.

    Raises:
        TypeError: a parameter that is not there, with the nearest that is; one given twice, or not given.
    """
    for name in sorted(kwargs.keys() - call.parameters.keys()):
        near = difflib.get_close_matches(name, call.parameters, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise TypeError(
            f"{name} is no option{hint}; accepted are {', '.join(call.parameters)}; got {name}={kwargs[name]!r}"
        )
    return dict(call.bind(*args, **kwargs).arguments)


def help_lines(indent: int) -> str:
    """What docstrings say of each option; all lines but the first are indented."""
    hanging = " " * indent
    entries = (f"{hanging}{option.name}: {_help(option)}" for option in fields(Options))
    lines = (textwrap.fill(each, width=120, subsequent_indent=hanging + "    ") for each in entries)
    return "\n".join(lines).removeprefix(hanging)


def _help(option: Field[Any]) -> str:
    return f"{option.metadata['help']}. Accepted: {option.metadata['accepts']}; default {option.default!r}."
