"""Weights that a model ties by name, kept apart from swaps: layers that share one attention have swaps of their own."""

import re

from torch import nn

from attnswap.surgery.spec import KEY
from attnswap.surgery.stacks import AttentionStack

_BUT_SWAPS = rf"(?!.*\.{KEY}\.)"
"""Put behind a pattern of tied names, so that it matches no name of a swap's tensor."""


def untie(stack: AttentionStack) -> None:
    """Excludes the swaps of a stack from what its model ties by name."""
    chosen = {id(module) for _, module in stack.modules.values()}
    for owner in stack.model.modules():
        tied = getattr(owner, "_tied_weights_keys", None)
        if not isinstance(tied, dict) or any(pattern.endswith(_BUT_SWAPS) for pattern in tied):
            continue
        names = [f"{name}.{KEY}." for name, module in owner.named_modules() if id(module) in chosen]
        if any(re.search(f"^{pattern}", name) for pattern in tied for name in names):
            owner._tied_weights_keys = {to + _BUT_SWAPS: source + _BUT_SWAPS for to, source in tied.items()}  # type: ignore[assignment]


def retie(model: nn.Module) -> None:
    """Undoes :func:`untie`."""
    for owner in model.modules():
        tied = getattr(owner, "_tied_weights_keys", None)
        if isinstance(tied, dict) and any(pattern.endswith(_BUT_SWAPS) for pattern in tied):
            plain = {to.removesuffix(_BUT_SWAPS): source.removesuffix(_BUT_SWAPS) for to, source in tied.items()}
            owner._tied_weights_keys = plain  # type: ignore[assignment]
