"""Read which layers and heads a user means, and whether a swap fits them."""

import operator
from collections.abc import Callable, Iterable
from typing import Any

from attnswap.errors import ConfigError, UnsupportedModelError
from attnswap.surgery.stacks import AttentionStack
from attnswap.swaps.base import ModelInfo, Swap

LayersLike = int | str | Iterable[int] | Callable[[int], bool] | None
"""Layers by index, slice string such as ``"8:"`` or ``"::2"``, list, predicate; None: all."""


def select_layers(layers: LayersLike, available: list[int]) -> list[int]:
    """Returns the layer indices that ``layers`` stands for, sorted.

    Raises:
        ConfigError: An index is out of range, a slice is malformed, or nothing is selected.
    """
    if layers is None:
        return available
    if isinstance(layers, str):
        chosen = _slice(layers, available)
    elif callable(layers):
        chosen = [i for i in available if layers(i)]
    else:
        wanted = whole_numbers(layers, "a layer index")
        top = available[-1] + 1
        chosen = [i + top if i < 0 else i for i in wanted]
        missing = [i for i, index in zip(wanted, chosen, strict=True) if index not in available]
        if missing:
            raise ConfigError(
                f"layer {missing[0]} does not exist: the attention layers are {available[0]} to {available[-1]}"
            )
    if not chosen:
        raise ConfigError(f"no layer selected by {layers!r} among {available[0]} to {available[-1]}")
    return sorted(set(chosen))


def whole_numbers(values: Any, what: str) -> list[int]:
    """Returns one or several whole numbers (Python's, numpy's or a tensor's) as a list.

    Raises:
        ConfigError: A value is something else.
    """
    several = isinstance(values, Iterable) and getattr(values, "ndim", 1) > 0
    numbers = []
    for value in values if several else [values]:
        try:
            if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
                raise TypeError
            numbers.append(operator.index(value))
        except TypeError:
            raise ConfigError(f"{what} is a whole number, not {value!r}") from None
    return numbers


def _slice(text: str, available: list[int]) -> list[int]:
    parts = text.split(":")
    try:
        numbers = [int(p) if p.strip() else None for p in parts]
        if len(parts) == 1:
            return select_layers([int(text)], available)
        if len(parts) > 3:
            raise ValueError
        inside = set(range(available[-1] + 1)[slice(*numbers)])
        return [i for i in available if i in inside]
    except ValueError:
        raise ConfigError(f'layers={text!r} is no slice; write for example "8:", "::2" or "0:4"') from None


def select_heads(heads: Iterable[int] | int | None, info: ModelInfo) -> tuple[int, ...] | None:
    """Returns the query heads in the order given; None: all.

    Raises:
        ConfigError: A head is out of range or named twice, or the list is empty.
    """
    if heads is None:
        return None
    wanted = whole_numbers(heads, "a head")
    for head in wanted:
        if not 0 <= head < info.heads:
            raise ConfigError(f"head {head!r} does not exist: the layer has heads 0 to {info.heads - 1}")
    if len(set(wanted)) != len(wanted) or not wanted:
        raise ConfigError(f"heads={wanted} must name at least one head, each once")
    return tuple(wanted)


def fitting_heads(swap: Swap, heads: Iterable[int] | int | None, info: ModelInfo) -> tuple[int, ...] | None:
    """Returns the query heads that a swap is to serve, as :func:`select_heads` does.

    Raises:
        ConfigError: They part heads that share a value of the swap, too.
    """
    chosen = select_heads(heads, info)
    groups = info.heads // info.kv_heads
    if chosen is not None and swap.traits.per_kv_head and groups > 1:
        starts = [h for h in chosen[::groups] if h % groups == 0]
        if list(chosen) != [h + i for h in starts for i in range(groups)]:
            raise ConfigError(
                f'"{swap.name}" keeps one value per key/value head, which {groups} query heads share: choose whole '
                f"groups such as {list(range(groups))}, not {list(chosen)}"
            )
    return chosen


def check_keys(stack: AttentionStack, chosen: list[int], swap: Swap) -> None:
    """Refuses a swap that keeps a value for each key where the keys are not made of the hidden states it reads.

    Raises:
        UnsupportedModelError: The attention is cross-attention, or a layer reads the keys of another one.
    """
    if not any(feature.per == "key" for feature in swap.features().values()):
        return
    said = f'"{swap.name}" keeps a value for each key, made of the hidden state of its token, which'
    if stack.cross:
        raise UnsupportedModelError(f"{said} cross-attention does not see")
    shared = [layer for layer in chosen if getattr(stack.module(layer), "is_kv_shared_layer", False)]
    if shared:
        raise UnsupportedModelError(
            f"{said} layer {shared[0]} of {type(stack.model).__name__} does not see: it reads the keys of another "
            f"layer. Choose other layers than {shared}"
        )


def check_stages(stack: AttentionStack, swap: Swap, info: ModelInfo) -> None:
    """Refuses a swap some stage of which has no place in a model.

    Raises:
        UnsupportedModelError: The model computes this swap itself, gives attnswap its scores alone, or does not say how
            wide its values are.
    """
    kind = getattr(stack.config, "model_type", "")
    if kind in swap.already_in:
        raise UnsupportedModelError(f'a model of type "{kind}" computes "{swap.name}" itself; it is not added twice')
    around = sorted(swap.stages & {"prepare", "finish"})
    if stack.seam == "scores" and around:
        raise UnsupportedModelError(
            f"{type(stack.model).__name__} multiplies weights and values itself, so that the stage "
            f'"{around[0]}" of "{swap.name}" has no place in it; take a swap of weights alone'
        )
    shapes = [parameter.shape for parameter in swap.gate_parameters().values()]
    if info.value_dim is None and any("value_dim" in shape for shape in shapes):
        raise UnsupportedModelError(
            f'neither {type(stack.model).__name__} nor its config names head_dim, which "{swap.name}" must know'
        )
