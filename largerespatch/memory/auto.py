"""What `memory_limit` "auto" comes to: never an error, since the call may well work where nothing is planned."""

from collections.abc import Callable
from typing import NamedTuple

from .planner import DoesNotFitError, Planner, Settings, changing, told

AUTO = "memory_limit 'auto'"


class Outcome(NamedTuple):
    """The settings to take, what is said of them, and what to warn of, if anything."""

    settings: Settings
    says: str
    warning: str = ""


def outcome(planner: Callable[[], Planner], height: int, width: int, vae_mode: str) -> Outcome:
    """For an image of ``height x width`` sample pixels."""
    try:
        plan = planner().plan(height, width)
    except DoesNotFitError as refused:
        says = f"{refused}; on are {told(refused.settings) or 'none'}"
        return Outcome(refused.settings, says, says)
    except Exception as error:
        return Outcome({}, f"{AUTO}: nothing is planned, since there is no estimate: {error}")
    if not (approximate := changing(plan.settings, vae_mode)):
        return Outcome(plan.settings, str(plan))
    warning = (
        f"{AUTO} has picked {told(approximate)}, since nothing that leaves the result as it is fits what is free on "
        "the device; what is approximate changes with it: give these options, or a memory_limit in bytes, to have the "
        "same picture at any time"
    )
    return Outcome(plan.settings, str(plan), warning)
