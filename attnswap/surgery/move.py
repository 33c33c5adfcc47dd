"""Move lambda of a patched model, for all of its heads or head by head."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from attnswap.errors import CheckpointError, ConfigError
from attnswap.surgery.entry import write_spec
from attnswap.surgery.module import children_of
from attnswap.surgery.patched import patched_stacks
from attnswap.surgery.select import LayersLike, select_layers
from attnswap.surgery.spec import PatchSpec, Slot
from attnswap.surgery.stacks import AttentionStack, refuse_own_parts
from attnswap.swaps import Swap

RampLike = float | Iterable[float]
Ramp = float | tuple[float, ...]


def set_ramp(
    model: PreTrainedModel,
    ramp: RampLike | Mapping[int, RampLike],
    *,
    layers: LayersLike = None,
    part: str | None = None,
) -> None:
    """Sets lambda of every swap of the selected layers.

    Args:
        model: A patched model.
        ramp: A value in [0, 1], a sequence with one value per head of the swap, or a dict from layer index to either.
        layers: As in :func:`patch`; default: every patched layer, or the layers of the dict.
        part: The part to set, by the ``part`` it was patched with; default: all patched parts. ``layers`` and a dict
            need it if several parts are patched.

    Raises:
        ConfigError: The model is not patched, a value is out of range, or the number of values does not fit.
    """
    chosen = _chosen(model, part)
    if len(chosen) > 1 and (layers is not None or isinstance(ramp, Mapping)):
        names = ", ".join(f'"{stack.name}"' for stack, _ in chosen)
        raise ConfigError(f"several parts of this model are patched: choose part= from {names} to move single layers")
    ramp = ramp if isinstance(ramp, Mapping) else check_ramp(ramp)  # once: it may be a generator
    moves = [(stack, spec, _values(spec, ramp, layers)) for stack, spec in chosen]
    for stack, spec, values in moves:
        _check_values(stack, spec, values)
    for stack, spec, values in moves:
        moved = {i: {name: Slot(s.swap, s.heads, v) for name, s in spec.layers[i].items()} for i, v in values.items()}
        _move(stack, spec, moved)


def _chosen(model: PreTrainedModel, part: str | None) -> list[tuple[AttentionStack, PatchSpec]]:
    """Returns the patched stacks that a user means.

    Raises:
        ConfigError: There is none.
    """
    found = patched_stacks(model, read=False)
    refuse_own_parts([stack for stack, _ in found])
    if not found:
        raise ConfigError(f"this {type(model).__name__} is not patched")
    chosen = [(stack, spec) for stack, spec in found if part is None or part in (spec.part, stack.name)]
    if not chosen:
        names = ", ".join(f'"{stack.name}"' for stack, _ in found)
        raise ConfigError(f"part={part!r} is not patched; the patched parts are {names}")
    return chosen


def _values(spec: PatchSpec, ramp: Any, layers: LayersLike) -> dict[int, Ramp]:
    if not isinstance(ramp, Mapping):
        return dict.fromkeys(select_layers(layers, sorted(spec.layers)), check_ramp(ramp))
    if layers is not None:
        raise ConfigError("give layers either as keys of ramp or as layers=, not both")
    return {layer: check_ramp(ramp[layer]) for layer in select_layers(list(ramp), sorted(spec.layers))}


def _check_values(stack: AttentionStack, spec: PatchSpec, values: Mapping[int, Ramp]) -> None:
    info = stack.info(next(iter(values)))
    for layer, value in values.items():
        if not isinstance(value, tuple):
            continue
        for slot in spec.layers[layer].values():
            if len(value) != slot.count(info.heads):
                raise ConfigError(f"{len(value)} ramp values for {slot.count(info.heads)} heads of layer {layer}")
            slot.swap.check_shared(value, info.heads // info.kv_heads)


def _move(stack: AttentionStack, spec: PatchSpec, moved: Mapping[int, Mapping[str, Slot]]) -> None:
    """Gives slots of a stack another lambda, in its modules and in its entry."""
    for layer, slots in moved.items():
        for name, slot in slots.items():
            spec = spec.with_slot(layer, name, slot)
            for child in children_of(stack.module(layer)):
                child.set_ramp(name, slot)
    write_spec(stack, spec)


def follow(model: PreTrainedModel, others: Sequence[PatchSpec]) -> None:
    """Moves lambda of every slot to where other specs of the same swaps have it.

    Args:
        model: A patched model.
        others: The specs of all its parts, such as those of a checkpoint of this model.

    Raises:
        CheckpointError: They name other swaps than the model has. Nothing is moved then.
    """
    chosen = _chosen(model, None)
    left, pairs = list(others), []
    for stack, spec in chosen:
        same = [other for other in left if _swaps(other) == _swaps(spec)]
        same.sort(key=lambda other, part=spec.part: other.part != part)  # type: ignore[misc]
        if not same:
            raise _differ(_swaps(spec) ^ _swaps(left[0]) if left else _swaps(spec))
        left.remove(same[0])
        pairs.append((stack, spec, same[0]))
    if left:
        raise _differ(_swaps(left[0]))
    for stack, spec, other in pairs:
        _move(stack, spec, other.layers)


def _swaps(spec: PatchSpec) -> frozenset[tuple[int, str, Swap]]:
    return frozenset((i, name, slot.swap) for i, slots in spec.layers.items() for name, slot in slots.items())


def _differ(swaps: frozenset[tuple[int, str, Swap]]) -> CheckpointError:
    layer, name, _ = min(swaps, key=lambda entry: entry[:2], default=(0, "", None))
    return CheckpointError(f'the checkpoint and the model do not have the same swap "{name}" in layer {layer}')


def check_ramp(ramp: Any) -> float | tuple[float, ...]:
    """Returns a ramp as a number, or as one per head.

    Raises:
        ConfigError: A value is no number in [0, 1].
    """
    values = ramp.tolist() if isinstance(ramp, Tensor | np.ndarray | np.generic) else ramp
    if isinstance(values, str) or not isinstance(values, Iterable):
        return _one_ramp(values)
    return tuple(_one_ramp(value) for value in values)


def check_one_ramp(ramp: Any) -> float:
    """Returns a ramp as a number.

    Raises:
        ConfigError: It is not a number in [0, 1], or there is one per head.
    """
    value = check_ramp(ramp)
    if isinstance(value, tuple):
        raise ConfigError(f"ramp must be one number here, not {ramp!r}; attnswap.set_ramp takes one per head")
    return value


def _one_ramp(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ConfigError(f"ramp must be in [0, 1], not {value!r}")
    return float(value)
