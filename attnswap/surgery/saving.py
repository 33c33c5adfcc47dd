"""Saving: the entry in a model's config is rendered from its modules before it is written.

A model whose config cannot name what its modules compute is refused before anything is written.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from attnswap.errors import AttnSwapError, CheckpointError, ConfigError, UnsupportedModelError
from attnswap.surgery.entry import carrier_of, write_spec
from attnswap.surgery.guard import WRAPPING
from attnswap.surgery.module import child_of
from attnswap.surgery.patched import patched_stacks
from attnswap.surgery.spec import KEY, read_entry
from attnswap.surgery.stacks import refuse_own_parts


@contextmanager
def config_in_sync(model: PreTrainedModel, state: Mapping[str, Any] | None = None) -> Iterator[None]:
    """A context in which a model's config and weights are written: the config names exactly the swaps of the modules.

    Args:
        model: Any model, patched or not.
        state: The tensors that are written, where they were given.

    Raises:
        CheckpointError: The checkpoint would reload as another model.
    """
    if getattr(model, "_hf_peft_config_loaded", False):  # the adapter's config is written, and not the model's
        yield
        return
    holders = {name: module for name, module in model.named_modules() if KEY in module._modules}
    carrier = carrier_of(model.config)
    if not holders and carrier is None:
        yield
        return
    try:
        configs = _render(model, holders, carrier)
        _check_state(model, holders, state or {})
        _try(model)
    except (ConfigError, UnsupportedModelError) as error:
        raise CheckpointError(f"this {type(model).__name__} cannot be saved with its swaps: {error}") from error
    with _valid(configs):
        yield


def _render(
    model: PreTrainedModel, holders: dict[str, nn.Module], carrier: PreTrainedConfig | None
) -> list[PreTrainedConfig]:
    """Brings the entries of a model's configs up to what its modules hold, and returns those configs."""
    kind = type(model).__name__
    if carrier is None:
        inner = [n for n, m in model.named_modules() if n and isinstance(m, PreTrainedModel) and carrier_of(m.config)]
        way = (
            f"Patch the {kind} as a whole, or let it have the config of its patched part "
            f"(model.config = model.{inner[0]}.config)"
            if inner
            else "Put the model's own config back, or call attnswap.unpatch"
        )
        raise CheckpointError(
            f"{next(iter(holders))} holds a swap, but the config of {kind} has no attnswap entry (was it edited or "
            f"replaced, or is the module another model's?), so what is saved would reload as softmax. {way}"
        )
    _refuse_adapters(holders)
    found = patched_stacks(model)
    refuse_own_parts([stack for stack, _ in found])
    known = {id(module) for stack, _ in found for _, module in stack.modules.values()}
    strange = next((name for name, module in holders.items() if id(module) not in known), None)
    if strange is not None:
        raise CheckpointError(
            f"{strange} holds a swap that the attnswap entry of this {kind} cannot name: it is no part of the "
            "attention that was patched. Unpatch, build the model first, and patch it then"
        )
    if not holders and _named(carrier):
        raise CheckpointError(
            f"the config of {kind} names swaps, but none of its modules holds one: it is another model's config, or "
            "the patched modules were replaced. Give the model a config of its own, or patch it again"
        )
    for stack, spec in found:
        write_spec(stack, spec)
    return [stack.config for stack, _ in found]


def _check_state(model: PreTrainedModel, holders: dict[str, nn.Module], state: Mapping[str, Any]) -> None:
    """Refuses tensors, given to be written in place of the model's own, that have another lambda or none."""
    for name in holders if state else ():
        child = child_of(holders[name])
        for slot, static in child.present_slots().items() if child is not None else ():
            key = f"{_plain(name)}.{KEY}.{slot}.ramp"
            held = state.get(key)
            if held is None or not torch.equal(torch.as_tensor(held).cpu().float(), torch.tensor(static.ramp)):
                raise CheckpointError(
                    f"the state_dict given has {'no' if held is None else 'another'} lambda for {key} than the "
                    f"{type(model).__name__} itself: take it from the model when it is saved"
                )


def _try(model: PreTrainedModel) -> None:
    """Builds the model anew from its config, without weights, and compares where swaps are.

    Raises:
        CheckpointError: Loading would find other swaps in other places, or refuse.
    """
    try:
        with torch.device("meta"):
            fresh = type(model)(copy.deepcopy(model.config))
    except AttnSwapError as error:
        raise CheckpointError(f"what is saved could not be loaded: {error}") from error
    except Exception:  # a class that takes more than a config: whoever loads it gives the rest
        return
    mine, theirs = _swaps(model), _swaps(fresh)
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{name} would be loaded with {theirs.get(name) or 'no swap'}, but holds {mine.get(name) or 'none'}: "
                "does the config say how many layers there are, and each layer_idx where its layer stands?"
            )


def _swaps(model: PreTrainedModel) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Returns the swaps and heads of each attention module by its name, as it is without wrappers."""
    found = {}
    for name, module in model.named_modules():
        child = child_of(module) if KEY in module._modules else None
        if child is not None:
            found[_plain(name)] = {key: (slot.swap, slot.heads) for key, slot in child.slots.items()}
    return found


def _plain(name: str) -> str:
    """Returns a module's name without the wrappers of compilers and sharding."""
    return ".".join(word for word in name.split(".") if word not in (*WRAPPING, "_fsdp_wrapped_module"))


def _named(carrier: PreTrainedConfig) -> bool:
    return any(spec.layers for spec in read_entry(getattr(carrier, KEY)))


def _refuse_adapters(holders: dict[str, nn.Module]) -> None:
    if any(hasattr(module._modules[KEY], "modules_to_save") for module in holders.values()):
        raise CheckpointError(
            "swaps of this model belong to peft adapters, so it cannot be saved as a patched model: save the adapter "
            "(PeftModel.save_pretrained), or call merge_and_unload() first"
        )


@contextmanager
def _valid(configs: list[PreTrainedConfig]) -> Iterator[None]:
    """Lets configs that ask for attention weights pass transformers' check, which knows only "eager" to give any."""
    saved = [(config, config._attn_implementation_internal) for config in configs]
    for config, _ in saved:
        if config.output_attentions:
            config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        for config, internal in reversed(saved):
            config._attn_implementation_internal = internal
