"""The command line. Errors are one line that names the cause and the way out; the exit code says which kind."""

import os
import sys

import typer

from attnswap.cli.bench import bench_command
from attnswap.cli.coverage import coverage_command
from attnswap.cli.doctor import doctor_command
from attnswap.cli.eval import eval_command
from attnswap.cli.heal import heal_command
from attnswap.cli.inspect import inspect_command
from attnswap.cli.patch import patch_command
from attnswap.cli.show import describe_command, list_command
from attnswap.cli.train import train_command
from attnswap.errors import AttnSwapError, first_line
from attnswap.visible import visible

app = typer.Typer(
    help="Swap the attention normalizer of a pretrained model: patch, fine-tune, evaluate, undo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("list")(list_command)
app.command("describe")(describe_command)
app.command("patch")(patch_command)
app.command("train")(train_command)
app.command("heal")(heal_command)
app.command("eval")(eval_command)
app.command("inspect")(inspect_command)
app.command("bench")(bench_command)
app.command("coverage")(coverage_command)
app.command("doctor")(doctor_command)


def main() -> None:
    """Runs the command line.

    Exit codes: 0 fine, 1 unexpected, 2 usage or input, 3 unsupported model, 4 numerics, 130 interrupted.
    """
    quieten()
    try:
        raise SystemExit(app(standalone_mode=False) or 0)
    except typer.Abort:
        _fail("interrupted", 130)
    except AttnSwapError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        _fail(first_line(error), 2)
    except Exception as error:
        if hasattr(error, "format_message"):  # a wrong option or argument; typer's own class moved between versions
            _fail(error.format_message() or "see attnswap --help", 2)
        if os.environ.get("ATTNSWAP_DEBUG"):
            raise
        _fail(f"{type(error).__name__}: {error} (set ATTNSWAP_DEBUG=1 for the traceback)", 1)


def quieten() -> None:
    """Keeps transformers' bars off where nobody watches, and its warnings out of results."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _fail(message: str, code: int) -> None:
    rank = os.environ.get("RANK", "0")
    who = "" if rank == "0" else f" (process {rank})"
    print(visible(f"error{who}: {' '.join(message.split())}"), file=sys.stderr)
    raise SystemExit(code)
