"""``attnswap list``: the swaps; ``attnswap describe``: one swap, checkpoint or recipe."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnswap.cli.terminal import Terminal
from attnswap.errors import ConfigError, nearest
from attnswap.markdown import markdown_table

if TYPE_CHECKING:
    from attnswap.swaps import Swap

COLUMNS = ("swap", "weights", "row sum", "identity start", "learned", "kind", "paper")


def swap_row(swap: "Swap") -> tuple[str, ...]:
    """Returns one line of the table of swaps (:data:`COLUMNS`)."""
    traits = swap.traits
    return (
        swap.name,
        swap.summary,
        traits.row_sum,
        "exact" if traits.exact_identity else "no (use a ramp)",
        ", ".join(traits.learned) or "nothing",
        traits.route,
        traits.paper,
    )


def table_of_swaps() -> str:
    """Returns the table of swaps as the README shows it."""
    from attnswap.swaps import list_swaps

    return markdown_table(COLUMNS, [swap_row(swap) for swap in list_swaps()], words=len(COLUMNS))


def list_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print as a Markdown table.")] = False,
) -> None:
    """List the swaps: weights, row sum, start, paper."""
    from rich.table import Column, Table

    from attnswap.swaps import list_swaps

    if as_json:
        values = [{"summary": s.summary, "config": s.to_dict(), **dataclasses.asdict(s.traits)} for s in list_swaps()]
        print(json.dumps([{"name": v["config"]["name"], **v} for v in values], indent=2))
    elif markdown:
        print(table_of_swaps())
    else:
        table = Table(Column("swap", no_wrap=True), "weights", "row sum", "identity start", "arXiv", show_lines=True)
        for swap in list_swaps():
            name, weights, row_sum, start, *_, paper = swap_row(swap)
            table.add_row(name, weights, row_sum, start, paper.rpartition("arXiv ")[2].rstrip(")"))
        Terminal().print(table)


def describe_command(
    target: Annotated[str, typer.Argument(help="Name of a swap, checkpoint (directory or hub name), or recipe.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    resolved: Annotated[bool, typer.Option("--resolved", help="Fill in the defaults of a recipe.")] = False,
) -> None:
    """Describe a swap (options, features), a checkpoint (the swaps of its layers and heads) or a recipe."""
    from rich.table import Table

    from attnswap.swaps import names

    if target in names():
        values = _describe_swap(target)
    elif Path(target).suffix in (".yaml", ".yml"):
        values = _describe_recipe(target, resolved)
    elif Path(target).exists() or "/" in target:
        values = _describe_checkpoint(target)
    else:
        known = names()
        raise ConfigError(
            f'"{target}" is not a swap, checkpoint or recipe.{nearest(target, known)} Swaps: {", ".join(known)}'
        )
    if as_json:
        print(json.dumps(values, indent=2))
        return
    table = Table(show_header=False)
    for key, value in values.items():
        table.add_row(key, value if isinstance(value, str) else json.dumps(value, indent=1))
    Terminal().print(table)


def _describe_swap(name: str) -> dict[str, Any]:
    from attnswap.swaps import resolve

    swap = resolve(name)
    text = (type(swap).__doc__ or "").strip()
    features = {k: f"per {f.per}, one for each {f.heads} head: {f.what}" for k, f in swap.features().items()}
    return {
        "swap": swap.name,
        "what": swap.summary,
        "options": {k: v for k, v in swap.to_dict().items() if k != "name"},
        "features": features,
        "traits": dataclasses.asdict(swap.traits),
        "details": text,
    }


def _describe_checkpoint(target: str) -> dict[str, Any]:
    from transformers import AutoConfig

    from attnswap.loading import resolve
    from attnswap.surgery.spec import KEY, PatchSpec

    path, extra = resolve(target)
    if extra:
        return {"checkpoint": target, "swaps": "none (a GGUF file)"}
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers raises many types for a damaged config
        raise ConfigError(
            f'"{target}" is not a swap, and not a checkpoint that transformers can read: {error}'
        ) from error
    owner = config if hasattr(config, KEY) else config.get_text_config()
    values = getattr(owner, KEY, None)
    if not isinstance(values, dict):
        return {"checkpoint": target, "swaps": "none"}
    PatchSpec.from_dict(values)
    return {"checkpoint": target, **values}


def _describe_recipe(target: str, resolved: bool) -> dict[str, Any]:
    from attnswap.training.config import load_config, to_mapping
    from attnswap.training.strict import read_yaml

    config = load_config(target)
    return to_mapping(config) if resolved else dict(read_yaml(target))
