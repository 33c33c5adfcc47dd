"""What is saved is what is computed: the entry in a model's config is rendered from its modules before it is written.

A model whose config cannot name what its modules compute is refused before anything is written.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from attnswap.errors import CheckpointError
from attnswap.surgery.attach import carrier_of, config_of, spec_of, write_spec
from attnswap.surgery.spec import KEY, PatchSpec
from attnswap.surgery.stacks import attention_modules


@contextmanager
def faithful(model: PreTrainedModel) -> Iterator[None]:
    """The time in which a model's config and weights are written.

    Args:
        model: Any model, patched or not.

    Raises:
        CheckpointError: What would be written reloads as something else than the model computes.
    """
    if getattr(model, "_hf_peft_config_loaded", False):  # the adapter's config is written, and not the model's
        yield
        return
    holders = {name: module for name, module in model.named_modules() if KEY in module._modules}
    carrier = carrier_of(model.config)
    if not holders and carrier is None:
        yield
        return
    with _valid(_render(model, holders, carrier)):
        yield


def _render(model: PreTrainedModel, holders: dict[str, nn.Module], carrier: PreTrainedConfig | None) -> Any:
    """Brings the entry of a model's config up to what its modules hold, and returns the config that carries it."""
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
    spec = spec_of(model)
    assert spec is not None
    served = attention_modules(model, spec.part, None if carrier is model.config else carrier)
    known = {id(module) for _, module in served.values()}
    strange = next((name for name, module in holders.items() if id(module) not in known), None)
    if strange is not None:
        raise CheckpointError(
            f"{strange} holds a swap that the attnswap entry of this {kind} cannot name: it is no part of the "
            f"attention that was patched. Unpatch, build the model first, and patch it then"
        )
    _refuse_adapters(holders)
    if not holders and _named(carrier):
        raise CheckpointError(
            f"the config of {kind} names swaps, but none of its modules holds one: it is another model's config, or "
            "the patched modules were replaced. Give the model a config of its own, or patch it again"
        )
    config = config_of(model)
    write_spec(model, config, spec)
    return config


def _named(carrier: PreTrainedConfig) -> bool:
    return bool(PatchSpec.from_dict(getattr(carrier, KEY)).layers)


def _refuse_adapters(holders: dict[str, nn.Module]) -> None:
    if any(hasattr(module._modules[KEY], "serving") for module in holders.values()):
        raise CheckpointError(
            "the swaps of this model belong to peft adapters, so it cannot be saved as a patched model: save the "
            "adapter (PeftModel.save_pretrained), or call merge_and_unload() first"
        )


@contextmanager
def _valid(config: PreTrainedConfig) -> Iterator[None]:
    """Lets a config that asks for attention weights pass transformers' check, which knows only "eager" to give any."""
    internal = config._attn_implementation_internal
    if config.output_attentions:
        config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        config._attn_implementation_internal = internal
