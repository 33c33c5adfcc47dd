"""What a swap is: one file each, found automatically.

A file in this package that defines a subclass of :class:`Swap` with a ``name`` is known to every layer, test, table
and command. A subclass defined anywhere else is known from the moment its module is imported.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from attnswap.errors import ConfigError, nearest
from attnswap.swaps.base import REGISTRY, Call, Feature, ModelInfo, Numbers, Parameter, Swap, Terms, Traits

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

SwapLike = str | Swap | Mapping[str, Any]
"""A swap by name, as a config, or as a mapping with its name and options."""


def names() -> list[str]:
    """Returns the name of every known swap, sorted."""
    return sorted(REGISTRY)


def resolve(swap: SwapLike) -> Swap:
    """Returns the config that a name, mapping or config stands for.

    Args:
        swap: ``"ssmax"``, ``{"name": "ssmax", "form": "scale"}`` or ``SSMax(form="scale")``.

    Raises:
        ConfigError: The name or an option is unknown; the nearest known one is suggested.
    """
    if isinstance(swap, Swap):
        return swap
    if isinstance(swap, str):
        swap = {"name": swap}
    if not isinstance(swap, Mapping) or not isinstance(swap.get("name"), str):
        raise ConfigError(f"a swap is a name, a config or a mapping with a name, not {swap!r}")
    name = swap["name"]
    if name not in REGISTRY:
        raise ConfigError(f'unknown swap "{name}".{nearest(name, names())} Known: {", ".join(names())}')
    return REGISTRY[name].from_dict({k: v for k, v in swap.items() if k != "name"})


def list_swaps() -> list[Swap]:
    """Returns every known swap with its default options; ``.name`` and ``.traits`` describe it."""
    return [REGISTRY[name]() for name in names()]


def config_classes() -> dict[str, type[Swap]]:
    """Returns the config classes by class name (``"SSMax"``, ``"Softpick"``, ...)."""
    return {cls.__name__: cls for cls in REGISTRY.values() if dataclasses.is_dataclass(cls)}


__all__ = [
    "REGISTRY",
    "Call",
    "Feature",
    "ModelInfo",
    "Numbers",
    "Parameter",
    "Swap",
    "SwapLike",
    "Terms",
    "Traits",
    "config_classes",
    "list_swaps",
    "names",
    "resolve",
]
