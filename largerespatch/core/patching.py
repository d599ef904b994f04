"""Reversible replacement of instance attributes.

The undo follows `unittest.mock._patch`: was the attribute the instance's own, or inherited from its class? An own
one is set back in its old place, an inherited one becomes visible again by deleting ours. Depends on no framework:
anything with a ``__dict__`` can be patched.

Hooks of accelerate and diffusers replace ``forward``, too. Pipelines take accelerate's off and put them on again at the
end of every call, and diffusers' group offload takes some of its own off after the first one. So ``forward`` is wrapped
beneath hooks, and what hooks have come to hold of ours is found there.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

_INHERITED = object()
_BENEATH_HOOK = "_old_forward"  # where accelerate keeps the forward that its hook replaces

# What wrapping must know the inside of: where diffusers' hooks keep the forward that they replace.
LEANS_ON = (
    "diffusers.hooks.hooks.HookRegistry.register_hook",
    "diffusers.hooks.hooks.HookRegistry.remove_hook",
)


class _Replacement(NamedTuple):
    target: Any
    holder: Any  # the target, or a reference that a hook on it keeps
    attribute: str
    original: Any  # _INHERITED where the instance had no attribute of its own
    replacement: Any
    label: str


def _references(target: Any) -> list[Any]:
    """What diffusers' hooks on `target` keep of it, from the inside out."""
    return list(getattr(vars(target).get("_diffusers_hook"), "_fn_refs", ()))


def beneath_hooks(target: Any, method: str) -> tuple[Any, str]:
    """Who holds, as which attribute, the `method` that hooks on `target` call in the end."""
    if method == "forward" and _BENEATH_HOOK in vars(target):
        return target, _BENEATH_HOOK
    if method == "forward" and (references := _references(target)):
        replaced = getattr(references[0], "original_forward", None) is not None  # by a hook's own
        return references[0], "original_forward" if replaced else "forward"
    return target, method


def _kept_by_hooks(target: Any, replacement: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a replacement that hooks were put over, or taken off from, is now: a dictionary and the key in it."""
    for owner in (target, *_references(target)):
        yield from ((owner.__dict__, name) for name, value in vars(owner).items() if value is replacement)


class PatchStack:
    """Replacements of instance attributes, undone in reverse order.

    As a context manager it undoes them on exit, whatever happens inside. Attributes are read from and written to
    the instance's ``__dict__``, so a class's ``__setattr__`` neither sees nor redirects them.
    """

    def __init__(self) -> None:
        self._replaced: list[_Replacement] = []

    @property
    def active(self) -> bool:
        return bool(self._replaced)

    def set(self, target: Any, attribute: str, value: Any, label: str) -> None:
        """Give `target` its own `attribute`. `label` names it in messages, as in ``"unet.mid_block.forward"``."""
        self._put(target, target, attribute, value, label)

    def _put(self, target: Any, holder: Any, attribute: str, value: Any, label: str) -> None:
        original = vars(holder).get(attribute, _INHERITED)
        # Recorded first: an interrupt right after the replacement must find it on the stack.
        self._replaced.append(_Replacement(target, holder, attribute, original, value, label))
        vars(holder)[attribute] = value

    def wrap(self, target: Any, method: str, around: Callable[..., Any], label: str) -> None:
        """Route calls of ``target.method`` through ``around(original, *args, **kwargs)``.

        If there is an ``around.applies``, only those to which, given their arguments, that says it does.
        After `undo` a wrapper that somebody kept only calls the original, so nothing of ours outlives the stack.
        """
        holder, attribute = beneath_hooks(target, method)
        original, replaced = getattr(holder, attribute), self._replaced
        applies = getattr(around, "applies", None)

        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            if not replaced or (applies is not None and not applies(*args, **kwargs)):
                return original(*args, **kwargs)
            return around(original, *args, **kwargs)

        self._put(target, holder, attribute, replacement, label)

    def overlaid(self) -> list[str]:
        """Labels of the replacements that other code has replaced since."""
        outermost = {(id(each.holder), each.attribute): each for each in self._replaced}
        return [
            label
            for target, holder, attribute, _, replacement, label in outermost.values()
            if vars(holder).get(attribute) is not replacement and not any(_kept_by_hooks(target, replacement))
        ]

    def undo(self) -> None:
        """Take every replacement out again; a second call does nothing.

        Raises:
            RuntimeError: something else has been put over a replacement since. It is left where it is and named;
                everything else is restored first.
        """
        overlaid = []
        while self._replaced:
            target, holder, attribute, original, replacement, label = self._replaced[-1]
            current = vars(holder).get(attribute, _INHERITED)
            if current is replacement:
                if original is _INHERITED:
                    del vars(holder)[attribute]
                else:
                    vars(holder)[attribute] = original
            kept = list(_kept_by_hooks(target, replacement)) if callable(replacement) else []
            for owner, name in kept:
                inherited = original is _INHERITED
                owner[name] = getattr(type(target), attribute).__get__(target) if inherited else original
            if not kept and current is not replacement and current is not original:
                overlaid.append(label)
            # Forgotten only once restored: an interrupt in between leaves the rest to a second call.
            self._replaced.pop()
        if overlaid:
            raise RuntimeError(
                "all else is restored, but these were replaced again by other code inside the block and are left "
                f"as they are: {', '.join(overlaid)}. Remove what was put over them before leaving the block."
            )

    def undo_in(self, copies: Mapping[int, Any]) -> None:
        """Take the replacements out of copies of their targets, by the target's ``id``; the targets keep them."""
        for target, holder, attribute, original, _, _ in reversed(self._replaced):
            if id(target) in copies and holder is target:
                if original is _INHERITED:
                    vars(copies[id(target)]).pop(attribute, None)
                else:
                    vars(copies[id(target)])[attribute] = original

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.undo()
        except RuntimeError as overlaid:
            if error is None:
                raise
            # The caller's own exception matters more and must arrive unchanged.
            warnings.warn(str(overlaid), RuntimeWarning, stacklevel=2)
