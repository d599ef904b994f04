"""What others have put inside a transformer block, and what comes of it where the block runs tile by tile."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..listening import is_of_user, listen_everywhere, lookers


def looking(block: nn.Module) -> list[str]:
    """Kinds of hooks inside a block that are not for weights alone.

    Those of caches keep what an attention gave for another call of it, which would be another tile's; others look at
    all tokens of a call together.
    """
    return sorted({type(hook).__name__ for hook in lookers(each for each in block.modules() if each is not block)})


def passed_on(arguments: Mapping[str, Any], image: int, text: int) -> list[str]:
    """What is passed on to attention in a dictionary, and has rows of tokens as it seems: masks of users.

    An IP-Adapter's pictures may be as wide as there are tokens, but have none.
    """
    counts = {image, image + text}
    return sorted(
        key
        for argument in arguments.values()
        if isinstance(argument, dict)
        for key, value in argument.items()
        if key != "ip_hidden_states"
        and any(isinstance(each, torch.Tensor) and counts & set(each.shape) for each in tree_leaves(value))
    )


def listening(block: nn.Module) -> Iterator[str]:
    """The modules inside a block on which there are forward hooks of the user, ``""`` for hooks on all there are."""
    if listen_everywhere():
        yield ""
    for path, module in block.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if path and any(map(is_of_user, hooks)):
            yield path
