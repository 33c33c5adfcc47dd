"""The entry in a model's configs that names its swaps, and so makes its checkpoint reload."""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from attnswap.surgery.spec import KEY, PatchSpec, read_entry, write_entry
from attnswap.surgery.stacks import AttentionStack


def towers_of(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Returns a model's config and those of its towers."""
    return [config, *(x for x in vars(config).values() if isinstance(x, PreTrainedConfig))]


def entries_of(model: nn.Module) -> list[tuple[PreTrainedConfig, dict[str, Any]]]:
    """Returns the configs of a model that have an entry, with it: those the model saves, else those of its modules."""
    own = getattr(model, "config", None)
    saved = towers_of(own) if isinstance(own, PreTrainedConfig) else []
    found = [(config, entry) for config in saved if isinstance(entry := getattr(config, KEY, None), dict)]
    if found:
        return found
    others = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [(config, entry) for config in others.values() if isinstance(entry := getattr(config, KEY, None), dict)]


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
