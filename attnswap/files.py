"""Read users' text files: UTF-8 with or without a byte-order mark, plain or gzipped, whole texts or JSON lines."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnswap.errors import ConfigError

JSON_LINES = (".jsonl", ".ndjson")
"""Names of files with one JSON value a line."""

FOREIGN = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".zip", ".zst", ".xz", ".bz2", ".tar", ".pdf", ".docx")
"""Names of files whose text is inside a format of its own."""

WRAPPED = ("text", "messages")
"""Keys under which JSON lines usually keep their texts."""


def read_file(path: str | Path) -> str:
    """Returns what a text file holds, without a byte-order mark.

    Raises:
        ConfigError: There is no such file, or it is not UTF-8 text.
    """
    path = Path(path)
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ConfigError(f'cannot read the text file "{path}" as UTF-8 text: {error}') from None
    if "\0" in text:
        raise ConfigError(f'cannot read the text file "{path}" as UTF-8 text: it holds NUL characters; is it UTF-16?')
    return text


def read_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yields the lines of a file that are not blank, each with its place for errors.

    Only a line feed ends a line: a JSON string may hold every other separator that ``str.splitlines`` knows.
    """
    for number, line in enumerate(read_file(path).split("\n"), start=1):
        if line.strip():
            yield f"{path} line {number}", line


def parse_line(line: str, where: str) -> Any:
    """Returns the value of a line of JSON.

    Raises:
        ConfigError: The line is none; ``where`` names it.
    """
    try:
        value = json.loads(line)
        if "\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not a line of JSON: {error}") from None
    return value


def read_documents(path: str | Path, key: str = "text") -> Iterator[str]:
    """Yields the documents of a file: its whole text, or in a file of JSON lines the text of each line.

    Args:
        path: A ``.jsonl`` or ``.ndjson`` file, or one of any other name that holds the text itself; also with ``.gz``.
        key: The key of JSON lines that holds the text.

    Raises:
        ConfigError: The file cannot be read, keeps its text in another format, or a line has no such text.
    """
    suffix = kind_of(path)
    if suffix in JSON_LINES:
        yield from (_text_of(parse_line(line, where), key, where) for where, line in read_lines(path))
        return
    refuse_foreign(path)
    text = read_file(path)
    first = next(filter(str.strip, text.split("\n")), "")
    if _wraps_text(first, key):
        raise ConfigError(
            f'"{path}" holds lines of JSON, not the text itself: name it .jsonl, so that the text in each line is read'
        )
    yield text


def kind_of(path: str | Path) -> str:
    """Returns the last part of a file's name in lower case, apart from ``.gz``."""
    path = Path(path)
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def refuse_foreign(path: str | Path, allowed: tuple[str, ...] = ()) -> None:
    """Raises ConfigError for a file whose name says that its text is inside another format."""
    suffix = kind_of(path)
    if suffix in FOREIGN and suffix not in allowed:
        raise ConfigError(
            f'"{path}" is a {suffix} file, whose text is inside that format: write it as JSON lines (.jsonl, '
            '{"text": ...} in each line), or name a copy .txt to read the file as it is'
        )


def _text_of(value: Any, key: str, where: str) -> str:
    text = value.get(key) if isinstance(value, dict) else None
    if not isinstance(text, str):
        found = f"keys: {', '.join(map(str, value))}" if isinstance(value, dict) else f"a {type(value).__name__}"
        chat = '; conversations are read by "kind: chat"' if isinstance(value, dict) and "messages" in value else ""
        raise ConfigError(f'{where}: needs an object with a text "{key}" ({found}){chat}')
    return text


def _wraps_text(line: str, key: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and not value.keys().isdisjoint((key, *WRAPPED))
