"""Read users' text files: UTF-8 with or without a byte-order mark, plain or gzipped, whole texts or JSON lines."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnswap.errors import ConfigError

JSON_LINES = (".jsonl", ".ndjson")
"""Suffixes of files with one JSON value per line."""

CONTAINERS = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".zip", ".zst", ".xz", ".bz2", ".tar", ".pdf", ".docx")
"""Suffixes of formats that must be decoded to get at their text, which attnswap does not do."""

TEXT_KEYS = ("text", "messages")
"""Keys that usually hold the text in JSON lines."""


def read_file(path: str | Path) -> str:
    """Returns the content of a text file, without a byte-order mark.

    Raises:
        ConfigError: The file does not exist, or is not UTF-8 text.
    """
    path = Path(path)
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ConfigError(f'cannot read the text file "{path}" as UTF-8 text: {error}') from None
    if "\0" in text:
        raise ConfigError(f'cannot read the text file "{path}" as UTF-8 text: it has NUL characters; is it UTF-16?')
    return text


def read_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yields ``(location, line)`` for each line that is not blank; the location is for error messages.

    Splits at line feeds only, since JSON strings may contain the other separators of ``str.splitlines``.
    """
    for number, line in enumerate(read_file(path).split("\n"), start=1):
        if line.strip():
            yield f"{path} line {number}", line


def parse_line(line: str, where: str) -> Any:
    """Returns the value of a line of JSON.

    Args:
        line: The line.
        where: Its location, for the error message.

    Raises:
        ConfigError: The line is not valid JSON.
    """
    try:
        value = json.loads(line)
        if "\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()  # an unpaired surrogate is valid JSON but cannot be encoded
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None
    return value


def read_documents(path: str | Path, key: str = "text") -> Iterator[str]:
    """Yields the documents of a file: its whole text, or in a file of JSON lines the text of each line.

    Args:
        path: A ``.jsonl`` or ``.ndjson`` file, or a plain text file with any other suffix; ``.gz`` may follow.
        key: The key of JSON lines that holds the text.

    Raises:
        ConfigError: The file cannot be read or is of a format that must be decoded, or a line lacks the key.
    """
    suffix = suffix_of(path)
    if suffix in JSON_LINES:
        yield from (_text_of(parse_line(line, where), key, where) for where, line in read_lines(path))
        return
    refuse_container(path)
    text = read_file(path)
    first = next(filter(str.strip, text.split("\n")), "")
    if _is_json_record(first, key):
        raise ConfigError(
            f'"{path}" contains JSON lines, not plain text: rename it to .jsonl, so that the text of each line is read'
        )
    yield text


def suffix_of(path: str | Path) -> str:
    """Returns a file's suffix in lower case; of ``name.jsonl.gz`` it is ``.jsonl``."""
    path = Path(path)
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def refuse_container(path: str | Path, allowed: tuple[str, ...] = ()) -> None:
    """Raises ConfigError for a file with one of the suffixes in :data:`CONTAINERS`."""
    suffix = suffix_of(path)
    if suffix in CONTAINERS and suffix not in allowed:
        raise ConfigError(
            f'"{path}" is a {suffix} file, from which attnswap extracts no text: convert it to JSON lines (.jsonl, '
            '{"text": ...} in each line), or copy it to a .txt file to read it as plain text'
        )


def _text_of(value: Any, key: str, where: str) -> str:
    text = value.get(key) if isinstance(value, dict) else None
    if not isinstance(text, str):
        found = f"keys: {', '.join(map(str, value))}" if isinstance(value, dict) else f"a {type(value).__name__}"
        chat = '; for conversations, set "kind: chat"' if isinstance(value, dict) and "messages" in value else ""
        raise ConfigError(f'{where}: must be an object with a string "{key}" ({found}){chat}')
    return text


def _is_json_record(line: str, key: str) -> bool:
    """Whether a line is a JSON object that has its text under a key."""
    if not line.lstrip().startswith("{"):
        return False
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and not value.keys().isdisjoint((key, *TEXT_KEYS))
