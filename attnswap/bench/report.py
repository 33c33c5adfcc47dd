"""The tables of a benchmark, and its files."""

from pathlib import Path

from rich.console import Group
from rich.table import Table

from attnswap.bench.figure import plot
from attnswap.bench.result import BenchResult, Cell

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
"""Short names of dtypes in tables."""


def tables(bench: BenchResult) -> Group:
    """Returns a table for each shape, dtype and mode, and what was skipped and why, for the terminal."""
    head = (
        f"time over that of torch's flash attention, median of {bench.plan['rounds']} rounds [95% interval]; "
        f"extra peak memory of a call over flash attention's\n{machine_line(bench)}\n"
    )
    return Group(head, *(_table(group) for group in _panels(bench.cells)), *_notes(bench.cells))


def machine_line(bench: BenchResult) -> str:
    """Returns what the figures were measured on."""
    env = bench.env
    if bench.plan["device"] == "cpu":
        return (
            f"{env['cpu']}, {env['threads']} threads, subnormal numbers {env['denormals']}, torch {env['torch']}, "
            f"load {env['load']:.1f} before the start"
        )
    gpu = env["gpu"]
    return (
        f"{gpu['name']}, driver {gpu['driver']}, torch {env['torch']}, triton {gpu['triton']}; bf16 matrix products "
        f"{gpu['matmul_tflops']:.0f} TFLOP/s, copies {gpu['copy_gb_per_second']:.0f} GB/s"
    )


def _table(cells: list[Cell]) -> Table:
    setting = cells[0].setting
    title = f"{setting.shape.name}, {SHORT[setting.dtype]}, {setting.mode}"
    # Without a box all columns fit a terminal of 80 characters.
    shown = Table(title=title, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    shown.add_column("case")
    on_gpu = setting.device != "cpu"
    rates = ("ms", "TFLOP/s", "share") if on_gpu else ()
    for name in ("length", "ratio [95%]", *rates, "goal" if on_gpu else "bound", "MiB/MiB"):
        shown.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        rate = _rate(cell) if on_gpu else ()
        shown.add_row(cell.case.label, str(cell.setting.length), _ratio(cell), *rate, _verdict(cell), _memory(cell))
    return shown


def _rate(cell: Cell) -> tuple[str, str, str]:
    """Returns time, rate, and the rate relative to that of matrix products."""
    if cell.milliseconds is None or cell.tflops is None or cell.share is None:
        return "-", "-", "-"
    return f"{cell.milliseconds:.3g}", f"{cell.tflops:.0f}", f"{cell.share:.0%}"


def write_report(bench: BenchResult, out: Path) -> list[Path]:
    """Writes ``bench.json`` and a plot for each shape and dtype, ``bench-<shape>-<dtype>.png``, each atomically.

    Returns:
        The paths.
    """
    paths = [bench.save(out / "bench.json")]
    for shape, dtype in dict.fromkeys((c.setting.shape.name, c.setting.dtype) for c in bench.cells if c.ratio):
        cells = [c for c in bench.cells if (c.setting.shape.name, c.setting.dtype) == (shape, dtype)]
        title = f"{shape}, {SHORT[dtype]}, {machine_line(bench)}"
        paths.append(plot(cells, out / f"bench-{shape}-{SHORT[dtype]}.png", title))
    return paths


def _panels(cells: list[Cell]) -> list[list[Cell]]:
    """Returns the cells of each shape, dtype and mode, ordered by case and length."""
    panels: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        setting = cell.setting
        panels.setdefault((setting.shape.name, setting.dtype, setting.mode), []).append(cell)
    order = {label: i for i, label in enumerate(dict.fromkeys(cell.case.label for cell in cells))}
    return [sorted(panel, key=lambda c: (order[c.case.label], c.setting.length)) for panel in panels.values()]


def _notes(cells: list[Cell]) -> list[str]:
    """Returns why cells were skipped, each reason once for a case, length and mode."""
    notes: dict[str, None] = {}
    for cell in cells:
        for what, why in (("skipped", cell.skipped), ("memory not measured", cell.memory_skipped)):
            if why:
                notes[f"{cell.case.label} at {cell.setting.length}, {cell.setting.mode}: {what}: {why}"] = None
    return list(notes)


def _ratio(cell: Cell) -> str:
    if cell.ratio is None:
        return "skipped"
    return f"{cell.ratio.median:.2f} [{cell.ratio.lo:.2f}, {cell.ratio.hi:.2f}]"


def _verdict(cell: Cell) -> str:
    return "-" if cell.bound is None or cell.ratio is None else f"{cell.verdict} <{cell.bound:.2f}"


def _memory(cell: Cell) -> str:
    if cell.memory is None:
        return "-"
    ours, sdpa = cell.memory.bytes / 2**20, cell.memory.sdpa_bytes / 2**20
    return f"{ours:.1f}/{sdpa:.1f}" + (f" = {cell.memory.ratio:.1f}" if cell.memory.ratio else "")
