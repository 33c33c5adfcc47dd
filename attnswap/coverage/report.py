"""The coverage table, for the terminal and as Markdown."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from attnswap.evaluation.result import write_atomically
from attnswap.markdown import markdown_table

HEAD = ("type", "swap", "verdict", "why")


def _lines(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Returns type, swap, verdict and reason of every row."""
    lines = []
    for row in report["rows"]:
        wrong = [f"{name}: {said}" for name, said in row["columns"].items() if said != "pass"]
        verdict = "pass" if row["passes"] else "not patched" if row["reason"] else "fail"
        lines.append((row["type"], row["swap"], verdict, row["reason"] or "; ".join(wrong)))
    return lines


def coverage_table(report: dict[str, Any]) -> Table:
    """Returns a table for the terminal: the number of types that pass, and all rows that do not or have a remark."""
    title = f"{report['passing']} of {report['types']} types pass every column (transformers {report['transformers']})"
    shown = Table(title=title, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in HEAD:
        shown.add_column(name)
    for line in _lines(report):
        if line[2] != "pass" or line[3]:
            shown.add_row(*line)
    return shown


def write_coverage(report: dict[str, Any], out: Path) -> None:
    """Writes ``coverage.json`` and ``README.md``, each atomically."""
    write_atomically(out / "coverage.json", (json.dumps(report, indent=1) + "\n").encode())
    types = {row["type"]: row for row in report["rows"]}
    passing = [t for t in types if all(r["passes"] for r in report["rows"] if r["type"] == t)]
    lines = _lines(report)
    rest = [line for line in lines if line[0] not in passing]
    beside = [f"{kind} ({swap}: {why})" for kind, swap, _, why in lines if kind in passing and why]
    by_seam = {seam: [t for t in passing if types[t]["seam"] == seam] for seam in ("interface", "scores")}
    text = TEXT.format(
        passing=len(passing),
        types=report["types"],
        transformers=report["transformers"],
        swaps=" and ".join(report["swaps"]),
        interface=", ".join(by_seam["interface"]),
        scores=", ".join(by_seam["scores"]),
        beside="; ".join(beside) or "none",
        rest=markdown_table(HEAD, [(t, swap or "-", *said) for t, swap, *said in rest], words=len(HEAD)),
    )
    write_atomically(out / "README.md", text.encode())


TEXT = """# Which model types can be patched

    attnswap coverage --out results/coverage

Transformers {transformers} has {types} model types with a causal language model. {passing} of them pass every check.
Each type is tested on a tiny random model with {swaps}. The checks:

- a swap that starts as softmax does not change the outputs;
- a swap that does not start as softmax reaches the output from every head;
- every layer equals the dense fp64 reference;
- decoding with a KV cache equals the full forward pass;
- every parameter has a gradient;
- saving, reloading and unpatching change no bit.

Passing types that use transformers' attention interface: {interface}.

Passing types whose attention modules call `softmax` themselves: {scores}.

A check that the unpatched model fails too does not count: {beside}.

## Types that do not pass

{rest}
"""
