"""The cells of a benchmark as lines of JSON, written one by one, so that a run can be stopped and continued."""

import json
from pathlib import Path
from typing import Any

from attnswap.bench.result import Cell
from attnswap.errors import ConfigError

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
        head = json.loads(json.dumps({"plan": plan, "machine": machine}))
        if self.path is None:
            return
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(head)
            return
        first, *lines = self.path.read_text(encoding="utf-8").splitlines()
        for what, now in head.items():
            before = json.loads(first)[what]
            different = [name for name in now if now[name] != before.get(name)]
            if different:
                names = ", ".join(different)
                raise ConfigError(
                    f"{self.path} is of another {what} ({names} differ): give another --out, or remove it"
                )
        for line in lines:
            cell = Cell.from_dict(json.loads(line))
            self.cells[key(cell)] = cell

    def add(self, cell: Cell) -> None:
        """Writes a finished cell."""
        self.cells[key(cell)] = cell
        self._write(cell.to_dict())

    def _write(self, values: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                print(json.dumps(values, allow_nan=False), file=file, flush=True)


def key(cell: Cell) -> str:
    """Returns what tells cells of one benchmark apart."""
    setting = cell.setting
    return f"{cell.case.label} {setting.shape.name} {setting.length} {setting.dtype} {setting.mode}"
