"""The attention implementation that a layer had before it was patched, called for all of its heads or for some."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attnswap.attention.heads import kv_heads_of, pick, regular_heads
from attnswap.errors import CheckpointError, UnsupportedModelError
from attnswap.surgery.masks import ForwardMask
from attnswap.surgery.spec import KEY

SAME_FOR_ALL = {"training", "head_dim", "scaling", "attention_dropout", "is_causal", "layer_idx"}
"""What an eager function may read of its module when it is called with some of the heads: none of it is per head."""


class _NeedsAllHeads(Exception):
    """An attention function reads an attribute that may be per head. Not an AttributeError, which ``hasattr`` hides."""


class _StandIn:
    """A proxy of a module or config for an attention function, in which some attributes differ from the real ones.

    Args:
        real: The module or config.
        differs: Attributes by name.
        allowed: The other attributes that may be read; None: all.
    """

    def __init__(self, real: Any, differs: Mapping[str, Any], allowed: set[str] | None = None) -> None:
        self._real = real
        self._differs = differs
        self._allowed = allowed

    def __getattr__(self, name: str) -> Any:
        if name in self._differs:
            return self._differs[name]
        if self._allowed is not None and name not in self._allowed:
            raise _NeedsAllHeads(name)
        return getattr(self._real, name)


@dataclass(frozen=True)
class Previous:
    """One call of the previous implementation.

    Attributes:
        module: The attention module.
        name: The implementation: a name of transformers' ``ALL_ATTENTION_FUNCTIONS`` or ``"eager"``.
        query: Shape (batch, heads, queries, head_dim).
        key: Shape (batch, kv heads, keys, head_dim).
        value: Shape (batch, kv heads, keys, value_dim).
        mask: What the model passed as its mask.
        options: The other arguments of the call.
        reusable: Whether folded swaps may use it as their softmax kernel.
    """

    module: nn.Module
    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: ForwardMask | Tensor | None
    options: dict[str, Any]
    reusable: bool = True

    def all_heads(self) -> tuple[Tensor, Tensor | None]:
        """Computes all heads: output (batch, queries, heads, value_dim), and weights where it returns any."""
        return self._call(self._whole_module(), self.query, self.key, self.value, self._mask(), self.options)

    def some_heads(self, heads: Sequence[int]) -> Tensor:
        """Computes some heads, bit for bit as a call with all heads would, and others only where that needs them.

        transformers' shared functions treat every head alike, and so does a modeling file's eager function as long as
        it reads nothing of its module that may be per head. Any other function computes all heads (one that users
        registered, or the eager one of code that came with a checkpoint). So do, for a single query, eager functions,
        and any function where heads that share keys are separated: GEMM rounding depends on the shape of the batch.
        Dropout is drawn for the computed heads only.

        Args:
            heads: Query heads in ascending order, at least one.

        Returns:
            Shape (batch, len(heads), queries, value_dim).
        """
        groups = self.query.shape[1] // self.key.shape[1]
        chosen, size = regular_heads(kv_heads_of(heads, groups))
        alone = self.query.shape[2] == 1 and (self.name == "eager" or size != groups)
        if len(heads) < self.query.shape[1] and self._divisible and not alone:
            query, key, value = pick(self.query, heads), pick(self.key, chosen), pick(self.value, chosen)
            try:
                return self._of(heads, query, key, value)
            except _NeedsAllHeads:
                pass
        return pick(self.all_heads()[0].transpose(1, 2), heads)

    def kernel(self, heads: Sequence[int] | None) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """Returns the function as a softmax kernel for other queries and values, or None where torch's must serve.

        Args:
            heads: The query heads it will be called with, in their order; None: all.
        """
        if not self.reusable or not isinstance(self.mask, ForwardMask) or self._by_position:
            return None
        if self.options.get("softcap") is not None:
            return None
        if self.name == "flex_attention":
            serves = self.query.device.type != "cpu" or not (self._learns or self.options.get("s_aux") is not None)
        else:
            serves = self._flash and self._flash_sees(self.mask)
        chosen = range(self.query.shape[1]) if heads is None else heads
        return (lambda query, key, value: self._of(chosen, query, key, value)) if serves else None

    def _of(self, heads: Sequence[int], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Calls the function for some heads with queries, keys and values of theirs, in equal groups."""
        total, options, mask = self.query.shape[1], dict(self.options), self._mask()
        differs: dict[str, Any] = {"num_key_value_groups": query.shape[1] // key.shape[1]}
        sinks = options.get("s_aux")
        if sinks is not None:
            options["s_aux"] = pick(sinks, heads, 0)
            # The module's own reference to the sinks it passed on; which attribute that is, is up to the model.
            differs |= {name: options["s_aux"] for name, x in self.module._parameters.items() if x is sinks}
        # flex_attention reads one head's mask for all of them, so there it stays whole.
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == total > 1 and self.name != "flex_attention":
            mask = pick(mask, heads)
        allowed = SAME_FOR_ALL if self.name == "eager" else None
        if allowed is None:
            differs["config"] = self._config()
        module = _StandIn(self.module, differs, allowed)
        return self._call(module, query, key, value, mask, options)[0].transpose(1, 2)

    def _call(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: dict[str, Any]) -> Any:
        return previous_function(self.module, self.name)(module, query, key, value, mask, **options)

    def _mask(self) -> Any:
        if isinstance(self.mask, ForwardMask):
            return self.mask.for_implementation(self.name)
        if self.mask is not None and self.mask.dtype == torch.bool and self.name in ("eager", "flex_attention"):
            # These add their mask to the scores, to which True and False are 1 and 0.
            hidden = torch.finfo(self.query.dtype).min
            return torch.zeros_like(self.mask, dtype=self.query.dtype).masked_fill(~self.mask, hidden)
        return self.mask

    def _whole_module(self) -> Any:
        # The flash functions load the kernel that the config names, which in a patched model is attnswap.
        return _StandIn(self.module, {"config": self._config()}) if self._flash else self.module

    def _config(self) -> Any:
        return _StandIn(getattr(self.module, "config", None), {"_attn_implementation": self.name})

    @property
    def _flash(self) -> bool:
        return self.name.startswith("flash_attention_")

    @property
    def _divisible(self) -> bool:
        if self._by_position:
            return False
        if self.name == "eager":
            return previous_function(self.module, "eager").__module__.startswith("transformers.")
        return self.name in ("sdpa", "flex_attention") or self._flash

    @property
    def _by_position(self) -> bool:
        """Whether the call adds learned numbers of single queries or keys, each head its own."""
        return any(self.options.get(name) is not None for name in ("position_bias", "sinks"))

    @property
    def _learns(self) -> bool:
        """Whether a gradient may be asked for, which flex_attention does not give on a CPU."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.query, self.key, self.value))

    def _flash_sees(self, mask: ForwardMask) -> bool:
        """Whether a flash function sees exactly the keys that a compact mask describes.

        It knows causality and windows from its own arguments, packed rows from position ids in a batch of one, and
        takes padding out before it counts a window.
        """
        seen, padding, options = mask.visibility, mask.for_implementation(self.name), self.options
        causal, window = options.get("is_causal"), options.get("sliding_window")
        causal = getattr(self.module, "is_causal", True) if causal is None else causal
        window = window if window is not None and window < seen.k_length else None
        if seen.dense is not None or not (seen.causal and causal) or isinstance(seen.q_offset, Tensor):
            return False
        if seen.window != window or (window is not None and seen.holes is not None):
            return False
        if seen.row_start is not None and (self.query.shape[0] > 1 or options.get("position_ids") is None):
            return False
        keys = seen.k_length if padding is None else padding.shape[1]
        return seen.q_offset + seen.q_length == keys  # it aligns the last query with the last key


def check_implementation(name: str) -> None:
    """Refuses an attention implementation that transformers does not know, or that is attnswap itself.

    Names with a slash are kernels of the hub, which transformers fetches when it needs them.

    Raises:
        CheckpointError: It is one.
    """
    known = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()} - {KEY}
    if name not in known and "/" not in name:
        raise CheckpointError(
            f"the attnswap entry of config.json says that the model computed its attention by {name!r} before, which "
            "transformers does not know here: register it first, or load with attn_implementation="
        )


def previous_function(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Returns the attention function a module used before; ``"eager"`` is the one of its own modeling file."""
    eager: Any = None
    for cls in type(module).__mro__:
        eager = eager or getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
    if name == "eager" and eager is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no eager attention function to fall back to")
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
