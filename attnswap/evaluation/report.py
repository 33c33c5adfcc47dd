"""The report of an evaluation: a table, and files (JSON, losses, Markdown, plot)."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from attnswap.evaluation.bootstrap import compare
from attnswap.evaluation.figure import plot
from attnswap.evaluation.result import Evaluation, write_atomically
from attnswap.markdown import markdown_table
from attnswap.visible import visible


def table(evaluation: Evaluation, baseline: Evaluation | None = None) -> Table:
    """Returns a table for the terminal with one row per context length, and columns for a baseline if there is one."""
    notes = "\n".join(evaluation.notes)
    # Without a box all columns fit a terminal of 80 characters.
    shown = Table(
        title=Text(visible(_title(evaluation, baseline)), "table.title"),
        caption=Text(visible(notes), "table.caption") if notes else None,
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    header, rows = _cells(evaluation, baseline)
    for column in header:
        shown.add_column(column, justify="right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def markdown(evaluation: Evaluation, baseline: Evaluation | None = None) -> str:
    """Returns the same table as Markdown."""
    header, rows = _cells(evaluation, baseline)
    notes = "".join(f"\n{note}\n" for note in evaluation.notes)
    return visible(f"{_title(evaluation, baseline)}\n\n{markdown_table(header, rows)}\n{notes}")


def full_report(evaluation: Evaluation, baseline: Evaluation | None = None) -> dict[str, Any]:
    """Returns the JSON report, with the metrics of a baseline and the comparison if there is one."""
    return {**evaluation.to_dict(), **_baseline_entry(evaluation, baseline)}


def write_report(
    evaluation: Evaluation, out_dir: str | Path, baseline: Evaluation | None = None, name: str = "evaluation"
) -> dict[str, Path]:
    """Writes ``<name>.json``, ``.npz`` (losses of single tokens), ``.md`` and ``.png``, each atomically.

    Args:
        evaluation: The evaluation.
        out_dir: Directory; created if it does not exist.
        baseline: An evaluation to compare it with.
        name: Stem of the files, so that several evaluations can share a directory.

    Returns:
        The paths by kind: ``json``, ``npz``, ``md``, ``png``.

    Raises:
        ConfigError: The baseline is not comparable; nothing is written.
    """
    stem = Path(out_dir) / name
    paths = {kind: stem.with_name(f"{name}.{kind}") for kind in ("json", "npz", "md", "png")}
    entry = _baseline_entry(evaluation, baseline)
    evaluation.save(paths["json"], **entry)
    write_atomically(paths["md"], markdown(evaluation, baseline).encode())
    plot([evaluation], paths["png"], baseline=baseline)
    return paths


def _baseline_entry(evaluation: Evaluation, baseline: Evaluation | None) -> dict[str, Any]:
    if baseline is None:
        return {}
    compared = [asdict(entry) for entry in compare(evaluation, baseline)]
    inherited = baseline.to_dict()
    kept = {key: inherited[key] for key in ("model", "swap", "env", "metrics", "notes")}
    return {"baseline": {**kept, "comparison": compared}}


def _title(evaluation: Evaluation, baseline: Evaluation | None) -> str:
    protocol = evaluation.protocol
    against = f" against {baseline.label}" if baseline else ""
    return (
        f"{evaluation.label}{against} on {evaluation.corpus['id']}: {protocol.scored_tokens} tokens scored, "
        f"{evaluation.env['dtype']}, {protocol.name}"
    )


def _cells(evaluation: Evaluation, baseline: Evaluation | None) -> tuple[list[str], list[list[str]]]:
    header = ["context", "ppl", "bits/byte", "NLL ± se"]
    rows = [[str(m.length), f"{m.ppl:.4g}", f"{m.bpb:.4f}", f"{m.nll:.4f} ±{m.se:.4f}"] for m in evaluation.metrics]
    if baseline is None:
        return header, rows
    compared = {entry.length: entry for entry in compare(evaluation, baseline)}
    for metrics, row in zip(evaluation.metrics, rows, strict=True):
        entry = compared.get(metrics.length)
        if entry is None:
            row.extend(["", ""])
        else:
            interval = f"{entry.ratio:.4f} [{math.exp(entry.lo):.4f}, {math.exp(entry.hi):.4f}]"
            row.extend([f"{baseline.at(entry.length).ppl:.4g}", interval])
    return [*header, "base ppl", "ratio [95%]"], rows
