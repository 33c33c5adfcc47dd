"""Checks of what tensors hold, in eager mode and inside a compiled graph."""

from collections.abc import Callable

import torch
from torch import Tensor

from attnswap.attention.modes import plain, transformed
from attnswap.errors import ConfigError


def ensure(
    holds: Tensor | bool, message: str, found: Callable[[], str] = lambda: "", error: type[Exception] = ConfigError
) -> None:
    """Raises unless a condition holds.

    A compiled graph cannot look at a value while it is traced: there the check becomes part of the graph, and raises
    RuntimeError with the same message when it runs.

    Args:
        holds: The condition; a tensor of one boolean where it depends on values.
        message: The cause and the way out.
        found: Returns what was found, put after the message; only called where values can be looked at.
        error: What to raise.
    """
    if isinstance(holds, Tensor) and torch.compiler.is_compiling():
        ensure_later(holds, message)
    elif not (bool(plain(holds).all()) if isinstance(holds, Tensor) else holds):
        raise error(message if transformed() else f"{message}{found()}")


def ensure_later(holds: Tensor, message: str) -> None:
    """Raises RuntimeError when the operation runs: in a compiled graph, or on an accelerator.

    Inductor writes the message into a string of C++ as it stands.
    """
    torch._assert_async(holds, message.replace('"', "'").replace("\\", "/").replace("\n", " "))
