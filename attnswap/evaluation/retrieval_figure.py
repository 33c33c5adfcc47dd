"""The picture of retrieval grids: a map of depth against length for each task and model."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from attnswap.evaluation.figure import plain
from attnswap.evaluation.result import write_atomically
from attnswap.evaluation.retrieval import Cell


def plot_retrieval(grids: Sequence[Sequence[Cell]], path: str | Path, *, labels: Sequence[str]) -> Path:
    """Draws retrieval accuracy and ranks by task, length and depth, into a PNG.

    Args:
        grids: The cells of each model, measured with the same options.
        path: The PNG file, written atomically.
        labels: Names of the models.

    Returns:
        The path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(cell.task for cell in grids[0]))
    figure = Figure(figsize=(3.2 * len(tasks) + 0.8, 2.9 * len(grids) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(grids), len(tasks), squeeze=False)
    image = None
    for row, (cells, label) in enumerate(zip(grids, labels, strict=True)):
        for column, task in enumerate(tasks):
            own = [cell for cell in cells if cell.task == task]
            lengths, depths = sorted({c.length for c in own}), sorted({c.depth for c in own})
            exact = np.full((len(depths), len(lengths)), np.nan)
            axes = panels[row, column]
            for cell in own:
                y, x = depths.index(cell.depth), lengths.index(cell.length)
                exact[y, x] = cell.accuracy
                rank = f"{cell.rank:.0f}" if cell.rank < 1000 else f"{cell.rank / 1000:.0f}k"
                axes.text(x, y, rank, ha="center", va="center", fontsize=7, color=_ink(cell.accuracy))
            image = axes.imshow(exact, vmin=0, vmax=1, cmap="cividis", aspect="auto")
            axes.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=7)
            axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=7)
            axes.set_title(f"{task}: {plain(label)}", fontsize=9)
    panels[-1, 0].set(xlabel="length (tokens)", ylabel="depth")
    if image is not None:
        figure.colorbar(image, ax=panels, label="exact match (numbers: mean rank of the answer's tokens)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(Path(path), buffer.getvalue())
    return Path(path)


def _ink(share: float) -> str:
    """Returns a text colour that is readable on the colour of a cell."""
    return "black" if share > 0.6 else "white"
