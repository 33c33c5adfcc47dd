"""``attnswap bench``: time and memory of the swaps compared with torch's own attention."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnswap.cli.options import check_folder, parse_device, parse_dtype, parse_size
from attnswap.cli.terminal import Terminal
from attnswap.errors import ConfigError, nearest, require
from attnswap.visible import visible

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnswap.bench import Shape

SHAPES_HELP = (
    "Attention layers as heads, KV heads, head_dim: smollm2 (9, 3, 64), h8d128 (8, 8, 128), h32d64 (32, 32, 64), "
    "h16d128 (16, 16, 128), llama8b (32, 8, 128). Default: the first two, on a GPU the next two."
)


def bench_command(
    swaps: Annotated[str | None, typer.Option(help="Swaps to time, such as ssmax,softpick. Default: all.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of a sequence; k is 1024. Default: 1k to 16k, on a GPU 2k to 64k.")
    ] = None,
    shapes: Annotated[str | None, typer.Option(help=SHAPES_HELP)] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens of a call; short sequences get a batch. Default: 1, on a GPU 32k.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or both. Default: both, on a GPU bf16.")] = None,
    backend: Annotated[str, typer.Option(help="Backend for all swaps; auto chooses as a model would.")] = "auto",
    rounds: Annotated[int, typer.Option(help="Rounds of each measurement, at least 9.")] = 9,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's own choice.")] = None,
    flush_denormals: Annotated[
        bool, typer.Option("--flush-denormals", help="Flush subnormal numbers to 0, for SDPA and the swaps alike.")
    ] = False,
    peers: Annotated[bool, typer.Option(help="Time other implementations too, where they are installed.")] = True,
    peer_seconds: Annotated[
        float, typer.Option(help="Skip a measurement of other implementations that would take more seconds.")
    ] = 120.0,
    memory: Annotated[bool, typer.Option(help="Measure extra peak memory, each time in a new process.")] = True,
    seconds: Annotated[
        float | None, typer.Option(help="Begin no measurement after this time; the same command continues.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the inputs and of the intervals.")] = 0,
    model: Annotated[
        str | None,
        typer.Option(help='Time a whole model instead, patched and unpatched: directory, hub name or "embedded".'),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="With --model: step (a training step), generate, or both.")
    ] = "step,generate",
    out: Annotated[
        Path | None, typer.Option(help="Directory for the report: JSON and plots. A stopped benchmark continues there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the report, as JSON.")] = False,
) -> None:
    """Measure time and memory of the swaps, compared with torch's flash attention (SDPA).

    Each round times SDPA and the swap in direct succession. The report gives the median ratio with a 95% interval over
    the rounds, and says whether it keeps the project's bound.
    """
    from attnswap import bench

    check_folder(out)
    device = _device(device, model)
    usual, names = bench.defaults(device), _parts(swaps)
    dtypes = [str(parse_dtype(name)).removeprefix("torch.") for name in _parts(dtype) or usual.dtypes]
    if model is not None:
        whole = bench.ModelPlan(model, names, dtypes[0], tasks=_parts(tasks) or [], rounds=rounds, seed=seed)
        report = bench.measure_model(whole, _announce)
        if out:
            bench.write_model_report(report, out)
        _show(report, bench.model_table(report), as_json)
        return
    plan = bench.Plan(
        swaps=names,
        shapes=[_shape(name) for name in _parts(shapes) or usual.shapes],
        lengths=[parse_size(name) for name in _parts(lengths) or []] or usual.lengths,
        dtypes=dtypes,
        backend=backend,
        rounds=rounds,
        threads=threads,
        flush_denormals=flush_denormals,
        peers=peers,
        memory=memory,
        peer_seconds=peer_seconds,
        seed=seed,
        device=device,
        tokens=parse_size(tokens) if tokens else usual.tokens,
        seconds=seconds,
    )
    found = bench.run_bench(plan, _announce, sys.stderr.isatty(), out)
    if out:
        bench.write_report(found, out)
    _show(found.to_dict(), bench.tables(found), as_json)


def _device(name: str | None, model: str | None) -> str:
    """Returns the device to measure on; models are timed on the CPU only."""
    import torch

    require(model is None or name in (None, "cpu"), "--model is timed on the CPU only: leave out --device")
    return parse_device(name or ("cuda" if torch.cuda.is_available() and model is None else "cpu"))


def _parts(text: str | None) -> list[str] | None:
    """Returns the parts between commas; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",")]


def _announce(line: str) -> None:
    print(visible(line), file=sys.stderr, flush=True)


def _show(report: dict[str, Any], table: "RenderableType", as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2, allow_nan=False) + "\n")
    else:
        Terminal().print(table)


def _shape(name: str) -> "Shape":
    from attnswap.bench import SHAPES

    if name not in SHAPES:
        raise ConfigError(f'unknown shape "{name}".{nearest(name, list(SHAPES))} Known: {", ".join(SHAPES)}')
    return SHAPES[name]
