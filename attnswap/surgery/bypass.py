"""Bypassing the swaps of a model inside a ``with`` block: the model as its own teacher, and the ablation of a swap."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from attnswap.errors import ConfigError
from attnswap.surgery.body import base_of
from attnswap.surgery.entry import is_patched
from attnswap.surgery.patched import gate_hooks


@contextmanager
def bypassed(model: nn.Module) -> Iterator[None]:
    """Lets a patched model compute the attention it had before patching, with the weights it has now.

    The weights are not touched, and the swaps are active again after the ``with`` block.

    Args:
        model: A patched model; a peft wrapper is looked through (its other adapters stay on).

    Raises:
        ConfigError: The model is not patched.
    """
    inner = base_of(model)
    if not is_patched(inner):
        raise ConfigError(f"this {type(inner).__name__} is not patched, so there is no swap to bypass")
    hooks = gate_hooks(inner)
    before = [hook.bypass for hook in hooks]
    for hook in hooks:
        hook.bypass = True
    try:
        yield
    finally:
        for hook, was in zip(hooks, before, strict=True):
            hook.bypass = was
