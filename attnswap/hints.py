"""Check plain values against type hints: the options of swaps, and recipes read into dataclasses."""

import dataclasses
import re
import sys
from collections.abc import Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from attnswap.errors import ConfigError, nearest

UNIONS = (Union, UnionType)
"""The origins of ``Union[int, str]`` and ``int | str``."""

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_T = TypeVar("_T")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type that a hint asks for, without any conversion.

    A whole number fits ``float``. Booleans are not numbers, and neither are infinities and NaN. An enum takes the
    values of its members.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if origin in UNIONS:
        return any(fits(value, option) for option in args)
    if hint in (int, float):
        allowed = int if hint is int else (int, float)
        return isinstance(value, allowed) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if origin is list:
        return isinstance(value, list) and all(fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in [member.value for member in hint]
    return isinstance(value, hint)


def spell(hint: Any) -> str:
    """Returns a hint in words, such as "a whole number or null", for error messages."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f'"{choice}"' for choice in args)
    if origin in UNIONS:
        return " or ".join(dict.fromkeys(spell(option) for option in args))
    if origin in (list, dict):
        return "a list" if origin is list else "a mapping with text keys"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(str(member.value) for member in hint)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a mapping"}
    return {NoneType: "null", **words}.get(hint, f"a {getattr(hint, '__name__', hint)}")


def from_mapping(cls: type[_T], mapping: Any, path: str = "") -> _T:
    """Builds a dataclass from plain values, strictly.

    Args:
        cls: A dataclass; fields may be nested dataclasses, unions, literals, lists, dicts and scalars.
        mapping: Keys are field names.
        path: Dotted path of this mapping, for errors.

    Raises:
        ConfigError: A key is unknown (the nearest valid one is named) or missing, or a value has the wrong type.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{path or 'the recipe'}: must be a mapping of keys to values, not {show(mapping)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    values = {}
    for key, value in mapping.items():
        if key not in fields:
            raise unknown_key(key, list(fields), path)
        values[key] = coerce(value, hints[key], join(path, key))
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f'missing key "{join(path, name)}"')
    return cls(**values)


def unknown_key(key: Any, known: list[str], path: str) -> ConfigError:
    """Returns the error for a key that is not among ``known``, with the full path of the nearest one."""
    hint = nearest(str(key), known).replace('"', f'"{path}.', 1) if path else nearest(str(key), known)
    return ConfigError(f'unknown key "{join(path, key)}".{hint}' + ("" if hint else f" Known: {', '.join(known)}"))


def join(path: str, key: Any) -> str:
    """Returns the dotted path of ``key`` under ``path``."""
    return f"{path}.{key}" if path else str(key)


def show(value: Any) -> str:
    """Returns a value with its type, cut to a readable length."""
    try:
        text = repr(value)
    except ValueError:  # whole numbers of thousands of digits
        text = "a number that is too long to print"
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def coerce(value: Any, hint: Any, path: str) -> Any:
    """Returns ``value`` as the type ``hint`` asks for.

    Whole numbers of at most 64 bits serve as floats, and so do numbers in quotes. An unquoted ``no``, which YAML 1.1
    reads as false, serves where "no" is one of an enum's values. Nothing else is converted.

    Raises:
        ConfigError: The value does not fit.
    """
    if hint is Any:
        return value
    origin, args = get_origin(hint), get_args(hint)
    if origin in UNIONS:
        return _coerce_union(value, args, hint, path)
    if origin is Literal:
        if fits(value, hint):
            return value
        hint_text = nearest(value, [str(a) for a in args]) if isinstance(value, str) else ""
        raise ConfigError(f"{path}: must be one of {', '.join(map(str, args))}, not {show(value)}.{hint_text}")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_mapping(hint, value, path)
    if origin is list and isinstance(value, list):
        return [coerce(item, args[0], f"{path}[{i}]") for i, item in enumerate(value)]
    if (origin is dict or hint is dict) and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: coerce(item, args[1] if args else Any, join(path, key)) for key, item in value.items()}
    if hint is float:
        number = float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
        if not fits(number, float):
            raise ConfigError(f"{path}: must be a finite number, not {show(value)}")
        return float(number)
    if hint in (int, bool, str, NoneType) and fits(value, hint) and (hint is not int or -(1 << 63) <= value < 1 << 63):
        return value
    if isinstance(hint, type) and issubclass(hint, Enum) and fits(value, hint):
        return value
    raise ConfigError(f"{path}: must be {spell(hint)}, not {show(value)}")


def _coerce_union(value: Any, options: tuple[Any, ...], hint: Any, path: str) -> Any:
    enums = [option for option in options if isinstance(option, type) and issubclass(option, Enum)]
    known = [str(member.value) for option in enums for member in option]
    if value is False and bool not in options and "no" in known:
        return "no"
    if enums and isinstance(value, str):  # "Enum | str" of transformers: only the enum's own values are meant
        if value not in known:
            raise ConfigError(f'{path}: unknown value "{value}".{nearest(value, known)} Known: {", ".join(known)}')
        return value
    real = [option for option in options if option is not NoneType]
    if len(real) == 1 and value is not None:
        return coerce(value, real[0], path)
    for option in sorted(options, key=lambda option: option is float):
        try:
            return coerce(value, option, path)
        except ConfigError:
            continue
    raise ConfigError(f"{path}: must be {spell(hint)}, not {show(value)}")
