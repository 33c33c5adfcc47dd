"""The result of a benchmark, and its JSON."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from attnswap.bench.bounds import Verdict
from attnswap.bench.cases import SDPA, Case, Setting, Shape
from attnswap.bench.statistics import Ratio, exponent
from attnswap.bench.timing import Round
from attnswap.evaluation.result import write_atomically

SCHEMA = "attnswap.bench/1"


@dataclass(frozen=True)
class Memory:
    """Extra peak memory of one call and of SDPA, in bytes."""

    bytes: int
    sdpa_bytes: int

    @property
    def ratio(self) -> float | None:
        """The ratio to SDPA, or None if SDPA needs no extra memory."""
        return self.bytes / self.sdpa_bytes if self.sdpa_bytes else None


@dataclass(frozen=True)
class Cell:
    """The measurements of one case at one setting.

    Attributes:
        case: The case.
        setting: The setting.
        backend: Name of the backend, for swaps.
        rounds: Seconds of every round; empty if the cell was skipped.
        ratio: Median over rounds of the ratio of the time to SDPA's, with its 95% interval.
        bound: Upper bound of the ratio, if there is one.
        verdict: Whether the ratio is below its bound.
        memory: Extra peak memory, if it was measured.
        skipped: Why nothing was timed, or None.
        memory_skipped: Why memory was not measured, or None.
        matmul_tflops: The measured rate of matrix products, on a GPU.
    """

    case: Case
    setting: Setting
    backend: str | None = None
    rounds: list[Round] = field(default_factory=list)
    ratio: Ratio | None = None
    bound: float | None = None
    verdict: Verdict = "report only"
    memory: Memory | None = None
    skipped: str | None = None
    memory_skipped: str | None = None
    matmul_tflops: float | None = None

    @property
    def milliseconds(self) -> float | None:
        """Median time of a call."""
        return statistics.median(r.ours for r in self.rounds) * 1e3 if self.rounds else None

    @property
    def tflops(self) -> float | None:
        """Rate of the operations of :attr:`Setting.operations` in TFLOP/s."""
        return self.setting.operations / self.milliseconds / 1e9 if self.milliseconds else None

    @property
    def share(self) -> float | None:
        """That rate relative to the measured rate of matrix products."""
        return self.tflops / self.matmul_tflops if self.tflops and self.matmul_tflops else None

    def to_dict(self) -> dict[str, Any]:
        """Returns the cell as plain values for JSON."""
        values = asdict(self)
        case, setting = values.pop("case"), values.pop("setting")
        if self.memory:
            values["memory"]["ratio"] = self.memory.ratio
        derived = {"milliseconds": self.milliseconds, "tflops": self.tflops, "share": self.share}
        return {**case, **setting, **values, **derived}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Cell":
        """Returns the cell of :meth:`to_dict`."""

        def pick(kind: Any, **changes: Any) -> Any:
            return kind(**{f.name: values[f.name] for f in fields(kind) if f.name not in changes}, **changes)

        memory, ratio = values["memory"], values["ratio"]
        return pick(
            cls,
            case=pick(Case),
            setting=pick(Setting, shape=Shape(**values["shape"])),
            rounds=[Round(**r) for r in values["rounds"]],
            ratio=Ratio(**ratio) if ratio else None,
            memory=Memory(memory["bytes"], memory["sdpa_bytes"]) if memory else None,
        )


@dataclass(frozen=True)
class BenchResult:
    """The result of a benchmark.

    Attributes:
        cells: The measurements of every case at every setting.
        plan: The options of the benchmark.
        env: Versions, commit, processor, threads, denormal mode.
        cost: Duration in seconds, and the estimate made before, if there was one.
        created: UTC time, ISO 8601.
    """

    cells: list[Cell]
    plan: dict[str, Any]
    env: dict[str, Any]
    cost: dict[str, float | None]
    created: str

    def exponents(self) -> list[dict[str, Any]]:
        """Returns how extra memory grows with the length, for every swap and for SDPA: ``bytes ~ length ** exponent``.

        The bytes are those of one sequence of a batch. SDPA's exponent is fitted to the same lengths as the swap's.
        """
        found = []
        for label, group in _grouped(cell for cell in self.cells if cell.memory):
            lengths = [cell.setting.length for cell in group]
            used = [(cell.memory, cell.setting.batch) for cell in group if cell.memory]
            found.append(
                {
                    **label,
                    "lengths": lengths,
                    "exponent": exponent(lengths, [m.bytes / batch for m, batch in used]),
                    f"{SDPA.label}_exponent": exponent(lengths, [m.sdpa_bytes / batch for m, batch in used]),
                }
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Returns the report; ``schema.json`` in this folder describes it."""
        return {
            "schema": SCHEMA,
            "created": self.created,
            "env": self.env,
            "plan": self.plan,
            "cost": self.cost,
            "cells": [cell.to_dict() for cell in self.cells],
            "memory_exponents": self.exponents(),
        }

    def save(self, path: Path) -> Path:
        """Writes the report as JSON, atomically."""
        write_atomically(path, (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode())
        return path


def _grouped(cells: Iterator[Cell]) -> Iterator[tuple[dict[str, str], list[Cell]]]:
    groups: dict[tuple[str, str, str, str], list[Cell]] = {}
    for cell in cells:
        setting = cell.setting
        groups.setdefault((cell.case.label, setting.shape.name, setting.dtype, setting.mode), []).append(cell)
    for key, group in groups.items():
        yield dict(zip(("label", "shape", "dtype", "mode"), key, strict=True)), group
