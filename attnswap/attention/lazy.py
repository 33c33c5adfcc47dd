"""What is computed once, in eager mode and under torch.compile."""

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

import torch

T = TypeVar("T")


class lazy(Generic[T]):
    """``functools.cached_property`` that torch.compile can trace: while compiling, each use computes it anew."""

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> "lazy[T]": ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> T: ...
    def __get__(self, instance: object | None, owner: type | None = None) -> "T | lazy[T]":
        """Returns the value; the next look-up finds it on the instance."""
        if instance is None:
            return self
        value = self.function(instance)
        if not torch.compiler.is_compiling():
            instance.__dict__[self.name] = value
        return value


def constant(function: Callable[..., T]) -> Callable[..., T]:
    """``functools.cache`` for what torch.compile shall not look into: the result is a constant of the graph."""
    kept = functools.cache(function)

    @torch.compiler.assume_constant_result
    @functools.wraps(function)
    def known(*args: Any) -> T:
        return kept(*args)

    return known
