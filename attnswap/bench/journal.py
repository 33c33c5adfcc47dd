"""The cells of a benchmark as lines of JSON, written one by one, so that a run can be stopped and continued."""

import json
from pathlib import Path
from typing import Any

from attnswap.bench.result import Cell
from attnswap.errors import ConfigError
from attnswap.lines import append_line, read_whole_lines

NAME = "cells.jsonl"


class Journal:
    """A file that holds the plan and the machine of a benchmark, and its finished cells.

    Args:
        folder: The folder of the report; None: nothing is written.
        plan: The options of the benchmark.
        machine: What must be the same when a run is continued.

    Raises:
        ConfigError: The file is that of another plan or of another machine.
    """

    def __init__(self, folder: Path | None, plan: dict[str, Any], machine: dict[str, Any]) -> None:
        self.path = None if folder is None else folder / NAME
        self.cells: dict[str, Cell] = {}
        if self.path is None:
            return
        head = json.loads(json.dumps({"plan": plan, "machine": machine}))
        lines = read_whole_lines(self.path)
        if not lines:
            append_line(self.path, head)
            return
        for what, now in head.items():
            before = lines[0][what]
            different = [name for name in now if now[name] != before.get(name)]
            if different:
                names = ", ".join(different)
                raise ConfigError(
                    f"{self.path} is of another {what} ({names} differ): give another --out, or remove it"
                )
        self.cells = {key(cell): cell for cell in map(Cell.from_dict, lines[1:])}

    def add(self, cell: Cell) -> None:
        """Writes a finished cell."""
        self.cells[key(cell)] = cell
        if self.path is not None:
            append_line(self.path, cell.to_dict())


def key(cell: Cell) -> str:
    """Returns what tells cells of one benchmark apart."""
    setting = cell.setting
    return f"{cell.case.label} {setting.shape.name} {setting.length} {setting.dtype} {setting.mode}"
