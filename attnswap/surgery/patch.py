"""Patch a model in place, undo it, move its ramp, and list its parameters for an optimizer."""

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from attnswap.errors import CheckpointError, ConfigError, UnsupportedModelError
from attnswap.loading import clear_dequantized_flags
from attnswap.surgery import attach
from attnswap.surgery.owners import outermost
from attnswap.surgery.probe import verify
from attnswap.surgery.report import PatchReport, build_report
from attnswap.surgery.select import (
    LayersLike,
    fitting_heads,
    layer_info,
    owning_config,
    select_layers,
)
from attnswap.surgery.spec import KEY, PatchSpec, Slot
from attnswap.surgery.stacks import Modules, attention_modules, is_cross
from attnswap.surgery.undo import all_or_nothing
from attnswap.swaps import Swap, SwapLike, resolve
from attnswap.swaps.base import ModelInfo

HeadsLike = Iterable[int] | int | None
RampLike = float | Iterable[float]


def patch(
    model: PreTrainedModel,
    swap: SwapLike | Mapping[str | Swap, HeadsLike],
    *,
    part: str | None = None,
    layers: LayersLike = None,
    heads: HeadsLike = None,
    ramp: float = 1.0,
) -> PatchReport:
    """Replaces the attention normalizer of a model, in place.

    Only this instance changes; other models of the same class in the process stay as they are. What is not selected
    keeps the implementation the model had. A tiny forward then proves that every selected head is really served; if
    not, everything is put back.

    Args:
        model: A ``transformers`` model.
        swap: A name, config or mapping with a name (``{"name": "ssmax", "form": "scale"}``); or several of them with
            their heads: ``{"forgetting-gate": [0, 1], SSMax(form="scale"): [2, 3]}``.
        part: Which attention, in a model that has several: words of its modules' names, such as ``"encoder"``,
            ``"decoder"``, ``"vision_tower"`` or ``"encoder.layers.*.self_attn"``, or ``"cross"``; default:
            self-attention, of the decoder or text tower where there are several.
        layers: Index, slice string (``"8:"``), list, or predicate of the layer index; default: all.
        heads: Query heads; default: all.
        ramp: lambda, from 0 (what the model computed before, exactly) to 1 (the swap).

    Returns:
        What was done, layer by layer.

    Raises:
        ConfigError: A swap, layer, head or ramp does not exist or does not fit, or a head is already swapped.
        UnsupportedModelError: The model's attention cannot be served exactly. In both cases the model is as before.
    """
    wanted = _pairs(swap, heads)
    start = check_one_ramp(ramp)
    attach.refuse_adapters(model)
    old = attach.spec_of(model)
    modules = attention_modules(model, part if old is None or part is not None else old.part)
    if old is not None and modules != attach.patched_modules(model):
        raise ConfigError(
            f"part={part!r}: another attention of this model is patched already, and only one can be at a time; call "
            "attnswap.unpatch first"
        )
    config = owning_config(model, modules)
    chosen = select_layers(layers, list(modules))
    info = layer_info(config, modules[chosen[0]][1])
    before = config._attn_implementation if old is None else old.before
    seam = "interface" if attach.dispatches_all(modules) else "scores"
    spec = PatchSpec(before, seam=seam, part=part) if old is None else old
    added: list[tuple[int, str, Slot]] = []
    for config_of_swap, heads_of_swap in wanted:
        slot = Slot(config_of_swap.bind(info), fitting_heads(config_of_swap, heads_of_swap, info), start)
        if any(f.per == "key" for f in slot.swap.features().values()):
            _check_keys(model, modules, chosen, slot.swap)
        for layer in chosen:
            present = spec.layers.get(layer, {})
            _check_free(layer, slot, present, info)
            name = _slot_name(slot.swap, present)
            spec = spec.with_slot(layer, name, slot)
            added.append((layer, name, slot))
    with all_or_nothing(outermost(model)):
        attach.own_config(model)
        config = owning_config(model, modules)
        attach.connect(model, config, modules, before)
        attach.write_spec(model, config, spec)
        for layer, name, slot in added:
            attach.add_slot(modules[layer][1], config, name, slot)
        verify(model, config, modules, before)
        _keep_fp32(model)
        attach.guard(outermost(model))
        cleared = clear_dequantized_flags(model)
        notes = [f"cleared stale quantization flags of a dequantized model: {', '.join(cleared)}"] if cleared else []
        return build_report(model, modules, spec, notes)


def _check_keys(model: PreTrainedModel, modules: Modules, chosen: list[int], swap: Swap) -> None:
    """Refuses a swap that keeps a value for each key where the keys are not made of the hidden states it reads."""
    said = f'"{swap.name}" keeps a value for each key, made of the hidden state of its token, which'
    if is_cross(model, modules):
        raise UnsupportedModelError(f"{said} cross-attention does not see")
    shared = [layer for layer in chosen if getattr(modules[layer][1], "is_kv_shared_layer", False)]
    if shared:
        raise UnsupportedModelError(
            f"{said} layer {shared[0]} of {type(model).__name__} does not see: it reads the keys of another layer. "
            f"Choose other layers than {shared}"
        )


def unpatch(model: PreTrainedModel) -> None:
    """Takes every swap out again: afterwards the model is bit for bit the one it was.

    Args:
        model: A patched model.

    Raises:
        ConfigError: The model is not patched, or by adapters.
    """
    attach.refuse_adapters(model)
    spec = _spec(model)
    modules = attach.patched_modules(model)
    with all_or_nothing(outermost(model)):
        attach.disconnect(model, owning_config(model, modules), modules, spec.before)
        attach.unguard(model)
        for module in model.modules():
            kept = module.__dict__.get("_keep_in_fp32_modules_strict")
            if isinstance(kept, set):
                kept.discard(KEY)
            module.__dict__.pop("_init_weights", None)


def describe(model: PreTrainedModel) -> PatchReport:
    """Returns the table of which swap serves which head of which layer (empty for an untouched model)."""
    modules = attach.patched_modules(model)
    spec = attach.spec_of(model) or PatchSpec(owning_config(model, modules)._attn_implementation)
    return build_report(model, modules, spec, [])


def set_ramp(model: PreTrainedModel, ramp: RampLike | Mapping[int, RampLike], *, layers: LayersLike = None) -> None:
    """Moves lambda of every swap of the selected layers.

    Args:
        model: A patched model.
        ramp: One value in [0, 1], or one per head of each slot; or a mapping of such from the index of a layer.
        layers: As in :func:`patch`; default: every patched layer, or those of the mapping.

    Raises:
        ConfigError: The model is not patched, a value is out of range, or the number of values does not fit.
    """
    spec, modules = _spec(model), attach.patched_modules(model)
    if isinstance(ramp, Mapping):
        if layers is not None:
            raise ConfigError("give layers either as keys of ramp or as layers=, not both")
        chosen = select_layers(list(ramp), sorted(spec.layers))
        values = {layer: check_ramp(ramp[layer]) for layer in chosen}
    else:
        value = check_ramp(ramp)
        values = dict.fromkeys(select_layers(layers, sorted(spec.layers)), value)
    info = layer_info(owning_config(model, modules), modules[next(iter(values))][1])
    for layer, value in values.items():
        for slot in spec.layers[layer].values():
            if isinstance(value, tuple):
                _check_values(value, slot, info, layer)
    for layer, value in values.items():
        for name, slot in spec.layers[layer].items():
            moved = Slot(slot.swap, slot.heads, value)
            spec = spec.with_slot(layer, name, moved)
            for child in attach.children_of(modules[layer][1]):
                child.set_ramp(name, moved)
    attach.write_spec(model, attach.config_of(model), spec)


def follow(model: PreTrainedModel, other: PatchSpec) -> None:
    """Moves lambda of every slot to where another spec of the same swaps has it.

    Args:
        model: A patched model.
        other: The spec, such as that of a checkpoint of this model.

    Raises:
        CheckpointError: It names other swaps than the model has. Nothing is moved then.
    """
    spec, modules = _spec(model), attach.patched_modules(model)
    ours, theirs = (
        {(i, name, s.swap) for i, slots in x.layers.items() for name, s in slots.items()} for x in (spec, other)
    )
    if ours != theirs:
        layer, name, _ = min(ours ^ theirs, key=lambda entry: entry[:2])
        raise CheckpointError(f'the checkpoint and the model do not have the same swap "{name}" in layer {layer}')
    for layer, slots in other.layers.items():
        for name, slot in slots.items():
            spec = spec.with_slot(layer, name, slot)
            for child in attach.children_of(modules[layer][1]):
                child.set_ramp(name, slot)
    attach.write_spec(model, attach.config_of(model), spec)


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
        ConfigError: It is none in [0, 1], or one per head.
    """
    value = check_ramp(ramp)
    if isinstance(value, tuple):
        raise ConfigError(f"ramp must be one number here, not {ramp!r}; attnswap.set_ramp takes one per head")
    return value


def _one_ramp(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ConfigError(f"ramp must be in [0, 1], not {value!r}")
    return float(value)


def _check_values(values: tuple[float, ...], slot: Slot, info: ModelInfo, layer: int) -> None:
    if len(values) != slot.count(info.heads):
        raise ConfigError(f"{len(values)} ramp values for {slot.count(info.heads)} heads of layer {layer}")
    slot.swap.check_shared(values, info.heads // info.kv_heads)


def _pairs(swap: Any, heads: HeadsLike) -> list[tuple[Swap, HeadsLike]]:
    if isinstance(swap, Mapping) and "name" not in swap:
        if heads is not None:
            raise ConfigError("give heads either in the mapping of swaps or as heads=, not both")
        if not swap:
            raise ConfigError("the mapping of swaps is empty")
        return [(resolve(one), its_heads) for one, its_heads in swap.items()]
    return [(resolve(swap), heads)]


def _check_free(layer: int, slot: Slot, present: Mapping[str, Slot], info: ModelInfo) -> None:
    wanted = set(range(info.heads) if slot.heads is None else slot.heads)
    for name, other in present.items():
        taken = wanted & set(range(info.heads) if other.heads is None else other.heads)
        if taken:
            raise ConfigError(
                f'head {min(taken)} of layer {layer} already has the swap "{name}"; unpatch the model first, or choose '
                "other heads or layers"
            )


def _slot_name(swap: Swap, present: Mapping[str, Slot]) -> str:
    base = swap.name.replace("-", "_")
    names = [base, *(f"{base}_{i}" for i in range(1, len(present) + 1))]
    return next(name for name in names if name not in present)


def _keep_fp32(model: PreTrainedModel) -> None:
    """Makes later loads into this instance keep the swaps' tensors fp32, as they are when patching."""
    kept = model._keep_in_fp32_modules_strict
    model._keep_in_fp32_modules_strict = {*(kept or ()), KEY}


def _spec(model: PreTrainedModel) -> PatchSpec:
    spec = attach.spec_of(model, read=False)
    if spec is None:
        raise ConfigError(f"this {type(model).__name__} is not patched")
    return spec
