"""``attnswap train``: run a recipe in one process. ``recipes/train.py`` runs the same under ``accelerate launch``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from attnswap.cli.terminal import Terminal


def train_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe in YAML, such as recipes/ssmax.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Override values of the recipe, such as training.max_steps=50."),
    ] = None,
) -> None:
    """Fine-tune a model with swapped attention from a recipe."""
    from attnswap.distributed import destroy_process_group
    from attnswap.training import load_config, train
    from attnswap.training.summary import table

    try:
        result = train(load_config(recipe, overrides or []))
    finally:
        destroy_process_group()
    if _first_process():
        console = Terminal()
        console.print(table(result.summary))
        console.print(f"saved to {result.output_dir}", soft_wrap=True)


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
