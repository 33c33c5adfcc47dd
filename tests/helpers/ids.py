"""Names of test cases: what a parameter holds, where pytest itself would number it."""

import functools
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import torch

from attnswap.swaps import Swap
from attnswap.swaps.composed import Composed

LONGEST = 60


def variant_id(swap: Swap) -> str:
    """A readable test id: the name and the options that differ from the default."""
    if "name" not in type(swap).__dict__:
        return type(swap).__name__
    if isinstance(swap, Composed):
        return " + ".join(variant_id(part) for part in swap.parts)
    options = swap.to_dict()
    default = type(swap)().to_dict()
    changed = [f"{k}={v}" for k, v in options.items() if v != default[k]]
    return " ".join([swap.name, *changed])


def case_id(value: Any, argument: str) -> str | None:
    """The name of a parameter's value in the id of a test case.

    Args:
        value: The value.
        argument: The name of the parameter, which numbers, ``None`` and collections are shown with.

    Returns:
        The name, or None where pytest's own name is as good or there is none.
    """
    if isinstance(value, str | bytes) and not value:
        return f"{argument}={value!r}"
    shown = _shown(value)
    if shown is None:
        return None
    if value is None or isinstance(value, bool | int | float | list | tuple | Mapping | range | slice):
        shown = f"{argument}={shown}"
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."


def _shown(value: Any) -> str | None:
    if isinstance(value, Swap):
        return variant_id(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_part(key)}: {_part(x)}" for key, x in value.items()) + "}"
    if isinstance(value, list | tuple):
        left, right = "[]" if isinstance(value, list) else "()"
        return left + ", ".join(map(_part, value)) + right
    if isinstance(value, functools.partial):
        options = [f"{key}={_part(x)}" for key, x in value.keywords.items()]
        return " ".join([*map(_part, (value.func, *value.args)), *options])
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.Tensor):
        return f"{_shown(value.dtype)} {tuple(value.shape)}"
    if isinstance(value, BaseException):
        return repr(value)
    name = getattr(value, "__name__", None)
    if isinstance(name, str):
        return None if name == "<lambda>" else name
    if isinstance(value, str):
        return value.encode("unicode_escape").decode("ascii")
    return str(value) if value is None or isinstance(value, bool | int | float | slice | range | PurePath) else None


def _part(value: Any) -> str:
    """A part of a collection, by its type where it has no name of its own."""
    shown = _shown(value)
    return type(value).__name__ if shown is None else shown or "''"
