"""Whether the processes of a `torch.distributed` group can make one image together: all have to be told the same."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .calls import schedulers_of
from .families import families_in

MESH = ("guidance", "rows")  # the names of a mesh's dimensions


def process_group(option: str, value: object) -> Any:
    """Checks that `value` is None, or a group or mesh that this process is a member of, and returns it.

    Raises:
        TypeError: it is neither.
        ValueError: it is one of others, or a mesh of other dimensions.
    """
    accepted = (
        f"{option} must be None, a torch.distributed.ProcessGroup that this process is a member of (of "
        "`torch.distributed.init_process_group` it is `torch.distributed.group.WORLD`), or a DeviceMesh of them with "
        f"dimensions {MESH}; got {value!r}"
    )
    if value is None:
        return None
    if value is getattr(dist.GroupMember, "NON_GROUP_MEMBER", None):
        raise ValueError(f"{accepted}, which stands for a group of other processes")
    if isinstance(value, DeviceMesh):
        if value.mesh_dim_names != MESH or value.get_coordinate() is None:
            raise ValueError(accepted)
    elif not isinstance(value, dist.ProcessGroup):
        raise TypeError(accepted)
    return value


def groups_of(shared: Any) -> list[Any]:
    """Of a group or mesh, the group whose processes have bands of one map; of a mesh, too, those who have the same rows
    of other samples."""
    return [shared.get_group(name) for name in reversed(MESH)] if isinstance(shared, DeviceMesh) else [shared]


@contextmanager
def agreeing(group: Any, facts: Callable[[], Mapping[str, object]]) -> Iterator[None]:
    """Afterwards the processes of a `group` (None: this one alone) tell each other their `facts`, by name.

    Raises:
        ValueError: in all of them where one was refused inside, or has other facts than the first.
    """
    if group is None:
        yield
        return
    try:
        yield
    except (TypeError, ValueError) as error:
        _told(group, {"refused": str(error)})  # so that the others do not wait for this one
        raise
    everyone = _told(group, {name: str(value) for name, value in facts().items()})
    count = len(everyone)
    for rank, other in enumerate(everyone):
        if "refused" in other:
            raise ValueError(f"process_group: rank {rank} of {count} was refused: {other['refused']}")
    for rank, other in enumerate(everyone):
        for name in everyone[0] | other:
            one, here = (each.get(name, "nothing") for each in (everyone[0], other))
            if one != here:
                raise ValueError(
                    f"process_group: {name} must be the same in all processes; rank {rank} of {count} has {here}, rank "
                    f"0 has {one}"
                )


def _told(group: Any, facts: dict[str, str]) -> list[dict[str, str]]:
    everyone: list[Any] = [facts]
    for each in groups_of(group):
        told: list[Any] = [None] * each.size()
        dist.all_gather_object(told, everyone, group=each)
        everyone = [facts for some in told for facts in some]
    return everyone


def facts_of(pipe: Any) -> dict[str, object]:
    """What a pipeline's models are: kinds, configurations, weights but for their values; and what schedulers it has."""
    facts: dict[str, object] = {"torch": torch.__version__, "pipe": type(pipe).__name__}
    facts["pipe.scheduler"] = _one(type(scheduler).__name__ for scheduler in schedulers_of(pipe))
    for name, (model, _) in families_in(pipe).items():
        facts[f"pipe.{name}"] = type(model).__name__
        config = dict(getattr(model, "config", {}))
        facts |= {f"pipe.{name}.config.{key}": value for key, value in config.items() if not key.startswith("_")}
        facts[f"pipe.{name}.dtype"] = _one(weight.dtype for weight in model.parameters())
        facts[f"pipe.{name}.device"] = _one(weight.device.type for weight in model.parameters())
        facts[f"pipe.{name}'s weights"] = _names_of_weights(model)
    return facts


def _one(values: Iterator[Any]) -> str:
    return ", ".join(sorted(set(map(str, values))))


def _names_of_weights(model: nn.Module) -> str:
    """Their names and shapes, in short: adapters that one process has and another has not show here."""
    shapes = sorted((name, tuple(weight.shape)) for name, weight in model.named_parameters())
    return f"{len(shapes)} of names and shapes {sha256(repr(shapes).encode()).hexdigest()[:12]}"


def least(group: Any, number: int) -> int:
    """The least of the numbers that the processes of a `group` (None: this one alone) have."""
    return number if group is None else min(int(each["number"]) for each in _told(group, {"number": str(number)}))


def check_group(group: Any, device: torch.device, height: int, factor: int, least: int = 1) -> None:
    """Sees that a group can send what is on a device, and that each process gets so many rows of latent pixels.

    `height` counts sample pixels, `factor` those of a latent pixel.

    Raises:
        ValueError: it cannot, or there is none for some.
    """
    rows = groups_of(group)[0]
    if height < (lowest := factor * least * rows.size()):
        raise ValueError(
            f"height must be at least {lowest} sample pixels for a process_group of {rows.size()} ({least} or "
            f"more rows of latent pixels each); got {height}"
        )
    if device.type == "cuda" and any(dist.get_backend(each) == "gloo" for each in groups_of(group)):
        raise ValueError(
            f"process_group must be of a backend that sends tensors on {device}, such as 'nccl'; got one of 'gloo'"
        )
