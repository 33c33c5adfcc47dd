"""``attnswap coverage``: which model types of the installed transformers can be patched."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from attnswap.cli.options import check_folder
from attnswap.cli.terminal import Terminal
from attnswap.errors import ConfigError, nearest


def coverage_command(
    types: Annotated[str | None, typer.Option(help="Model types such as llama,bloom. Default: all.")] = None,
    swaps: Annotated[str, typer.Option(help="Swaps to check each model type with.")] = "forgetting-gate,softpick",
    out: Annotated[Path | None, typer.Option(help="Directory for the report: JSON and a Markdown table.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the report, as JSON.")] = False,
) -> None:
    """Check which model types of the installed transformers can be patched.

    Builds a tiny random model of each type, patches it, and checks that masks are kept, that every selected layer
    computes the swap, and that unpatching restores the model.
    """
    from tqdm import tqdm

    from attnswap.coverage import Row, coverage_table, model_types, run_coverage, write_coverage

    check_folder(out)
    known = model_types()
    wanted = known if types is None else [name.strip() for name in types.split(",")]
    for name in wanted:
        if name not in known:
            raise ConfigError(f'unknown model type "{name}".{nearest(name, known)}')
    names = [name.strip() for name in swaps.split(",")]
    bar = tqdm(total=len(wanted) * len(names), unit="check", disable=not sys.stderr.isatty(), file=sys.stderr)

    def announce(row: Row) -> None:
        bar.set_description_str(row.type)
        bar.update(1 if row.swap else len(names))

    with bar:
        report = run_coverage(wanted, names, announce)
    if out:
        write_coverage(report, out)
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        Terminal().print(coverage_table(report))
