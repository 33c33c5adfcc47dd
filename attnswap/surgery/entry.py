"""The entry in a model's configs that names its swaps, and so makes its checkpoint reload."""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from attnswap.surgery.spec import KEY, PatchSpec, read_entry, write_entry
from attnswap.surgery.stacks import AttentionStack


def towers_of(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Returns a model's config and those of its towers."""
    return [config, *(x for x in vars(config).values() if isinstance(x, PreTrainedConfig))]


def entries_of(model: nn.Module, loading: bool = False) -> list[tuple[PreTrainedConfig, dict[str, Any], bool]]:
    """Returns the configs of a model that have an entry, the entry, and whether the model saves the config.

    Args:
        model: The model.
        loading: Leave out configs that are not saved: while a model is built, a half's copy of the config names parts
            of the whole.
    """
    configs = [(config, True) for config in saved_configs(model)]
    configs += [] if loading else [(config, False) for config in unsaved_configs(model)]
    return [(c, entry, kept) for c, kept in configs if isinstance(entry := getattr(c, KEY, None), dict)]


def saved_configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Returns the configs that are saved with a model: its own and those of its towers."""
    own = getattr(model, "config", None)
    return towers_of(own) if isinstance(own, PreTrainedConfig) else []


def unsaved_configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Returns configs of a model's modules that are not saved with it, such as copies for each half of the model."""
    saved = {id(config) for config in saved_configs(model)}
    found = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    return [config for key, config in found.items() if key not in saved]


def carrier_of(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """Returns the first config with an entry among a model's own and those of its towers."""
    return next((part for part in towers_of(config) if isinstance(getattr(part, KEY, None), dict)), None)


def is_patched(model: nn.Module) -> bool:
    """Whether some config of a model's modules has an entry."""
    return bool(entries_of(model))


def write_spec(stack: AttentionStack, spec: PatchSpec | None) -> None:
    """Enters the spec of a stack into the configs that carry it, or takes it out.

    Args:
        stack: The attention modules.
        spec: What they have; None takes out what is said of this stack.
    """
    config, saved = stack.config, stack.model.config
    # Some encoder-decoders give each half a copy of the config, which is not what they save.
    for carrier in [config] if any(config is x for x in towers_of(saved)) else [config, saved]:
        entry = getattr(carrier, KEY, None)
        specs = {other.part: other for other in read_entry(entry)} if isinstance(entry, dict) else {}
        if spec is None:
            specs.pop(stack.part, None)
        else:
            specs[stack.part] = spec
        if specs:
            setattr(carrier, KEY, write_entry(list(specs.values())))
            # Written to config.json, so that a process without attnswap refuses the checkpoint by name.
            carrier.attn_implementation = KEY
        else:
            forget(carrier)


def forget(config: PreTrainedConfig) -> None:
    """Takes an entry, and the implementation that goes with it, out of a config."""
    for name in ("attn_implementation", KEY):
        config.__dict__.pop(name, None)


def clear_entries(model: nn.Module, before: str) -> None:
    """Takes all entries out of the configs of an unpatched model, also those of copies that a loaded model has.

    Args:
        model: The model.
        before: The attention implementation for configs that still name attnswap.
    """
    for config in [*saved_configs(model), *unsaved_configs(model)]:
        forget(config)
        if config._attn_implementation == KEY:
            config._attn_implementation_internal = before
