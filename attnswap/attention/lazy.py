"""What is computed once, in eager mode and under torch.compile."""

import functools
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

import torch

from attnswap.swaps.base import Swap

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


def once(function: Callable[..., T]) -> Callable[..., T]:
    """``functools.cache`` that calls the function once even where several threads ask first."""
    lock, result = threading.RLock(), functools.cache(function)

    @functools.cache  # what is known takes no lock
    @functools.wraps(function)
    def known(*args: Any) -> T:
        with lock:
            return result(*args)

    return known


def constant(function: Callable[..., T]) -> Callable[..., T]:
    """Marks what torch.compile shall not look into: the result is a constant of the graph.

    Args:
        function: Takes swaps and plain values.
    """

    @torch.compiler.assume_constant_result
    def rebuilt(*args: Any) -> T:
        return function(*(_build(*arg) if isinstance(arg, tuple) else arg for arg in args))

    @functools.wraps(function)
    def known(*args: Any) -> T:
        if not torch.compiler.is_compiling():
            return function(*args)
        # A swap goes in parts: one that was made in the graph itself would arrive with other options.
        return rebuilt(*((type(arg), *arg.options().items()) if isinstance(arg, Swap) else arg for arg in args))

    return known


def _build(cls: type[Swap], *options: tuple[str, Any]) -> Swap:
    return cls(**dict(options))
