"""Read and write plain YAML: without aliases, repeated keys and big files, and with the numbers of YAML 1.2."""

import re
from pathlib import Path
from typing import Any

import yaml

from attnswap.errors import ConfigError, require

MAX_BYTES = 1 << 15
"""A recipe has two kilobytes; what is longer costs time before anything can be said of it."""
MAX_DEPTH = 16
MAX_DIGITS = 64

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
