"""All or nothing: a model that is being changed is put back if the change does not come to its end."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

Attributes = dict[str, Any]
Saved = list[tuple[str, Any, Any]]


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Puts a model's modules and configs back as they were if the block raises, be it Ctrl-C.

    Covers attributes, hooks, children and config objects with their entries. Not the values of tensors that were there
    before.

    Args:
        model: The outermost model that the block may change.
    """
    owners = [*model.modules(), *_configs(model)]
    before = [(vars(owner), _copy(vars(owner))) for owner in owners]
    try:
        yield
    except BaseException:
        for attributes, saved in before:
            _put_back(attributes, saved)
        raise


def _copy(attributes: Attributes) -> Saved:
    """Returns names, values, and what the values that are tables or sets hold."""
    # Most are empty tables of hooks, of which a model has thousands.
    return [(name, x, (x and x.copy()) if isinstance(x, dict | set) else None) for name, x in attributes.items()]


def _put_back(attributes: Attributes, saved: Saved) -> None:
    for name in attributes.keys() - {name for name, _, _ in saved}:
        del attributes[name]
    for name, value, held in saved:
        attributes[name] = value
        if held is not None:
            value.clear()
            value.update(held)


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Returns the configs of a model's modules and of their towers, each once."""
    found: dict[int, PreTrainedConfig] = {}
    queue = [c for m in model.modules() if isinstance(c := vars(m).get("config"), PreTrainedConfig)]
    for config in queue:
        if id(config) not in found:
            found[id(config)] = config
            queue.extend(x for x in vars(config).values() if isinstance(x, PreTrainedConfig))
    return list(found.values())
