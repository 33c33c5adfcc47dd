"""Read YAML into dataclasses and refuse everything that is not meant: unknown keys, wrong types, aliases, big files."""

import dataclasses
import math
import re
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from attnswap.errors import ConfigError, nearest, require

MAX_BYTES = 1 << 15
"""A recipe has two kilobytes; what is longer costs time before anything can be said of it."""
MAX_DEPTH = 16
MAX_DIGITS = 64

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_T = TypeVar("_T")

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_INTEGER = re.compile(r"([-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+)\Z")
_REAL = re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z")


class _Loader(_Base):
    """Reads numbers as YAML 1.2 and JSON write them: ``1:10`` is text and not 70, ``010`` is ten."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag not in (_INT, _FLOAT)]
    for first, forms in _Base.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would take for a number."""


for _kind in (_Loader, _Dumper):
    for _tag, _form, _first in ((_INT, _INTEGER, "-+0123456789"), (_FLOAT, _REAL, "-+.0123456789")):
        _kind.add_implicit_resolver(_tag, _form, list(_first))


def _construct_number(loader: Any, node: yaml.ScalarNode) -> int | float:
    """Makes a number, also one with an explicit tag, of text of a bounded length."""
    text = str(loader.construct_scalar(node))
    form = _INTEGER if node.tag == _INT else _REAL
    if not form.match(text) or len(text) > MAX_DIGITS:
        shown = text if len(text) <= MAX_DIGITS else f"{text[:20]}... ({len(text)} characters)"
        raise yaml.constructor.ConstructorError(None, None, f'"{shown}" is no number', node.start_mark)
    if node.tag == _FLOAT:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))


_Loader.add_constructor(_INT, _construct_number)
_Loader.add_constructor(_FLOAT, _construct_number)


def read_yaml(path: str | Path) -> Any:
    """Reads one YAML document from a file of at most 32 kB.

    Raises:
        ConfigError: The file is missing, too big, not UTF-8 or not plain YAML (see :func:`parse_yaml`).
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f'cannot read "{path}": {getattr(error, "strerror", None) or error}') from None
    _check_size(len(raw), f'"{path}"')
    try:
        return parse_yaml(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError:
        raise ConfigError(f'"{path}" is not a UTF-8 text file') from None


def parse_yaml(text: str, where: str) -> Any:
    """Parses plain YAML: no aliases, no repeated keys, at most 32 kB and 16 levels deep, numbers as in YAML 1.2.

    Args:
        text: The YAML text.
        where: Names the source in errors.

    Raises:
        ConfigError: The text is not such YAML.
    """
    _check_size(len(text), where)
    try:
        _refuse_aliases_and_depth(text, where)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            _refuse_repeated_keys(node, where)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except ConfigError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # PyYAML's constructors raise these for an impossible date, an empty tagged number and the like.
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def _check_size(size: int, where: str) -> None:
    require(size <= MAX_BYTES, f"{where} is larger than {MAX_BYTES >> 10} kB, which no recipe is")


def parse_value(text: str, where: str) -> Any:
    """Parses a value of the command line, where ``2:`` is a slice; YAML would take it for a key without a value.

    Raises:
        ConfigError: See :func:`parse_yaml`.
    """
    slice_of_layers = re.fullmatch(r"\s*([-+]?\d*:[-+\d:]*)\s*", text)
    return slice_of_layers[1] if slice_of_layers else parse_yaml(text, where)


def dump_yaml(values: Any) -> str:
    """Writes plain values as YAML that this module, and readers of YAML 1.1, read back as they are."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def _refuse_aliases_and_depth(text: str, where: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{where}{_line(event)}: aliases (*{event.anchor}) are not allowed")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{where}{_line(event)}: nested more than {MAX_DEPTH} levels deep")


def _line(part: yaml.Event | yaml.Node) -> str:
    return f" line {part.start_mark.line + 1}" if part.start_mark else ""


def _refuse_repeated_keys(node: yaml.Node | None, where: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConfigError(f'{where}{_line(key)}: the key "{key.value}" is given twice')
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            _refuse_repeated_keys(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, where)


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
    if origin in (Union, types.UnionType):
        return _coerce_union(value, args, hint, path)
    if origin is Literal:
        if any(value == option and type(value) is type(option) for option in args):
            return value
        hint_text = nearest(value, [str(a) for a in args]) if isinstance(value, str) else ""
        raise ConfigError(f"{path}: must be one of {', '.join(map(str, args))}, not {show(value)}.{hint_text}")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_mapping(hint, value, path)
    if origin is list and isinstance(value, list):
        return [coerce(item, args[0], f"{path}[{i}]") for i, item in enumerate(value)]
    if (origin is dict or hint is dict) and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: coerce(item, args[1] if args else Any, join(path, key)) for key, item in value.items()}
    if hint is float and (number := _as_float(value)) is not None:
        return number
    if hint is int and isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63:
        return value
    if hint in (bool, str, types.NoneType) and isinstance(value, hint):
        return value
    if isinstance(hint, type) and issubclass(hint, Enum) and value in [member.value for member in hint]:
        return value
    raise ConfigError(f"{path}: must be {_name(hint)}, not {show(value)}")


def _coerce_union(value: Any, options: tuple[Any, ...], hint: Any, path: str) -> Any:
    enums = [option for option in options if isinstance(option, type) and issubclass(option, Enum)]
    known = [str(member.value) for option in enums for member in option]
    if value is False and bool not in options and "no" in known:
        return "no"
    if enums and isinstance(value, str):  # "Enum | str" of transformers: only the enum's own values are meant
        if value not in known:
            raise ConfigError(f'{path}: unknown value "{value}".{nearest(value, known)} Known: {", ".join(known)}')
        return value
    real = [option for option in options if option is not types.NoneType]
    if len(real) == 1 and value is not None:
        return coerce(value, real[0], path)
    for option in sorted(options, key=lambda option: option is float):
        try:
            return coerce(value, option, path)
        except ConfigError:
            continue
    raise ConfigError(f"{path}: must be {_name(hint)}, not {show(value)}")


def _as_float(value: Any) -> float | None:
    """Returns a finite float, or None if ``value`` is not one."""
    if isinstance(value, bool) or not (isinstance(value, int | float) or _is_number_text(value)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _is_number_text(value: Any) -> bool:
    return isinstance(value, str) and _NUMBER.fullmatch(value) is not None


def _name(hint: Any) -> str:
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
    names |= {types.NoneType: "null", dict: "a mapping"}
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_name(option) for option in get_args(hint)))
    if get_origin(hint) in (list, dict):
        return "a list" if get_origin(hint) is list else "a mapping with text keys"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(str(member.value) for member in hint)
    return names.get(hint, f"a {getattr(hint, '__name__', hint)}")
