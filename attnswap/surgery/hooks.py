"""Removing hooks from torch's tables of hooks."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def remove_hooks(modules: Iterable[nn.Module], table: str, kind: Any) -> None:
    """Removes the hooks of some class from one of torch's tables of hooks, and what torch notes beside them."""
    for module in modules:
        hooks = getattr(module, table)
        for key in [k for k, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[key]
            getattr(module, f"{table}_with_kwargs", {}).pop(key, None)
