"""``attnswap inspect``: attention statistics of the heads of one model, or of two models side by side."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from attnswap.cli.terminal import Terminal
from attnswap.markdown import markdown_table
from attnswap.visible import visible

if TYPE_CHECKING:
    from attnswap.evaluation.structure import Structure


def inspect_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help='Checkpoint directory, GGUF file, hub name or "embedded".')
    ],
    against: Annotated[str | None, typer.Option(help="Second model, shown next to the first.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text file to read. Default: the built-in text.")] = None,
    window: Annotated[str, typer.Option(help="Tokens per window, more than 64; k is 1024.")] = "1k",
    windows: Annotated[int, typer.Option(min=1, help="Number of windows, spread over the text.")] = 4,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. Default: dtype of the checkpoint.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Device. Default: the accelerator, or cpu if there is none.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for the report: JSON, Markdown table and plot.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the report, as JSON.")] = False,
) -> None:
    """Measure attention statistics of a model: sinks, dead heads, sparsity, entropy, massive activations.

    Works for any causal language model, patched or not. With --against, a second model is measured on the same text,
    such as the model before it was patched or trained.
    """
    from attnswap.cli.options import check_folder, parse_device, parse_dtype, parse_size
    from attnswap.evaluation.corpus import read_text, sample_windows
    from attnswap.evaluation.figure import short_names
    from attnswap.loading import load_config_of, load_tokenizer

    check_folder(out)
    references = [model] if against is None else [model, against]
    placed = {"dtype": parse_dtype(dtype), "device": parse_device(device)}
    read: dict[str, Any] = {"window": parse_size(window), "windows": windows}
    read["text"] = None if text is None else read_text(text)
    for reference in references:  # errors of either model come before the first is loaded and measured
        load_config_of(reference)
        sample_windows(load_tokenizer(reference), read["text"], read["window"], 1)
    found = [_measure(reference, placed, read) for reference in references]
    reports = [
        {**structure.to_dict(), "model": reference, "text": text and text.name, "window": read["window"]}
        for reference, structure in zip(references, found, strict=True)
    ]
    names = short_names(references)
    if out:
        write(reports, found, out, names)
    if as_json:
        whole = reports[0] if against is None else {**reports[0], "against": reports[1]}
        sys.stdout.write(json.dumps(whole, indent=2, allow_nan=False) + "\n")
    else:
        Terminal().print(table(found, names))


def _measure(reference: str, placed: dict[str, Any], read: dict[str, Any]) -> "Structure":
    from attnswap.evaluation.estimate import token_progress
    from attnswap.evaluation.structure import measure_structure
    from attnswap.loading import load_model, load_tokenizer

    with token_progress(read["window"] * read["windows"], sys.stderr.isatty()) as advance:
        return measure_structure(load_model(reference, **placed), load_tokenizer(reference), **read, advance=advance)


def table(structures: "Sequence[Structure]", names: Sequence[str]) -> Table:
    """Returns the summaries as a table for the terminal, with one column per model."""
    shown = Table(title="attention structure", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    shown.add_column("")
    for name in names:
        shown.add_column(Text(visible(name)), justify="right", overflow="fold")
    for row in _rows(structures):
        shown.add_row(*row)
    return shown


def markdown(structures: "Sequence[Structure]", names: Sequence[str]) -> str:
    """Returns the same table as Markdown, followed by the plot."""
    from attnswap.evaluation.structure import SINK

    body = markdown_table(["attention", *names], _rows(structures), words=1)
    return (
        f"{body}\n\nMeans over heads; activations are the largest of all layers. A sink gives the first token more "
        f"than {SINK} of its weight, a dead head attends to nothing for 95% of its queries.\n\n"
        "![attention by layer and head](structure.png)\n"
    )


def write(
    reports: Sequence[dict[str, Any]], structures: "Sequence[Structure]", folder: Path, names: Sequence[str]
) -> None:
    """Writes ``structure.json`` (and ``against.json``), ``structure.md`` and ``structure.png``, each atomically."""
    from attnswap.evaluation.result import write_atomically
    from attnswap.evaluation.structure_figure import plot_structure

    if len(reports) == 1 and (folder / "structure.json").is_file():
        (folder / "against.json").unlink(missing_ok=True)  # of an earlier comparison
    for report, stem in zip(reports, ("structure", "against"), strict=False):
        content = json.dumps(report, indent=1, allow_nan=False) + "\n"
        write_atomically(folder / f"{stem}.json", content.encode())
    write_atomically(folder / "structure.md", markdown(structures, names).encode())
    plot_structure(structures, folder / "structure.png", labels=names)


def _rows(structures: "Sequence[Structure]") -> list[list[str]]:
    summaries = [structure.summary() for structure in structures]
    return [[key.replace("_", " "), *(f"{summary[key]:.4g}" for summary in summaries)] for key in summaries[0]]
