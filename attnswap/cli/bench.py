"""``attnswap bench``: time and memory of the swaps compared with torch's own attention."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnswap.cli.options import check_folder, parse_dtype, parse_size
from attnswap.cli.terminal import Terminal
from attnswap.errors import ConfigError, nearest
from attnswap.visible import visible

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnswap.bench import Shape


def bench_command(
    swaps: Annotated[str | None, typer.Option(help="Swaps to time, such as ssmax,softpick. Default: all.")] = None,
    lengths: Annotated[str, typer.Option(help="Sequence lengths in tokens; k is 1024.")] = "1k,2k,4k,8k,16k",
    shapes: Annotated[
        str, typer.Option(help="Attention layers: smollm2 (9 heads, 3 KV heads, head_dim 64), h8d128 (8, 8, 128).")
    ] = "smollm2,h8d128",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or both.")] = "fp32,bf16",
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
    seed: Annotated[int, typer.Option(help="Random seed of the inputs and of the intervals.")] = 0,
    model: Annotated[
        str | None,
        typer.Option(help='Time a whole model instead, patched and unpatched: directory, hub name or "embedded".'),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="With --model: step (a training step), generate, or both.")
    ] = "step,generate",
    out: Annotated[Path | None, typer.Option(help="Directory for the report: JSON and plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the report, as JSON.")] = False,
) -> None:
    """Measure time and memory of the swaps on the CPU, compared with torch's attention (SDPA).

    Each round times SDPA and the swap in direct succession. The report gives the median ratio with a 95% interval over
    the rounds, and says whether it keeps the project's bound.
    """
    from attnswap.bench import (
        ModelPlan,
        Plan,
        measure_model,
        model_table,
        run_bench,
        tables,
        write_model_report,
        write_report,
    )
    from attnswap.swaps import names as known_swaps

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
