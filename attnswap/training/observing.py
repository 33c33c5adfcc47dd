"""Call a function with every attention problem of a patched model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from transformers import PreTrainedModel

from attnswap.attention.problem import Problem
from attnswap.surgery.call import LayerCall, Observing
from attnswap.surgery.patched import gate_hooks

Observer = TypeVar("Observer", bound=Observing)


@contextmanager
def observing(model: PreTrainedModel, observer: Observer) -> Iterator[Observer]:
    """Calls an observer with the attention problem of every slot, in each forward inside the ``with`` block.

    Contexts can be nested: each observer is called.

    Args:
        model: A patched model. For an unpatched one the observer is never called.
        observer: Called with the layer's call, the slot's name and the slot's problem.
    """
    hooks = gate_hooks(model)
    outer = [hook.observe for hook in hooks]
    for hook in hooks:
        hook.observe = observer if hook.observe is None else _BothObservers(hook.observe, observer)
    try:
        yield observer
    finally:
        for hook, previous in zip(hooks, outer, strict=True):
            hook.observe = previous


class _BothObservers:
    def __init__(self, first: Observing, second: Observing) -> None:
        self.first, self.second = first, second

    def __call__(self, call: LayerCall, slot: str, problem: Problem) -> None:
        self.first(call, slot, problem)
        self.second(call, slot, problem)
