"""A patched model as it was, for the length of a ``with`` block: the teacher, and the proof that a swap is used."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from attnswap.errors import ConfigError
from attnswap.surgery.attach import base_of, enters, spec_of


@contextmanager
def bypassed(model: nn.Module) -> Iterator[None]:
    """Lets a patched model compute the attention it had before patching, with the weights it has now.

    Nothing of the model changes: swaps are passed by at the door of each attention module, and are back afterwards.

    Args:
        model: A patched model; a peft wrapper is looked through (its other adapters stay on).

    Raises:
        ConfigError: The model is not patched.
    """
    inner = base_of(model)
    if spec_of(inner) is None:
        raise ConfigError(f"this {type(inner).__name__} is not patched, so there is nothing to pass by")
    hooks = enters(inner)
    before = [hook.bypass for hook in hooks]
    for hook in hooks:
        hook.bypass = True
    try:
        yield
    finally:
        for hook, was in zip(hooks, before, strict=True):
            hook.bypass = was
