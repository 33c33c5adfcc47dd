"""Attach the swaps that a config names while transformers constructs the model, with parameters still to be loaded.

Parts of a model are constructed before the whole, from the same config, and cannot know whether they are what was
patched. So each attaches what it takes for it, and the model around puts that right.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from attnswap.errors import AttnSwapError, CheckpointError, ConfigError
from attnswap.surgery.attach import (
    add_slot,
    carrier_of,
    child_of,
    connect,
    dispatches_all,
    forget,
    guard,
    remove_hooks,
    unhook,
    write_spec,
)
from attnswap.surgery.module import SwapModule
from attnswap.surgery.previous import check_implementation
from attnswap.surgery.select import fitting_heads, layer_info, owning_config
from attnswap.surgery.spec import KEY, PatchSpec, Slot
from attnswap.surgery.stacks import Modules, attention_modules, siblings, stacks
from attnswap.swaps.base import ModelInfo


def rebuild(model: PreTrainedModel) -> None:
    """Attaches the swaps a model's config names; called for every model under construction.

    Raises:
        CheckpointError: The config names layers or heads that the model does not have, or an implementation that
            transformers does not know.
    """
    carrier = carrier_of(model.config)
    if carrier is None:
        return
    spec = PatchSpec.from_dict(getattr(carrier, KEY))
    try:
        modules = _find(model, carrier, spec)
    except AttnSwapError as error:
        if type(model).__name__ in (model.config.architectures or ()):
            raise
        model.register_forward_pre_hook(Unresolved(str(error)))
        return
    remove_hooks(list(model.modules()), "_forward_pre_hooks", Unresolved)
    config = owning_config(model, modules)
    _leave_others(model, config, modules, spec)
    if config._attn_implementation not in (KEY, None) and not any(child_of(m) for _, m in modules.values()):
        spec = replace(spec, before=config._attn_implementation)  # asked for when loading
    check_implementation(spec.before)
    connect(model, config, modules, spec.before, loading=True)
    write_spec(model, config, spec)
    for layer, slots in spec.layers.items():
        if child_of(modules[layer][1]) is None:
            for name, slot in slots.items():
                add_slot(modules[layer][1], config, name, slot)
    guard(model, loaded=spec)
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), KEY}
    if not isinstance(model._init_weights, _InitWeights):
        # An instance attribute: transformers calls it for each module whose weights were not in the checkpoint.
        model._init_weights = _InitWeights(model, model._init_weights)  # type: ignore[method-assign]


def _find(model: PreTrainedModel, carrier: PreTrainedConfig, spec: PatchSpec) -> Modules:
    modules = attention_modules(model, spec.part, None if carrier is model.config else carrier)
    missing = [layer for layer in spec.layers if layer not in modules]
    if missing:
        raise CheckpointError(
            f"the attnswap entry of config.json names layer {missing[0]}, which the model does not have"
        )
    if (spec.seam == "interface") != dispatches_all(modules):
        raise CheckpointError(
            f'the attnswap entry of config.json says that the model was patched at its "{spec.seam}", which is not how '
            f"{type(model).__name__} computes attention"
        )
    config = owning_config(model, modules)
    for layer, slots in spec.layers.items():
        info = layer_info(config, modules[layer][1])
        for name, slot in slots.items():
            try:
                _check_fits(slot, info)
            except ConfigError as error:
                raise CheckpointError(
                    f'the attnswap entry of config.json gives layer {layer} a swap "{name}" that does not fit: {error}'
                ) from error
    return modules


def _check_fits(slot: Slot, info: ModelInfo) -> None:
    """Raises ConfigError for a slot that no patch would have given a layer."""
    fitting_heads(slot.swap, slot.heads, info)
    count = slot.count(info.heads)
    if isinstance(slot.ramp, tuple):
        if len(slot.ramp) != count:
            raise ConfigError(f"lambda is {slot.ramp} for {count} heads")
        slot.swap.check_shared(slot.ramp, info.heads // info.kv_heads)
    if slot.swap.bind(info) != slot.swap:
        raise ConfigError(f"{slot.swap!r} lacks what depends on the model")


class Unresolved:
    """The hook before the forward of a model whose config names swaps that it has no place for."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Raises CheckpointError."""
        raise CheckpointError(
            f"the config names swaps that {type(model).__name__} alone has no place for, so that it would compute "
            f"softmax: {self.reason}. Load the whole model, or remove the attnswap entry of its config"
        )


def _leave_others(model: PreTrainedModel, config: PreTrainedConfig, modules: Modules, spec: PatchSpec) -> None:
    """Takes out what parts of the model attached to other attention."""
    chosen = {id(module) for _, module in modules.values()}
    others = [m for stack in stacks(model) for _, m in stack.modules.values() if id(m) not in chosen]
    for module in others:
        module._modules.pop(KEY, None)
        own = getattr(module, "config", None)
        if own is not None and own is not config and own is not model.config and hasattr(own, KEY):
            unhook(siblings(model, {0: ("", module)}))
            own._attn_implementation_internal = spec.before
            forget(own)


class _InitWeights:
    """Gives swap modules their start, and leaves every other module to the model."""

    def __init__(self, model: PreTrainedModel, original: Callable[[nn.Module], None]) -> None:
        self.model, self.original = model, original

    def __call__(self, module: nn.Module) -> None:
        if not isinstance(module, SwapModule):
            self.original(module)
            return
        others = (p for n, p in self.model.named_parameters() if f".{KEY}." not in n)
        state = module.state_dict(keep_vars=True).items()
        # What stays on meta was found in the checkpoint, and is read from disk when it is needed.
        unset = [n for n, p in state if not p.is_meta and not getattr(p, "_is_hf_initialized", False)]
        if unset and any(getattr(p, "_is_hf_initialized", False) for p in others):
            raise CheckpointError(
                f'the checkpoint names the swap "{module.swap.name}" in its config but lacks its parameters '
                f"({', '.join(unset)}): it is incomplete. To start a swap afresh, load the original model and call "
                "attnswap.patch"
            )
        if unset:
            module.set_start(_start)


def _start(parameter: torch.Tensor, mean: float, std: float) -> None:
    if std:
        init.normal_(parameter, mean, std)
    else:
        init.constant_(parameter, mean)
