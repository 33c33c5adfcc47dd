"""What a swap is: one file each, found automatically.

A file in this package that defines a subclass of :class:`Swap` with a ``name`` is known to every layer, test, table
and command. A subclass defined anywhere else is known from the moment its module is imported.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

from attnswap.errors import ConfigError, nearest, require
from attnswap.swaps.base import REGISTRY, Call, Feature, ModelInfo, Numbers, Parameter, Swap, Terms, Traits
from attnswap.swaps.composed import JOINT, Composed, parts_of

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

SwapLike = str | Swap | Mapping[str, Any] | Sequence[Any]
"""A swap by name, as a config, as a mapping with its name and options, or a list of several that act together."""


def names() -> list[str]:
    """Returns the name of every known swap, sorted."""
    return sorted(REGISTRY)


def resolve(swap: SwapLike) -> Swap:
    """Returns the config that a name, mapping or config stands for.

    Args:
        swap: ``"ssmax"``, ``{"name": "ssmax", "form": "scale"}``, ``SSMax(form="scale")``, or a list of these, such as
            ``["softpick", "output-gate"]``, for which ``"softpick+output-gate"`` is short.

    Raises:
        ConfigError: The name or an option is unknown; the nearest known one is suggested.
    """
    if isinstance(swap, Swap):
        return swap
    if isinstance(swap, str) and JOINT in swap:
        return resolve(swap.split(JOINT))
    if isinstance(swap, str):
        swap = {"name": swap}
    if isinstance(swap, list | tuple):
        require(len(swap) > 0, "the list of swaps is empty")
        parts = tuple(resolve(part) for part in swap)
        return parts[0] if len(parts) == 1 else Composed(parts)
    if isinstance(swap, Mapping) and JOINT in str(swap.get("name")):
        return resolve(parts_of(swap))
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
