"""``attnswap bench``: time and memory of the swaps beside torch's own attention."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from attnswap.bench import (
    SHAPES,
    ModelPlan,
    Plan,
    Shape,
    measure_model,
    model_table,
    run_bench,
    tables,
    write_model_report,
    write_report,
)
from attnswap.cli.options import check_folder, parse_dtype, parse_size
from attnswap.cli.terminal import Terminal
from attnswap.errors import ConfigError, nearest
from attnswap.swaps import names as known_swaps
from attnswap.visible import visible


def bench_command(
    swaps: Annotated[str | None, typer.Option(help="Names such as ssmax,softpick. Default: every known swap.")] = None,
    lengths: Annotated[str, typer.Option(help="Lengths in tokens; k is 1024.")] = "1k,2k,4k,8k,16k",
    shapes: Annotated[str, typer.Option(help=f"Layers: {', '.join(SHAPES)}.")] = ",".join(SHAPES),
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or both.")] = "fp32,bf16",
    backend: Annotated[str, typer.Option(help="auto, or one backend for all swaps.")] = "auto",
    rounds: Annotated[int, typer.Option(help="Rounds of a cell, at least 9.")] = 9,
    threads: Annotated[int | None, typer.Option(help="Threads. Default: torch's own choice.")] = None,
    flush_denormals: Annotated[
        bool, typer.Option("--flush-denormals", help="Flush subnormal numbers to 0, for SDPA and swaps alike.")
    ] = False,
    peers: Annotated[bool, typer.Option(help="Also other implementations, where installed.")] = True,
    peer_seconds: Annotated[float, typer.Option(help="Leave out their cells that would take longer.")] = 120.0,
    memory: Annotated[bool, typer.Option(help="Extra peak memory, each in a process of its own.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of tensors and intervals.")] = 0,
    model: Annotated[
        str | None, typer.Option(help='Time a whole model instead, patched against unpatched, such as "embedded".')
    ] = None,
    tasks: Annotated[str, typer.Option(help="With --model: step, generate.")] = "step,generate",
    out: Annotated[Path | None, typer.Option(help="Directory for JSON and plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
) -> None:
    """Measure time and memory of the swaps beside torch's flash attention, on the CPU.

    Each round times SDPA and the swap right after one another; the median ratio comes with a 95% interval over rounds
    and is held against the bounds the project promises.
    """
    check_folder(out)
    names = None if swaps is None else [name.strip() for name in swaps.split(",")]
    if model is not None:
        whole = ModelPlan(
            reference=model,
            swaps=known_swaps() if names is None else names,
            dtype=str(parse_dtype(dtype.partition(",")[0])).removeprefix("torch."),
            tasks=[name.strip() for name in tasks.split(",")],
            rounds=rounds,
            seed=seed,
        )
        report = measure_model(whole, lambda line: print(visible(line), file=sys.stderr, flush=True))
        if out:
            write_model_report(report, out)
        _show(report, model_table(report), as_json)
        return
    plan = Plan(
        swaps=names,
        shapes=[_shape(name.strip()) for name in shapes.split(",")],
        lengths=[parse_size(part) for part in lengths.split(",")],
        dtypes=[str(parse_dtype(name.strip())).removeprefix("torch.") for name in dtype.split(",")],
        backend=backend,
        rounds=rounds,
        threads=threads,
        flush_denormals=flush_denormals,
        peers=peers,
        memory=memory,
        peer_seconds=peer_seconds,
        seed=seed,
    )
    bench = run_bench(plan, lambda line: print(visible(line), file=sys.stderr, flush=True), sys.stderr.isatty())
    if out:
        write_report(bench, out)
    _show(bench.to_dict(), tables(bench), as_json)


def _show(report: dict[str, Any], table: RenderableType, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2, allow_nan=False) + "\n")
    else:
        Terminal().print(table)


def _shape(name: str) -> Shape:
    if name not in SHAPES:
        raise ConfigError(f'unknown shape "{name}".{nearest(name, list(SHAPES))} There are {", ".join(SHAPES)}')
    return SHAPES[name]
