"""``attnswap eval --suite long``: all measurements of a model, as JSON, Markdown and one HTML page."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from attnswap.cli.terminal import Terminal
from attnswap.errors import ConfigError
from attnswap.evaluation.corpus import load_corpus
from attnswap.evaluation.fidelity import scorers_of_both
from attnswap.evaluation.figure import plot, short_names
from attnswap.evaluation.html import write_html
from attnswap.evaluation.result import write_atomically
from attnswap.evaluation.retrieval_figure import plot_retrieval
from attnswap.evaluation.sections import suite_report
from attnswap.evaluation.structure_figure import plot_structure
from attnswap.evaluation.suite import Profile, SuiteOptions, profile
from attnswap.evaluation.windows import plan
from attnswap.loading import load_config_of, load_model, load_tokenizer
from attnswap.markdown import markdown_table
from attnswap.visible import visible


def run_suite(
    reference: str,
    original: str | None,
    *,
    options: SuiteOptions,
    dtype: Any,
    device: Any,
    text: str | list[str] | None,
    corpus_id: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measures a model and the original it is compared with, and writes and prints the report.

    Args:
        reference: The model.
        original: The original model; None: there is no comparison.
        options: Sizes of the measurements.
        dtype: Dtype of the weights of both models; None: dtype of the model's checkpoint.
        device: Device of both models.
        text: The text; None: the built-in text.
        corpus_id: Name of the text in the report.
        out: Directory of the report; None: the report is only printed.
        as_json: Print only the report, as JSON.

    Raises:
        ConfigError: The baseline is the JSON of an earlier evaluation instead of a model.
    """
    if original is not None and Path(original).suffix == ".json":
        raise ConfigError(
            "--suite measures the baseline too: --baseline takes a model here, not the JSON of an earlier evaluation"
        )
    for name in [reference] if original is None else [reference, original]:
        load_config_of(name)  # errors of either model come before the first is loaded and measured
    tokenizer = load_tokenizer(reference)
    plan(load_corpus(tokenizer, text), tokenizer, options.contexts, max_tokens=options.max_tokens)
    common: dict[str, Any] = {"options": options, "text": text, "corpus_id": corpus_id}
    model = load_model(reference, dtype=dtype, device=device)
    before = twin = None
    if original is not None:
        twin = load_model(original, dtype=model.dtype, device=device)
        scorers_of_both(model, twin)
        before = profile(twin, tokenizer, model_id=original, **common)
    baseline = None if before is None else before.evaluation
    found = profile(model, tokenizer, reference=twin, baseline=baseline, model_id=reference, **common)
    report = suite_report(found, before)
    if out is not None:
        write(report, found, before, out)
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2, allow_nan=False) + "\n")
        return
    console = Terminal()
    for note in report["notes"]:
        console.print(note)
    for section in report["sections"]:
        console.print(_table(section))
    if out is not None:
        console.print(f"report: {out / 'report.html'}", soft_wrap=True)


def write(report: dict[str, Any], found: Profile, before: Profile | None, out: Path) -> None:
    """Writes ``suite.json``, the losses, ``suite.md``, the plots and ``report.html``."""
    profiles = [found] if before is None else [found, before]
    names = short_names([str(profile.evaluation.model["id"]) for profile in profiles])
    baseline = None if before is None else before.evaluation
    content = json.dumps(report, indent=1, allow_nan=False) + "\n"  # an error comes before anything is written
    found.evaluation.save(out / "evaluation.json")
    pictures = {
        "perplexity.png": plot([found.evaluation], out / "perplexity.png", baseline=baseline, labels=names[:1]),
        "retrieval.png": plot_retrieval([p.retrieval for p in profiles], out / "retrieval.png", labels=names),
        "structure.png": plot_structure([p.structure for p in profiles], out / "structure.png", labels=names),
    }
    write_atomically(out / "suite.json", content.encode())
    write_atomically(out / "suite.md", markdown(report).encode())
    write_html(report, list(pictures.items()), out / "report.html", title=str(report["title"]))


def markdown(report: dict[str, Any]) -> str:
    """Returns the report's tables as Markdown."""
    lines = [f"# {report['title']}", ""]
    for note in report["notes"]:
        lines += [note, ""]
    for section in report["sections"]:
        columns, rows = section["table"]["columns"], section["table"]["rows"]
        lines += [f"## {section['title']}", "", section["text"], ""]
        lines += [markdown_table(columns, [[show(cell) for cell in row] for row in rows]), ""]
    return visible("\n".join(lines))


def _table(section: dict[str, Any]) -> Table:
    view = Table(title=section["title"], box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in section["table"]["columns"]:
        view.add_column(column, justify="right", overflow="fold")
    for row in section["table"]["rows"]:
        view.add_row(*(show(cell) for cell in row))
    return view


def show(value: Any) -> str:
    """Returns the text of a table cell: floats with four significant digits, ``-`` for None."""
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
