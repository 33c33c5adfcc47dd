"""Looking on at every attention call of a patched model."""

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
    """Shows an observer every slot's problem in the forwards inside the context, beside whoever looks on already.

    Args:
        model: A patched model; an unpatched one has nothing to show.
        observer: Called with the layer's call, the slot's name and its problem.
    """
    hooks = gate_hooks(model)
    before = [hook.observe for hook in hooks]
    for hook in hooks:
        hook.observe = observer if hook.observe is None else _Both(hook.observe, observer)
    try:
        yield observer
    finally:
        for hook, was in zip(hooks, before, strict=True):
            hook.observe = was


class _Both:
    def __init__(self, first: Observing, second: Observing) -> None:
        self.first, self.second = first, second

    def __call__(self, call: LayerCall, slot: str, problem: Problem) -> None:
        self.first(call, slot, problem)
        self.second(call, slot, problem)
