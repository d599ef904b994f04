"""Skip connections off the device: they wait on the host for the block that reads them. Exact."""

from collections.abc import Callable
from typing import Any

from ..core.hosts import Host
from ..core.maps import StoredMap
from ..core.planes import Map


class OffDevice:
    """Takes the place of the ``forward`` of a module that makes or reads maps which leave the device.

    Where it `makes` a skip connection, or the input of an up block (which the U-Net holds on to until that block is
    done), it returns a map that can leave, and does when the module that reads it next is done. `at_once` is for what
    nothing else reads soon: the residuals that a ControlNet makes.
    """

    def __init__(self, host: Host, makes: bool = False, at_once: bool = False) -> None:
        self.host = host
        self.makes = makes
        self.at_once = at_once

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args and isinstance(args[0], Map) else None
        if given is not None and self.at_once:
            args = (given.copied() if given.away else given.whole(), *args[1:])  # for this reader alone, not to stay
        result = original(*args, **kwargs)
        if given is not None:
            given.leave()
        if not self.makes:
            return result
        if isinstance(result, tuple):  # a transformer's
            return (self._kept(result[0]), *result[1:])
        return self._kept(result)

    def _kept(self, plane: Any) -> Any:
        if isinstance(plane, Map) or not self.host.keeps(plane):
            return plane
        kept = StoredMap.of(plane, self.host)
        if self.at_once:
            kept.leave()
        return kept
