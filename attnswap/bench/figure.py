"""The plot of a benchmark."""

import io
from collections.abc import Sequence
from pathlib import Path

from attnswap.bench.cases import MODES
from attnswap.bench.result import Cell
from attnswap.evaluation.figure import COLOURS
from attnswap.evaluation.result import write_atomically

MARKERS = "os^Dv"


def plot(cells: Sequence[Cell], path: Path, title: str) -> Path:
    """Draws the ratio to SDPA by length, with intervals: forward on the left, forward and backward on the right.

    Args:
        cells: Cells of one shape and dtype. Skipped ones leave gaps.
        path: The PNG file, written atomically.
        title: Title of the picture.

    Returns:
        The path.
    """
    # Not at the top: importing attnswap should not cost the import of matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    labels = list(dict.fromkeys(cell.case.label for cell in cells))
    lengths = sorted({cell.setting.length for cell in cells})
    for axes, mode in zip(figure.subplots(1, 2), MODES, strict=True):
        for i, label in enumerate(labels):
            found = [(c.setting.length, c.ratio) for c in cells if (c.case.label, c.setting.mode) == (label, mode)]
            drawn = [(length, ratio) for length, ratio in found if ratio]
            middle = [ratio.median for _, ratio in drawn]
            axes.errorbar(
                [length for length, _ in drawn],
                middle,
                # An end of the interval may equal the median, and be on its other side by rounding.
                yerr=[
                    [max(0.0, r.median - r.lo) for _, r in drawn],
                    [max(0.0, r.hi - r.median) for _, r in drawn],
                ],
                label=label,
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i // len(COLOURS) % len(MARKERS)],
                capsize=3,
            )
        axes.axhline(1.0, color="black", ls="--", lw=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [str(length) for length in lengths], minor=False)
        axes.set(xlabel="length (tokens)", ylabel="time over SDPA's (below 1: faster)", title=f"{mode}, 95% interval")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
    return path
