"""Swap the attention normalizer of a pretrained transformers model: patch, fine-tune, evaluate, save, undo.

Importing this package imports neither torch nor transformers. Public names are imported when they are first used, and
what attnswap adds to transformers and peft is added when these are imported.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from attnswap.imports import after_import
from attnswap.surgery.install import install

__version__ = "0.1.0"

_HOMES = {
    "AttnSwapConfig": "attnswap.adapters.config",
    "AttnSwapError": "attnswap.errors",
    "CheckpointError": "attnswap.errors",
    "ConfigError": "attnswap.errors",
    "NumericsError": "attnswap.errors",
    "PatchReport": "attnswap.surgery.report",
    "Swap": "attnswap.swaps.base",
    "UnsupportedModelError": "attnswap.errors",
    "attention": "attnswap.attention.functional",
    "attention_weights": "attnswap.attention.functional",
    "bypassed": "attnswap.surgery.bypass",
    "describe": "attnswap.surgery.patch",
    "evaluate_perplexity": "attnswap.evaluation.perplexity",
    "from_pretrained": "attnswap.surgery.checkpoint",
    "list_swaps": "attnswap.swaps",
    "parameter_groups": "attnswap.surgery.parameters",
    "patch": "attnswap.surgery.patch",
    "set_ramp": "attnswap.surgery.move",
    "swap_parameters": "attnswap.surgery.parameters",
    "unpatch": "attnswap.surgery.patch",
}
"""The module that defines each public name. Every swap's config class is public too, without an entry here.

Type checkers read ``__init__.pyi``. After a change here, or a new swap: ``python -m attnswap.cli.stub``.
"""

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Imports a public name, a swap's config class or a part of the package when it is first used."""
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
        from attnswap.swaps import config_classes

        classes = config_classes()
        if name in classes:
            return classes[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from attnswap.swaps import config_classes

    return sorted([*__all__, *config_classes()])


class _Package(ModuleType):
    """The package as a module, in which ``attnswap.attention`` is the function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute, unless a part of the package that was just imported would hide a public name."""
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def _register_adapters(_peft: ModuleType) -> None:
    from attnswap.adapters.register import register

    register()


sys.modules[__name__].__class__ = _Package
install()
after_import("peft", _register_adapters)
