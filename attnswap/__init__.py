"""Swap the attention normalizer of a pretrained transformers model: patch, fine-tune, evaluate, save, undo."""

from typing import Any

from attnswap.adapters.kind import installed
from attnswap.adapters.register import register
from attnswap.attention import attention
from attnswap.errors import AttnSwapError, CheckpointError, ConfigError, NumericsError, UnsupportedModelError
from attnswap.surgery import (
    PatchReport,
    bypassed,
    describe,
    from_pretrained,
    parameter_groups,
    patch,
    set_ramp,
    swap_parameters,
    unpatch,
)
from attnswap.swaps import Swap, config_classes, list_swaps

__version__ = "0.1.0"

if installed():
    register()

__all__ = [
    "AttnSwapConfig",
    "AttnSwapError",
    "CheckpointError",
    "ConfigError",
    "NumericsError",
    "PatchReport",
    "Swap",
    "UnsupportedModelError",
    "attention",
    "bypassed",
    "describe",
    "evaluate_perplexity",
    "from_pretrained",
    "list_swaps",
    "parameter_groups",
    "patch",
    "set_ramp",
    "swap_parameters",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """Gives every swap's config class under its own name, and what is slow to import only when asked for."""
    if name == "evaluate_perplexity":
        from attnswap.evaluation import evaluate_perplexity

        return evaluate_perplexity
    if name == "AttnSwapConfig":
        from attnswap.adapters.config import AttnSwapConfig

        return AttnSwapConfig
    classes = config_classes()
    if name in classes:
        return classes[name]
    raise AttributeError(f"module 'attnswap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *config_classes()])
