"""Inside the attention of a transformer block: its keys and values are noted, or others join them.

All joint attention ends in ``F.scaled_dot_product_attention``, after whatever a block does to queries and keys. What
holds there for the length of one call needs to know nothing of the block, and no processor has to be exchanged.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ...core.patching import PatchStack
from ..attention.log_weights import PARAMETERS, weighted
from .pooled import Keys

# What joining must know the inside of: torch's own kernels, as processors ask for them, end in
# ``F.scaled_dot_product_attention`` with tokens in the last dimension but one.
LEANS_ON = ("diffusers.models.attention_dispatch._native_attention",)

_SHARES = PARAMETERS[:3]

Rows = slice | torch.Tensor  # places of some, if they are not one after another


@dataclass
class Attending:
    """A call of attention: its arguments by name, and which of its queries and keys are of the image.

    Those of text are before or after them, as are other keys beside which there are no queries. Keys and values of
    which `attend` wants as many `copies`, for heads side by side, are there once.
    """

    attend: Callable[..., torch.Tensor]
    given: dict[str, Any]
    image: slice
    image_keys: slice
    copies: int = 1

    @property
    def text_first(self) -> bool:
        return bool(self.image.start)

    @property
    def text(self) -> slice:
        return slice(0, self.image.start) if self.text_first else slice(self.image.stop, None)

    @property
    def other_keys(self) -> slice:
        return slice(0, self.image_keys.start) if self.text_first else slice(self.image_keys.stop, None)

    @property
    def others(self) -> int:
        """How many keys there are beside those of the image; none in attention to that alone."""
        return int(self.part("key", self.other_keys).shape[2])

    @property
    def texts(self) -> int:
        """How many queries are of text; none in attention of the image alone."""
        return int(self.part("query", self.text).shape[2])

    def holding(self, parts: Iterable[torch.Tensor], count: int) -> "Attending":
        """The same call with these queries, keys and values, of so many tokens of the image; others are as they were.

        Its mask stays as it is: `mask_of` tells that of all these tokens.
        """
        given = self.given | dict(zip(_SHARES, parts, strict=True))
        image, image_keys = (slice(rows.start, rows.start + count) for rows in (self.image, self.image_keys))
        return Attending(self.attend, given, image, image_keys, self.copies)

    def mask_of(self, count: int) -> torch.Tensor | None:
        """The call's mask for so many tokens of the image, all of which it treats as it does the first one."""
        mask: torch.Tensor | None = self.given.get("attn_mask")
        if mask is None:
            return None
        mask = mask[(None,) * (4 - mask.ndim)]
        for dim, name, rows in ((2, "query", self.image), (3, "key", self.image_keys)):
            if mask.shape[dim] > 1:
                after = self.given[name].shape[2] - rows.stop
                sizes = [count if i == dim else -1 for i in range(4)]
                image = mask.narrow(dim, rows.start, 1).expand(sizes)
                last = mask.narrow(dim, mask.shape[dim] - after, after)
                mask = torch.cat([mask.narrow(dim, 0, rows.start), image, last], dim=dim)
        return mask

    def of_others(self, *parts: torch.Tensor) -> "Attending":
        """The same call of other queries, keys and values of the image, all of which are masked as the first is."""
        count = parts[0].shape[2]
        whole = []
        for name, part in zip(_SHARES, parts, strict=True):
            before, after = self._around(name)
            whole.append(torch.cat([before, part, after], dim=2))
        some = self.holding(whole, count)
        return replace(some, given=some.given | {"attn_mask": self.mask_of(count)})

    def narrowed(self, places: torch.Tensor) -> "Attending":
        """The same call with those tokens of the image alone that are at `places` among these."""
        return self.of_others(*(self.part(name, places + rows.start) for name, rows in self.shares()))

    def shares(self) -> list[tuple[str, slice]]:
        """Queries, keys and values by name, and where in each the image's are."""
        return list(zip(_SHARES, (self.image, self.image_keys, self.image_keys), strict=True))

    def _around(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one of these what comes before the image's and after."""
        rows = dict(self.shares())[name]
        return self.part(name, slice(0, rows.start)), self.part(name, slice(rows.stop, None))

    def with_room(self, name: str, count: int) -> torch.Tensor:
        """Rows of one of these with room for so many of the image, which are not there yet."""
        before, after = self._around(name)
        whole = before.new_empty(*before.shape[:2], before.shape[2] + count + after.shape[2], before.shape[3])
        whole[:, :, : before.shape[2]] = before
        whole[:, :, before.shape[2] + count :] = after
        return whole

    def of_heads(self, first: int, last: int) -> "Attending":
        """What some heads of keys do of the call, and those of queries that share them."""
        shared = self.given["query"].shape[1] // self.given["key"].shape[1]
        query, key, value = (self.given[name] for name in _SHARES)
        some = query[:, first * shared : last * shared], key[:, first:last], value[:, first:last]
        return replace(self, given=self.given | dict(zip(_SHARES, some, strict=True)))

    def nothing(self) -> torch.Tensor:
        """What has the shape of the result, and lies token after token as that of torch's kernels does."""
        value: torch.Tensor = self.given["value"]
        (batch, heads, count, _), channels = self.given["query"].shape, value.shape[-1]
        strides = count * heads * channels, channels, heads * channels, 1
        return value.new_empty_strided((batch, heads, count, channels), strides).zero_()

    def part(self, name: str, rows: Rows) -> torch.Tensor:
        """Some rows of ``"query"``, ``"key"`` or ``"value"``, ``[B, heads, n, C]``."""
        part: torch.Tensor = self.given[name][:, :, rows]
        return part

    def grouped(self, queries: torch.Tensor) -> torch.Tensor:
        """Scaled queries ``[B, heads, N, C]``, those that share keys side by side: ``[B, heads of keys, n, C]``."""
        scale = float(self.given.get("scale") or queries.shape[-1] ** -0.5)
        shared = queries.shape[1] // self.given["key"].shape[1]
        batch, heads, count, channels = queries.shape
        return scale * queries.float().reshape(batch, heads // shared, shared * count, channels)

    def among(self, keys: torch.Tensor, values: torch.Tensor, log_weights: torch.Tensor | None = None) -> torch.Tensor:
        """The attention of the text to its own keys and those of the whole image, in the order of the call's.

        These may have log-weights ``[n]``.
        """
        mask = self._mask(self.text)
        if mask is not None:
            columns = [mask[..., self.other_keys], self._of_image(mask, keys.shape[2] - self.others)]
            mask = torch.cat(columns if self.text_first else columns[::-1], dim=-1)
            mask = mask.repeat(1, 1, self.copies if mask.shape[2] > 1 else 1, 1)
        # Not by copies of all keys: queries of heads that share them come one after another.
        query = self.part("query", self.text)
        batch, heads, count, channels = query.shape
        query = query.reshape(batch, heads // self.copies, self.copies * count, channels)
        given = self.given | {"query": query, "key": keys, "value": values, "attn_mask": mask}
        if log_weights is None:
            mixed = self.attend(**given)
        else:
            room = (self.others, 0) if self.text_first else (0, self.others)
            log_weights = F.pad(log_weights, room)
            if mask is None:
                mixed = weighted(self.attend, given, log_weights[None, None])
            else:
                mixed = self.attend(**given | {"attn_mask": _added(mask, query.dtype) + log_weights.to(query.dtype)})
        return mixed.reshape(batch, heads, count, values.shape[-1])

    def joined(self, queries: Rows, others: Sequence[Keys]) -> torch.Tensor:
        """The attention of some queries to the call's keys and others."""
        mask, query = self._mask(queries), self.part("query", queries)
        key = self._with_copies([self.given["key"], *(each.keys for each in others)])
        value = self._with_copies([self.given["value"], *(each.values for each in others)])
        given = self.given | {"query": query, "key": key, "value": value, "attn_mask": mask}
        if not others:
            return self.attend(**given)
        weights = torch.cat([each.log_weights for each in others], dim=2)
        weights = weights.repeat_interleave(query.shape[1] // weights.shape[1], dim=1)
        if mask is None:
            return weighted(self.attend, given, F.pad(weights, (self.given["key"].shape[2], 0)))
        mask = _added(mask, query.dtype)
        others_mask = self._of_image(mask, 1) + weights[:, :, None].to(query.dtype)
        sizes = torch.broadcast_shapes(mask.shape[:-1], others_mask.shape[:-1])  # type: ignore[no-untyped-call]
        mask = torch.cat([each.expand(*sizes, -1) for each in (mask, others_mask)], dim=-1)
        return self.attend(**given | {"attn_mask": mask})

    def _with_copies(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """All of them, one after another, for every head."""
        joined = torch.cat(list(parts), dim=2) if len(parts) > 1 else parts[0]
        return joined.repeat_interleave(self.copies, dim=1) if self.copies > 1 else joined

    def _mask(self, queries: Rows) -> torch.Tensor | None:
        """Of the call, for some queries, with a column for each key: ``[.., .., 1 or queries, K]``."""
        mask: torch.Tensor | None = self.given.get("attn_mask")
        if mask is None:
            return None
        mask = mask[(None,) * (4 - mask.ndim)]
        mask = mask[:, :, queries] if mask.shape[2] > 1 else mask
        return mask.expand(*mask.shape[:-1], self.given["key"].shape[2])

    def _of_image(self, mask: torch.Tensor, count: int) -> torch.Tensor:
        """As many columns for other tokens of the image, which are masked like the first one of the call's."""
        column = mask[..., self.image_keys][..., :1]
        return column.expand(*column.shape[:-1], count)


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as what is added to scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


class Joining(TorchFunctionMode):
    """Gives the first `attentions` calls of ``F.scaled_dot_product_attention`` to `do`, with their places among them.

    Those that attend to `image` tokens alone, or to so many keys `beside` them, or to text, whose rows are before or
    after them, and to as many keys `between` these; others (to pictures that are told in words of their own) are none
    of ours. `met` counts them all. Of heads' keys all but one of `copies` are left out.
    """

    def __init__(
        self,
        do: Callable[[int, Attending], torch.Tensor],
        attentions: int,
        image: int,
        text: int,
        text_first: bool,
        between: int = 0,
        beside: int = 0,
        copies: int = 1,
    ) -> None:
        super().__init__()
        self.do, self.attentions, self.met, self.copies = do, attentions, 0, copies
        start, start_of_keys = (text, text + between) if text_first else (0, 0)
        self.places = {  # by the numbers of queries and keys
            (image + text, image + text + between): (start, start_of_keys),
            (image, image): (0, 0),
            (image, image + beside): (0, 0),
        }
        self.image = image

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(PARAMETERS, args, strict=False)) | kwargs
        place = self.places.get((given["query"].shape[-2], given["key"].shape[-2]))
        if given["key"].ndim != 4 or place is None:
            return func(*args, **kwargs)
        self.met += 1
        if self.met > self.attentions:
            return func(*args, **kwargs)
        copies = self.copies if given["key"].shape[1] == given["query"].shape[1] else 1
        given |= {name: given[name][:, ::copies] for name in ("key", "value")}
        image, image_keys = (slice(start, start + self.image) for start in place)
        return self.do(self.met - 1, Attending(func, given, image, image_keys, copies))


@contextmanager
def native_kernels(block: nn.Module) -> Iterator[None]:
    """Inside, attention of a block goes to torch's own kernels, whichever were asked for.

    Others take no log-weights, and nothing could join in them.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName  # not in all versions

    with PatchStack() as stack:
        processors = {id(each): each for module in block.modules() if (each := getattr(module, "processor", None))}
        for processor in processors.values():
            if hasattr(processor, "_attention_backend"):
                label = f"{type(processor).__name__}._attention_backend"
                stack.set(processor, "_attention_backend", AttentionBackendName.NATIVE, label)
        yield
