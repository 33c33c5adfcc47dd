"""The mask function: transformers' description of a mask, turned into a compact one once per forward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import SequenceKey, register_pytree_node, tree_map_only
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from attnswap.attention.checks import ensure
from attnswap.attention.visibility import Visibility
from attnswap.errors import UnsupportedModelError

SOFT_MASK = -50.0
"""An additive mask of 0 and one number at or below this is meant to hide keys, as in some vision models."""


@dataclass(frozen=True, slots=True)  # without a __dict__, into which exporters would write
class ForwardMask:
    """The mask that a patched model passes to its attention modules, described compactly instead of as a tensor.

    ``generate`` with a static cache makes masks ahead of the forward, and treats them as 4-D tensors on the way. Models
    that compute with their mask find a boolean tensor in its place.

    Attributes:
        visibility: Which keys each query sees.
        arguments: What the mask function was called with, so that the mask of any other implementation can be made.
        made: Masks made so far, by implementation.
        origin: The mask on another device that this one was moved from.
    """

    visibility: Visibility
    arguments: Mapping[str, Any]
    made: dict[str, Any] = field(default_factory=dict)
    origin: "ForwardMask | None" = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape a mask tensor would have: (batch, 1, queries, keys)."""
        return self.arguments["batch_size"], 1, self.visibility.q_length, self.visibility.k_length

    @property
    def ndim(self) -> int:
        """Dimensions of :attr:`shape`."""
        return 4

    def tensor(self) -> Tensor:
        """Returns the boolean mask (batch, 1, queries, keys), True where a key is visible."""
        if "tensor" not in self.made and self.origin is not None:
            self.made["tensor"] = self.origin.tensor().to(self.visibility.device)
        if "tensor" not in self.made:
            whole = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            self.made["tensor"] = sdpa_mask(**{**self.arguments, **whole})
        return self.made["tensor"]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls a function of torch with the mask as a tensor, wherever it stands among the arguments."""
        args, kwargs = tree_map_only(cls, cls.tensor, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the mask as a tensor."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Tensor:
        """Returns a part of the mask as a tensor."""
        return self.tensor()[index]

    def __invert__(self) -> Tensor:
        """Returns where keys are hidden."""
        return ~self.tensor()

    def contiguous(self) -> Self:
        """Returns itself."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> "ForwardMask | Tensor":
        """Returns the mask on another device, as libraries that place layers on devices move what layers are given."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype not in (None, torch.bool):
            return self.tensor().to(*args, **kwargs)
        if device is None or device == self.visibility.device:
            return self
        return ForwardMask(self.visibility.to(device), self.arguments, origin=self)

    def for_implementation(self, name: str) -> Any:
        """Returns the mask exactly as transformers makes it for another attention implementation."""
        if name not in self.made and self.origin is not None:
            mask = self.origin.for_implementation(name)
            self.made[name] = mask if mask is None else mask.to(self.visibility.device)
        if name not in self.made:
            self.made[name] = ALL_MASK_ATTENTION_FUNCTIONS[name](**self.arguments)
        return self.made[name]


# Exported programs take masks that generate made ahead as one tensor.
register_pytree_node(
    ForwardMask,
    lambda mask: ([mask.tensor()], None),
    lambda tensors, context: next(iter(tensors)),
    serialized_type_name="attnswap.ForwardMask",
    flatten_with_keys_fn=lambda mask: ([(SequenceKey(0), mask.tensor())], None),
)


@dataclass
class Pattern:
    """The parts of a mask function that have a closed form."""

    causal: bool = False
    window: int | None = None
    documents: Tensor | None = None


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: "Tensor | ForwardMask | None" = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> ForwardMask:
    """Describes a mask; registered with transformers' ``AttentionMaskInterface``.

    Args:
        batch_size: Rows of the batch.
        q_length: Queries.
        kv_length: Keys, as the cache will return them.
        q_offset: Index of the first query in the sequence.
        kv_offset: Index of the first key in the sequence (sliding caches drop older ones).
        mask_function: transformers' rule of which indices see each other.
        attention_mask: Padding, shape (batch, seen tokens), True for real tokens; or a mask made ahead.
        device: Where masks are made.
        **kwargs: Arguments that only other implementations read.

    Returns:
        The compact description. A rule without a known closed form is evaluated into a dense mask.
    """
    if isinstance(attention_mask, ForwardMask):
        return attention_mask
    # A static cache hands out its own counter and moves it in place before the mask of another implementation is made.
    q_offset = q_offset.clone() if isinstance(q_offset, Tensor) else q_offset
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "device": device,
        **kwargs,
    }
    device = torch.device(device)
    pattern = Pattern()
    if not recognise(mask_function, pattern):
        dense = sdpa_mask(**{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        visibility = Visibility(q_length, kv_length, device, causal=False, q_offset=q_offset - kv_offset, dense=dense)
        return ForwardMask(visibility, arguments)
    valid = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if valid is not None:
        valid = valid[:, kv_offset : kv_offset + kv_length].bool()
        valid = None if not torch.compiler.is_compiling() and bool(valid.all()) else valid
    visibility = Visibility(
        q_length,
        kv_length,
        device,
        causal=pattern.causal,
        q_offset=q_offset - kv_offset,
        # A window as long as the keys hides nothing.
        window=None if pattern.window is not None and pattern.window >= kv_length else pattern.window,
        row_start=None if pattern.documents is None else document_starts(pattern.documents),
        key_valid=valid,
    )
    return ForwardMask(visibility, arguments)


def recognise(mask_function: Callable, into: Pattern) -> bool:
    """Reads the closed form of a rule out of the functions transformers composed it from.

    Args:
        mask_function: The rule.
        into: Receives what was found.

    Returns:
        Whether every part of the rule was understood.
    """
    if mask_function is bidirectional_mask_function:
        return True
    if mask_function is causal_mask_function:
        into.causal = True
        return True
    if torch.compiler.is_compiling():  # which cannot read a closure: composed rules are evaluated, as stock models do
        return False
    name = getattr(mask_function, "__qualname__", "").split(".<locals>")[0]
    names = getattr(getattr(mask_function, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, (c.cell_contents for c in getattr(mask_function, "__closure__", None) or ()), strict=True))
    if name == "and_masks":
        return all(recognise(part, into) for part in cells["mask_functions"])
    if name == "sliding_window_overlay":
        into.window = min(cells["sliding_window"], into.window or cells["sliding_window"])
        return True
    if name == "packed_sequence_mask_function":
        into.documents = cells["packed_sequence_mask"]
        return True
    if name == "remap_positions_for_packed_sequence":
        # Positions grow by one within a document, so offsets between them are offsets between indices.
        return recognise(cells["mask_function"], into)
    return False


def with_lengths(visibility: Visibility, kwargs: Mapping[str, Any]) -> Visibility:
    """Honours ``cu_seq_lens_q`` and ``cu_seq_lens_k``, which say where the documents of a padding-free batch begin.

    Args:
        visibility: The model's mask; it may contain the documents already, from position ids that restart at 0.
        kwargs: What the attention function received.

    Raises:
        UnsupportedModelError: They contradict the mask, or the batch has padding, a cache or a mask of its own.
    """
    lengths = kwargs.get("cu_seq_lens_q")
    if lengths is None:
        return visibility
    tokens = visibility.q_length
    if visibility.k_length != tokens or not visibility.causal or visibility.dense is not None:
        raise UnsupportedModelError(
            "cu_seq_lens_q describes a causal batch without padding, cache or mask of its own, which this batch is not"
        )
    lengths, others = lengths.long(), kwargs.get("cu_seq_lens_k")
    position = torch.arange(tokens, device=lengths.device)
    starts = lengths[torch.searchsorted(lengths, position, right=True) - 1][None].to(visibility.device)
    agrees = (lengths[0] == 0) & (lengths[-1] == tokens)
    if others is not None:
        agrees = agrees & torch.tensor(torch.equal(lengths, others.long()), device=agrees.device)
    if visibility.row_start is not None:
        agrees = agrees & (visibility.row_start == starts).all().to(agrees.device)
    ensure(
        agrees,
        "cu_seq_lens_q does not begin at 0 and end with the batch, or the documents are others than those of "
        "cu_seq_lens_k or of the positions",
        error=UnsupportedModelError,
    )
    return replace(visibility, row_start=starts)


def document_starts(documents: Tensor) -> Tensor:
    """Returns the index at which each token's document begins.

    Args:
        documents: Document number of each token, not decreasing along the row, shape (batch, tokens).

    Returns:
        Indices of shape (batch, tokens).
    """
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(first, index, 0).cummax(1).values


def refuse_soft_mask(module: torch.nn.Module, bias: Tensor) -> None:
    """Refuses an additive mask that hides keys from softmax but not from other normalizers.

    Args:
        module: The attention module, for the message.
        bias: What is added to the scores, of any shape.

    Raises:
        UnsupportedModelError: It holds 0 and one other number, such as -100.
    """
    if not bias.numel():
        return
    lowest = bias.detach().amin()
    ensure(
        ~((lowest <= SOFT_MASK) & ((bias == 0) | (bias == lowest)).all()),
        f"the mask of {type(module).__name__} holds 0 and one number of {SOFT_MASK:g} or less, such as -100, "
        "which hides keys from softmax only: other swaps would still count them",
        error=UnsupportedModelError,
    )
