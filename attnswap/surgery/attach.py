"""Attach swaps to the attention modules of a stack."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from attnswap.surgery.connect import connect
from attnswap.surgery.entry import write_spec
from attnswap.surgery.module import add_slot
from attnswap.surgery.spec import KEY, PatchSpec, Slot
from attnswap.surgery.stacks import AttentionStack


def attach(
    stack: AttentionStack, spec: PatchSpec, added: Mapping[int, Mapping[str, Slot]], loading: bool = False
) -> None:
    """Gives the modules of a stack hooks and swaps, and its model the entry that names them.

    Args:
        stack: The attention modules.
        spec: All swaps that the stack has afterwards.
        added: Those it does not have yet, by layer and name.
        loading: The swaps' tensors are yet to be read; the first forward then checks them.
    """
    connect(stack, spec.before, loading)
    write_spec(stack, spec)
    for layer, slots in added.items():
        info = stack.info(layer)
        for name, slot in slots.items():
            add_slot(stack.module(layer), info, name, slot)
    stack.model._keep_in_fp32_modules_strict = {*(stack.model._keep_in_fp32_modules_strict or ()), KEY}


def own_config(model: PreTrainedModel) -> Callable[[], None]:
    """Gives a model a config object of its own, since models built from one config share it.

    Args:
        model: The outermost model: a model inside another one shares its config, which has to name the swaps too.

    Returns:
        A function that gives the model its old config object back.
    """
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
