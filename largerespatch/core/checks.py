"""Checks of options, shared by the public names, and warnings: what is accepted, and what was received."""

import operator
import sys
import warnings
from collections.abc import Sequence
from typing import Any

PACKAGE = __name__.partition(".")[0]


def whole_number(option: str, value: object, unit: str, least: int) -> int:
    """`value` as an int where it is an integer (a NumPy one too) of at least `least`.

    `unit` completes the message: ``"a whole number of tokens"``; it may be empty.

    Raises:
        TypeError: for anything but an integer; booleans and floats, even whole ones, are none.
        ValueError: for an integer below `least`.
    """
    accepted = f"{option} must be a whole number{f' of {unit}' if unit else ''}, at least {least}; got {value!r}"
    # NumPy's booleans have no __index__, Python's do.
    if isinstance(value, bool):
        raise TypeError(accepted)
    number: Any = value
    try:
        whole = operator.index(number)
    except TypeError:
        raise TypeError(accepted) from None
    if whole < least:
        raise ValueError(accepted)
    return whole


def whole_number_or_none(option: str, value: object, unit: str, least: int) -> int | None:
    """The same, with None for what is to be found out."""
    if value is None:
        return None
    try:
        return whole_number(option, value, unit, least)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("must be", "must be None or", 1)) from None


def positive_int(option: str, value: object, unit: str) -> int:
    """`value` as an int of at least 1; see `whole_number`."""
    return whole_number(option, value, unit, least=1)


def one_of(option: str, value: object, accepted: Sequence[str]) -> str:
    """`value` where it is one of the `accepted` words.

    Raises:
        TypeError: where it is not a string.
        ValueError: where it is another string.
    """
    message = f"{option} must be one of {', '.join(map(repr, accepted))}; got {value!r}"
    if not isinstance(value, str):
        raise TypeError(message)
    if value not in accepted:
        raise ValueError(message)
    return value


def one_of_or_none(option: str, value: object, accepted: Sequence[str]) -> str | None:
    """The same, with None for what follows from other options."""
    if value is None:
        return None
    try:
        return one_of(option, value, accepted)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("must be", "must be None or", 1)) from None


def boolean(option: str, value: object) -> bool:
    """`value` where it is True or False.

    Raises:
        TypeError: where it is anything else, 0 and 1 too.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{option} must be one of True, False; got {value!r}")
    return value


def switch_or_one_of(option: str, value: object, accepted: Sequence[str]) -> str | bool:
    """`value` where it is False or one of the `accepted` words; True means the first one.

    Raises:
        TypeError: where it is neither a truth value nor a string.
        ValueError: where it is another string.
    """
    if isinstance(value, bool):
        return value and accepted[0]
    words = ", ".join(map(repr, accepted))
    message = f"{option} must be one of False, {words}, or True for {accepted[0]!r}; got {value!r}"
    if not isinstance(value, str):
        raise TypeError(message)
    if value not in accepted:
        raise ValueError(message)
    return value


def warn(message: str) -> None:
    """A warning that names the line which called this library, however deep inside it arises."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
