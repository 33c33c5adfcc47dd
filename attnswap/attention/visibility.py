"""Which keys a query sees, in a compact form: offsets and row starts instead of a dense mask.

Everything counts in key indices: query i sits at key index ``q_offset + i``. A dense mask exists only where a user
passed one; otherwise masks are built block by block.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from attnswap.attention.checks import ensure
from attnswap.attention.lazy import lazy
from attnswap.attention.modes import differentiated
from attnswap.errors import ConfigError


@dataclass(frozen=True)
class Visibility:
    """Describes the visible keys of every query.

    Attributes:
        q_length: Queries.
        k_length: Keys.
        device: Where masks are made.
        causal: A query sees no key after its own index.
        q_offset: Key index of the first query; a tensor of shape () for static caches.
        window: A query sees only the last ``window`` keys, its own included.
        row_start: First key of each query's document, shape (batch or 1, queries); None: 0.
        key_valid: False for padded keys, shape (batch, keys); None: all are valid.
        dense: A user's boolean mask, shape (batch or 1, heads or 1, queries, keys), combined by AND.
        bias: A user's additive mask of the same shape, added to the scores (its -inf entries are in ``dense``).
    """

    q_length: int
    k_length: int
    device: torch.device
    causal: bool = True
    q_offset: int | Tensor = 0
    window: int | None = None
    row_start: Tensor | None = None
    key_valid: Tensor | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None

    def to(self, device: torch.device) -> "Visibility":
        """Returns the same description for tensors on another device."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in values.items()}
        return Visibility(**moved | {"device": device})

    @property
    def plain_causal(self) -> bool:
        """Whether this is exactly what ``is_causal=True`` of a stock kernel means: square, nothing else."""
        return self.causal and self.unmasked and self._zero_offset and self.q_length == self.k_length

    @property
    def plain_full(self) -> bool:
        """Whether every query sees every key."""
        if not self.unmasked:
            return False
        return not self.causal or (self.q_length == 1 and self._last_query_at_end)

    @property
    def unmasked(self) -> bool:
        """Whether nothing but causality hides a key."""
        return all(x is None for x in (self.window, self.row_start, self.key_valid, self.dense, self.bias))

    @property
    def _zero_offset(self) -> bool:
        return isinstance(self.q_offset, int) and self.q_offset == 0

    @property
    def _last_query_at_end(self) -> bool:
        return isinstance(self.q_offset, int) and self.q_offset + self.q_length == self.k_length

    @lazy
    def sees_future(self) -> bool | Tensor:
        """Whether some query sees a key after its own index; a tensor of one boolean where a mask decides it."""
        if self.causal:
            return False
        if self.dense is None:
            return self.q_length > 1 or not self._last_query_at_end
        later = torch.arange(self.k_length, device=self.device)[None] > self.key_index()[:, None]
        return (self.dense & later).any()

    def key_index(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns the key index of queries ``start`` to ``stop``, shape (stop - start,)."""
        stop = self.q_length if stop is None else stop
        return torch.arange(start, stop, device=self.device) + self.q_offset

    def narrowed(self, window: int) -> "Visibility":
        """Returns what remains visible if a query sees at most ``window`` tokens up to its own, padding not counted."""
        order = self._order
        if order is None:
            return replace(self, window=window if self.window is None else min(window, self.window))
        own = order.gather(1, self._own_key.expand(len(order), -1))
        first = torch.searchsorted(order, (own - window + 1).contiguous())
        start = first if self.row_start is None else torch.maximum(first, self.row_start)
        return replace(self, row_start=start)

    def distance(self, start: int, stop: int, k0: int, k1: int) -> Tensor:
        """Returns how many tokens each key of a block is before each query, padding not counted.

        Returns:
            int64, shape (batch or 1, 1, stop - start, k1 - k0); negative for later keys.
        """
        if self._order is None:
            return (self.key_index(start, stop)[:, None] - torch.arange(k0, k1, device=self.device))[None, None]
        own = self._order.gather(1, self._own_key[:, start:stop].expand(len(self._order), -1))
        return (own[:, :, None] - self._order[:, None, k0:k1])[:, None]

    @lazy
    def _order(self) -> Tensor | None:
        """Which token of its row each key is, counted from 1 without padding, (batch, keys); None: the index tells."""
        valid = self.token_valid
        return None if valid is None else valid.long().cumsum(1)

    @property
    def _own_key(self) -> Tensor:
        """Index of each query's own key, shape (1, queries)."""
        return self.key_index()[None].clamp(0, max(0, self.k_length - 1))

    @lazy
    def n(self) -> Tensor:
        """Number of visible keys, int64, shape (batch or 1, heads or 1, queries)."""
        if self.dense is not None:
            starts = [512 * i for i in range(-(-self.q_length // 512))]
            return torch.cat([self.mask(i, min(i + 512, self.q_length)).sum(-1) for i in starts], -1)
        start, end = (bound.long() for bound in self.spans)
        start = torch.minimum(start, end)
        if self.key_valid is None:
            return (end - start)[:, None]
        seen = torch.nn.functional.pad(self.key_valid.long().cumsum(-1), (1, 0)).expand(len(start), -1)
        return (seen.gather(1, end) - seen.gather(1, start))[:, None]

    @lazy
    def spans(self) -> tuple[Tensor, Tensor]:
        """First key and one past the last key that each query may see, int32, shape (batch or 1, queries).

        What hides keys in between is in :attr:`holes` and :attr:`dense`.
        """
        position = self.key_index()[None]
        last = position + 1 if self.causal else torch.full_like(position, self.k_length)
        first = torch.zeros_like(position)
        if self.window is not None:
            first = position - self.window + 1
        if self.row_start is not None:
            first = torch.maximum(first, self.row_start)
        if self.key_valid is not None:
            keys = torch.arange(self.k_length, device=self.device)
            first = torch.maximum(first, torch.where(self.key_valid, keys, self.k_length).amin(1, keepdim=True))
            last = torch.minimum(last, torch.where(self.key_valid, keys + 1, 0).amax(1, keepdim=True))
        first, last = torch.broadcast_tensors(first.clamp(0, self.k_length), last.clamp(0, self.k_length))
        return first.int().contiguous(), last.int().contiguous()

    @lazy
    def holes(self) -> Tensor | None:
        """:attr:`key_valid` where it hides keys between others, None where padding is at the ends alone."""
        if self.key_valid is None or torch.compiler.is_compiling():
            return self.key_valid
        changes = (self.key_valid[:, 1:] & ~self.key_valid[:, :-1]).sum(1) + self.key_valid[:, 0]
        return self.key_valid if bool((changes > 1).any()) else None

    def key_span(self, start: int, stop: int) -> tuple[int, int]:
        """Returns a range of keys outside which queries ``start`` to ``stop`` see nothing."""
        if not self.causal or isinstance(self.q_offset, Tensor):
            return 0, self.k_length
        first = 0 if self.window is None else max(0, start + self.q_offset - self.window + 1)
        return min(first, self.k_length), max(min(stop + self.q_offset, self.k_length), min(first, self.k_length))

    def mask(self, start: int = 0, stop: int | None = None, k0: int = 0, k1: int | None = None) -> Tensor:
        """Returns the boolean mask of a block.

        Args:
            start: First query.
            stop: One past the last query; default: all.
            k0: First key.
            k1: One past the last key; default: all.

        Returns:
            True where a key is visible, shape (batch or 1, heads or 1, stop - start, k1 - k0).
        """
        stop = self.q_length if stop is None else stop
        k1 = self.k_length if k1 is None else k1
        q = self.key_index(start, stop)[:, None]
        k = torch.arange(k0, k1, device=self.device)[None]
        seen = k <= q if self.causal else torch.ones(1, 1, dtype=torch.bool, device=self.device).expand(len(q), k1 - k0)
        if self.window is not None:
            seen = seen & (k > q - self.window)
        seen = seen[None, None]
        if self.row_start is not None:
            seen = seen & (k[None, None] >= self.row_start[:, None, start:stop, None])
        if self.key_valid is not None:
            seen = seen & self.key_valid[:, None, None, k0:k1]
        if self.dense is not None:
            seen = seen & self.dense[:, :, start:stop, k0:k1]
        return seen

    @lazy
    def token_valid(self) -> Tensor | None:
        """Keys that belong to real tokens, shape (batch or 1, keys); None: all of them.

        Under a dense mask a key that neither sees itself nor is seen by another query is padding, as far as its own
        row is among the queries; nothing is known of keys from before.
        """
        if self.dense is None:
            return self.key_valid
        index = torch.arange(self.k_length, device=self.device) - self.q_offset
        valid = self._seen_somewhere | (index < 0) | (index >= self.q_length)
        return valid if self.key_valid is None else valid & self.key_valid

    @lazy
    def _seen_somewhere(self) -> Tensor:
        """Keys that some query of some head sees, shape (batch or 1, keys)."""
        return self.mask().any(2).any(1)

    def shows(self, hidden: Tensor) -> bool | Tensor:
        """Whether some query sees a key of ``hidden``, shape (batch, keys), under a user's dense mask."""
        return self.dense is not None and (self._seen_somewhere & hidden).any()


DOUBTFUL = -1e3
"""Additive mask values from here down to half the dtype's minimum are refused: -1e4 and -1e9 mean "hidden" to many,
but a softmax row of such keys alone still attends, and they would count as visible keys."""


def split_mask(mask: Tensor, full: tuple[int, int, int, int]) -> tuple[Tensor, Tensor | None]:
    """Splits a user's mask into a boolean part and an additive part.

    Args:
        mask: Boolean (True: visible), or additive of a floating point dtype; 2 to 4 dimensions, broadcast from the
            right as ``scaled_dot_product_attention`` does.
        full: The shape (batch, heads, queries, keys) it is for.

    Returns:
        ``(dense, bias)`` of shape (batch or 1, heads or 1, queries, keys); an additive value at or below half the
        smallest finite number of its dtype means invisible.

    Raises:
        ConfigError: The mask is of another dtype or shape, or holds numbers that hide a key only nearly.
    """
    if not 2 <= mask.ndim <= 4:
        raise ConfigError(
            f"attn_mask has shape {tuple(mask.shape)}; give (queries, keys) up to (batch, heads, queries, keys)"
        )
    shape = tuple(mask.shape)
    mask = mask[(None,) * (4 - mask.ndim)]
    if any(size not in (1, whole) for size, whole in zip(mask.shape, full, strict=True)):
        raise ConfigError(
            f"the attention mask of shape {shape} does not fit {full[0]} rows, {full[1]} heads, {full[2]} queries and "
            f"{full[3]} keys"
        )
    mask = mask.expand(*mask.shape[:2], *full[2:])
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        raise ConfigError(f"attn_mask has dtype {mask.dtype}; give a boolean mask (True: visible) or an additive one")
    visible = mask > torch.finfo(mask.dtype).min / 2
    ensure(
        (mask < torch.inf).all(),
        "attn_mask holds NaN or +inf (0 * -inf is NaN): write it with torch.where or masked_fill",
    )
    doubtful = visible & (mask <= DOUBTFUL)
    ensure(
        ~doubtful.any(),
        f"attn_mask holds a number in {mask.dtype} that hides a key only nearly: write torch.finfo(mask.dtype).min or "
        "-inf, or give a boolean mask (True: visible); clamp a real bias at -999",
        lambda: f". The largest is {float(mask[doubtful].max()):g}",
    )
    bias = mask.masked_fill(~visible, 0.0)
    needed = differentiated(mask) or torch.compiler.is_compiling() or bool(bias.any())
    return visible, (bias if needed else None)
