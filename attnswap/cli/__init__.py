"""The command line.

An error is one line that names the cause and a way out; the exit code tells the kind of error. The commands import
torch, transformers and most of attnswap when they run, so that ``--help`` and ``list`` are quick.
"""

import os
import sys
from types import ModuleType

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
from attnswap.imports import after_import
from attnswap.visible import visible

app = typer.Typer(
    help="Replace softmax in the attention of a pretrained model: patch, fine-tune, evaluate, compare.",
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

    Exit codes: 0 success, 1 unexpected error, 2 wrong usage or input, 3 unsupported model, 4 non-finite values,
    130 interrupted.
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
        if hasattr(error, "format_message"):  # a wrong option or argument; its class differs between typer's versions
            _fail(error.format_message() or "see attnswap --help", 2)
        if os.environ.get("ATTNSWAP_DEBUG"):
            raise
        _fail(f"{type(error).__name__}: {error} (set ATTNSWAP_DEBUG=1 for the traceback)", 1)


def quieten() -> None:
    """Silences transformers' warnings, and its progress bars where stderr is not a terminal."""
    after_import("transformers.utils.logging", _silence)


def _silence(logging: ModuleType) -> None:
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _fail(message: str, code: int) -> None:
    rank = os.environ.get("RANK", "0")
    who = "" if rank == "0" else f" (process {rank})"
    print(visible(f"error{who}: {' '.join(message.split())}"), file=sys.stderr)
    raise SystemExit(code)
