"""Lines of JSON that a run adds to a file one by one, so that it can be stopped at any time and continued."""

import json
from pathlib import Path
from typing import Any


def read_whole_lines(path: Path) -> list[Any]:
    """Returns the values of a file's lines; none if there is no file.

    A last line without its line feed was cut off when the run was killed. It is removed from the file, so that the next
    line begins where it should.
    """
    if not path.exists():
        return []
    whole, feed, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        with path.open("r+b") as file:
            file.truncate(len(whole) + len(feed))
    return [json.loads(line) for line in whole.split(b"\n") if line]


def append_line(path: Path, values: Any) -> None:
    """Adds a value as a line of JSON; the folder of the file is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, allow_nan=False) + "\n")
