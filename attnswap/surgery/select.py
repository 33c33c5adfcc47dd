"""Find the attention modules of a model, and read which layers and heads a user means."""

import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from attnswap.errors import ConfigError, UnsupportedModelError
from attnswap.surgery.stacks import Modules, seam_of
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


def layer_info(config: PreTrainedConfig, module: nn.Module) -> ModelInfo:
    """Returns a layer's sizes, from its attention module where that has them, else from its config.

    Raises:
        UnsupportedModelError: Neither says how many heads there are.
    """
    usual = _size(config, "num_attention_heads")
    heads = _size(module, "num_heads", "num_attention_heads", "n_heads", "n_head") or usual
    hidden = _size(module, "attention_hidden_size") or _size(config, "hidden_size")
    if heads is None or hidden is None:
        raise UnsupportedModelError(f"{type(config).__name__} names no single num_attention_heads and hidden_size")
    kv_heads = _size(module, "num_key_value_heads", "num_kv_heads")
    if kv_heads is None and heads == usual:  # a config speaks of one of its towers
        kv_heads = _size(config, "num_key_value_heads")
    return ModelInfo(
        heads=heads,
        kv_heads=kv_heads or heads,
        hidden=hidden,
        max_positions=_size(config, "max_position_embeddings"),
    )


def _size(owner: Any, *names: str) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def owning_config(model: PreTrainedModel, modules: Modules) -> PreTrainedConfig:
    """Returns the one config that all attention modules read their implementation from.

    Raises:
        UnsupportedModelError: They do not share one.
    """
    configs = {id(c): c for _, m in modules.values() if (c := getattr(m, "config", None)) is not None}
    if not configs and not any(seam_of(type(m)) == "interface" for _, m in modules.values()):
        return model.config.get_text_config()
    if len(configs) != 1:
        raise UnsupportedModelError(
            f"the attention modules of {type(model).__name__} do not share one config ({len(configs)} found), so "
            "their attention implementation cannot be set per model"
        )
    return next(iter(configs.values()))
