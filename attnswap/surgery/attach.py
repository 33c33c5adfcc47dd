"""Put the seam around a model's attention modules, and take it away again."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from attnswap.errors import CheckpointError
from attnswap.surgery.module import LayerSwap
from attnswap.surgery.seam import Enter, Leave
from attnswap.surgery.select import attention_modules, model_info, owning_config
from attnswap.surgery.spec import KEY, PatchSpec, Slot

Modules = dict[int, tuple[str, nn.Module]]


def config_of(model: PreTrainedModel) -> PreTrainedConfig:
    """Returns the config that carries (or will carry) the model's spec."""
    return owning_config(model, attention_modules(model))


def spec_of(model: PreTrainedModel) -> PatchSpec | None:
    """Returns what was done to a model, or None if nothing was."""
    for module in model.modules():
        config = getattr(module, "config", None)
        values = getattr(config, KEY, None)
        if isinstance(values, dict):
            return PatchSpec.from_dict(values)
    return None


def child_of(module: nn.Module) -> LayerSwap | None:
    """Returns the layer's swaps, through the wrapper of another library if there is one."""
    child = module._modules.get(KEY)
    while child is not None and not isinstance(child, LayerSwap):
        child = next(iter(child.children()), None)
    return child


def children_of(module: nn.Module) -> list[LayerSwap]:
    """Returns every copy of a layer's swaps; wrappers of other libraries keep a frozen and a trained one."""
    child = module._modules.get(KEY)
    return [] if child is None else [c for c in child.modules() if isinstance(c, LayerSwap)]


def own_config(model: PreTrainedModel) -> Callable[[], None]:
    """Gives a model a config object of its own, since models built from one config share it.

    A model inside another one gets it together with that one, which has to save the swaps too.

    Returns:
        A function that gives the model its old config object back.
    """
    model = outermost(model)
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    replaced = []
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig) and id(config) in copies:
            replaced.append((module, config))
            module.__dict__["config"] = copies[id(config)]

    def give_back() -> None:
        for module, config in replaced:
            module.__dict__["config"] = config

    return give_back


def outermost(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the largest living ``transformers`` model that has this one as a part, else the model itself."""
    seen = [model]
    for part in seen:  # modules do not know their parents, so look for who refers to their tables of children
        tables = [x for x in gc.get_referrers(part) if isinstance(x, dict) and any(v is part for v in x.values())]
        owners = [x for table in tables for x in gc.get_referrers(table)]
        owners += [x for owner in owners if isinstance(owner, dict) for x in gc.get_referrers(owner)]
        for owner in owners:
            if isinstance(owner, nn.Module) and any(child is part for child in owner._modules.values()):
                seen += [owner] if all(owner is not x for x in seen) else []  # type: ignore[list-item]
    return next(x for x in reversed(seen) if isinstance(x, PreTrainedModel))


def connect(config: PreTrainedConfig, modules: Modules, before: str, loading: bool = False) -> None:
    """Routes every attention module through attnswap; modules without slots go on as before.

    Args:
        config: The config the modules share.
        modules: The attention modules.
        before: The previous attention implementation.
        loading: The swaps' tensors are yet to be read; the first forward then checks them.
    """
    config._attn_implementation_internal = KEY
    # Written to config.json, so that a process without attnswap refuses the checkpoint by name.
    config.attn_implementation = KEY
    for _, module in modules.values():
        if not any(isinstance(h, Enter) for h in module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(Enter(before, unchecked=loading), with_kwargs=True)
            module.register_forward_hook(Leave(), with_kwargs=True)


def disconnect(config: PreTrainedConfig, modules: Modules, before: str) -> None:
    """Undoes :func:`connect` and removes every slot."""
    for _, module in modules.values():
        module._modules.pop(KEY, None)
        _remove_hooks(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, Enter)
        _remove_hooks(module._forward_hooks, module._forward_hooks_with_kwargs, Leave)
    config._attn_implementation_internal = before
    for name in ("attn_implementation", KEY):
        config.__dict__.pop(name, None)


def _remove_hooks(hooks: dict[int, Any], with_kwargs: dict[int, bool], kind: type) -> None:
    for key in [k for k, hook in hooks.items() if isinstance(hook, kind)]:
        del hooks[key]
        with_kwargs.pop(key, None)


def add_slot(module: nn.Module, config: PreTrainedConfig, name: str, slot: Slot) -> None:
    """Adds a slot with fresh parameters to an attention module."""
    child = child_of(module)
    if child is None:
        child = LayerSwap(model_info(config))
        child.train(module.training)
        module.add_module(KEY, child)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    child.add(name, slot, device)


def attach_from_config(model: PreTrainedModel) -> bool:
    """Rebuilds the swaps that a model's config names, with parameters still to be loaded.

    Args:
        model: A model under construction.

    Returns:
        Whether anything was attached (False too where an inner model has done it already).
    """
    values = getattr(model.config, KEY, None)
    if not isinstance(values, dict):
        return False
    spec = PatchSpec.from_dict(values)
    modules = attention_modules(model)
    if any(child_of(module) is not None for _, module in modules.values()):
        return False
    missing = [layer for layer in spec.layers if layer not in modules]
    if missing:
        raise CheckpointError(
            f"the attnswap entry of config.json names layer {missing[0]}, which the model does not have"
        )
    config = owning_config(model, modules)
    info = model_info(config)
    for layer, slots in spec.layers.items():
        for slot in slots.values():
            heads = slot.heads or ()
            ramps = len(slot.ramp) if isinstance(slot.ramp, tuple) else slot.count(info.heads)
            if any(not 0 <= head < info.heads for head in heads) or ramps != slot.count(info.heads):
                raise CheckpointError(
                    f"the attnswap entry of config.json gives layer {layer} heads {list(heads) or 'all'} and lambda "
                    f"{slot.ramp}, but its heads are 0 to {info.heads - 1}"
                )
    asked = config._attn_implementation
    before = spec.before if asked in (KEY, None) else asked
    connect(config, modules, before, loading=True)
    setattr(config, KEY, {**values, "before": before})
    for layer, slots in spec.layers.items():
        for name, slot in slots.items():
            add_slot(modules[layer][1], config, name, slot)
    return True
