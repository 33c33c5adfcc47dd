"""The picture of the attention structure of one or several models."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnswap.errors import ConfigError
from attnswap.evaluation.figure import COLOURS, plain
from attnswap.evaluation.result import write_atomically
from attnswap.evaluation.structure import Structure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

MAPS = (
    ("first", "weight on the first token", 1.0, "viridis"),
    ("row_sum", "row sum", 1.0, "viridis"),
    ("entropy", "entropy (nats)", 0.1, "cividis"),
    ("zeros", "share of exact zeros", 1.0, "cividis"),
)
"""Figure, title, least upper end of the colour scale, and a colour map that colour-blind readers can read."""
LINES = (("ratio", "largest / median activation"), ("kurtosis", "kurtosis of the activations"))
TICKS = 8


def plot_structure(structures: Sequence[Structure], path: str | Path, *, labels: Sequence[str]) -> Path:
    """Draws heat maps over layers and heads, one row per model, and the activations by layer below them, into a PNG.

    All maps of a column have the same colour scale, so that models can be compared. Shares always go from 0 to 1.

    Args:
        structures: The structures to draw, in this order; the models may differ in layers and heads.
        path: The PNG file, written atomically.
        labels: Names of the models.

    Returns:
        The path.

    Raises:
        ConfigError: There is no structure to draw, or not one label per structure.
    """
    # Not at the top: importing attnswap should not cost the import of matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not structures or len(structures) != len(labels):
        raise ConfigError(
            f"give as many labels as structures, and at least one: not {len(labels)} for {len(structures)}"
        )
    names = [plain(label) for label in labels]
    deepest = max(len(structure.layers) for structure in structures)
    heights = [len(structures) * float(np.clip(1.2 + 0.07 * deepest, 2.2, 6.0)), 3.2]
    figure = Figure(figsize=(15, 0.4 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    upper, lower = parts
    _maps(upper, structures, names)
    for axes, (figure_name, title) in zip(lower.subplots(1, len(LINES)), LINES, strict=True):
        for index, (structure, name) in enumerate(zip(structures, names, strict=True)):
            values = getattr(structure, figure_name)
            axes.plot(structure.layers, values, marker=".", color=COLOURS[index % len(COLOURS)], label=name)
        axes.set(title=title, xlabel="layer", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"attention structure, {structures[0].tokens} tokens per model")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(Path(path), buffer.getvalue())
    return Path(path)


def _maps(figure: "SubFigure", structures: Sequence[Structure], names: Sequence[str]) -> None:
    grid = figure.subplots(len(structures), len(MAPS), squeeze=False)
    for column, (figure_name, title, least, colours) in enumerate(MAPS):
        values = [getattr(structure, figure_name) for structure in structures]
        bottom, top = min(0.0, *(v.min() for v in values)), max(least, *(v.max() for v in values))
        for row, value in enumerate(values):
            axes = grid[row, column]
            image = axes.imshow(value, vmin=bottom, vmax=top, cmap=colours, aspect="auto", interpolation="nearest")
            _ticks(axes, structures[row], last=row == len(structures) - 1)
            if column == 0:
                axes.set_ylabel(textwrap.fill(names[row], 32) + "\nlayer")
        grid[0, column].set_title(title)
        figure.colorbar(image, ax=grid[:, column])


def _ticks(axes: "Axes", structure: Structure, last: bool) -> None:
    """Labels some heads and layers. A hybrid model has attention only in some layers, which are labelled by index."""
    layers, heads = structure.first.shape
    axes.set_xticks(range(0, heads, -(-heads // TICKS)))
    chosen = range(0, layers, -(-layers // TICKS))
    axes.set_yticks(chosen, [str(structure.layers[i]) for i in chosen])
    if last:
        axes.set_xlabel("head")
