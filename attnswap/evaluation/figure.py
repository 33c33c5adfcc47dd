"""The plot of one or several evaluations."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnswap.errors import ConfigError
from attnswap.evaluation.bootstrap import compare
from attnswap.evaluation.result import Evaluation, write_atomically
from attnswap.visible import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Line = tuple[Evaluation, str, dict[str, Any]]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""The Okabe-Ito palette, which colour-blind readers can tell apart; black is for the baseline."""


def plot(
    evaluations: Sequence[Evaluation],
    path: str | Path,
    *,
    baseline: Evaluation | None = None,
    labels: Sequence[str] | None = None,
    baseline_label: str | None = None,
) -> Path:
    """Draws bits per byte against context, the log ratio to a baseline, and NLL by position, into a PNG.

    Args:
        evaluations: The evaluations to draw, in this order; all of the same text.
        path: The PNG file, written atomically.
        baseline: An evaluation to draw as a dashed line; without it the middle panel is left out.
        labels: Names of the evaluations; default: the names of their models.
        baseline_label: Name of the baseline; default: the name of its model.

    Returns:
        The path.

    Raises:
        ConfigError: There is no evaluation to draw, or the baseline scored other tokens.
    """
    # Not at the top: importing attnswap should not cost the import of matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not evaluations:
        raise ConfigError("nothing to plot: give at least one evaluation")
    names = [plain(name) for name in labels or (evaluation.label for evaluation in evaluations)]
    figure = Figure(figsize=(15 if baseline else 10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.atleast_1d(figure.subplots(1, 3 if baseline else 2)))
    lines = [(e, n, {"color": c}) for e, n, c in zip(evaluations, names, _cycle(len(evaluations)), strict=True)]
    if baseline:
        _ratio(axes.pop(1), lines, baseline)
        name = plain(baseline_label or f"{baseline.label} (baseline)")
        lines.append((baseline, name, {"color": "black", "ls": "--"}))
    _bits_per_byte(axes[0], lines)
    _positions(axes[1], lines)
    first = evaluations[0]
    figure.suptitle(
        f"{plain(first.corpus['id'])}: {first.protocol.scored_tokens} scored tokens, {first.protocol.name} windows, "
        f"{first.env['dtype']}"
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(Path(path), buffer.getvalue())
    return Path(path)


def short_names(references: Sequence[str]) -> list[str]:
    """Returns a short name for each model: the last parts of the paths if they all differ, else the full paths."""
    short = [Path(reference).name or reference for reference in references]
    return short if len(set(short)) == len(short) else list(references)


def plain(label: str) -> str:
    """Escapes a name for matplotlib, which reads ``$`` as a formula and hides legend entries that begin with ``_``."""
    name = visible(label).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _bits_per_byte(axes: "Axes", lines: "list[Line]") -> None:
    for evaluation, name, style in lines:
        lengths = [entry.length for entry in evaluation.metrics]
        bits = [entry.bpb for entry in evaluation.metrics]
        axes.plot(lengths, bits, marker="o", label=name, **style)
    _contexts(axes, [length for evaluation, _, _ in lines for length in evaluation.protocol.contexts])
    axes.set(ylabel="bits per byte", title="same tokens at every context")
    bits_per_nat = lines[0][0].metrics[0].bpb / lines[0][0].metrics[0].nll

    def perplexity(bpb: Any) -> Any:
        return np.exp(np.asarray(bpb) / bits_per_nat)

    def bits_per_byte(ppl: Any) -> Any:
        return np.log(np.maximum(ppl, np.finfo(float).tiny)) * bits_per_nat  # matplotlib tries 0 as well

    right = axes.secondary_yaxis("right", functions=(perplexity, bits_per_byte))
    right.set_ylabel("perplexity")
    axes.legend()


def _ratio(axes: "Axes", lines: "list[Line]", baseline: Evaluation) -> None:
    for evaluation, name, style in lines:
        compared = compare(evaluation, baseline)
        lengths = [entry.length for entry in compared]
        axes.plot(lengths, [entry.log_ratio for entry in compared], marker="o", label=name, **style)
        axes.fill_between(lengths, [c.lo for c in compared], [c.hi for c in compared], alpha=0.2, lw=0, **style)
    axes.axhline(0.0, color="black", ls="--", lw=1)
    _contexts(axes, [length for evaluation, _, _ in lines for length in evaluation.protocol.contexts])
    axes.set(ylabel="log perplexity ratio (below 0: better)", title="against the baseline, 95% interval")


def _positions(axes: "Axes", lines: "list[Line]") -> None:
    drawn = [line for line in lines if line[0].position_nll]
    for evaluation, name, style in drawn:
        centres = [np.sqrt((entry.lo + 1) * (entry.hi + 1)) for entry in evaluation.position_nll]
        axes.plot(centres, [entry.nll for entry in evaluation.position_nll], marker=".", label=name, **style)
    if drawn:
        axes.set_xscale("log", base=2)
    axes.set(
        xlabel="position in the window + 1 (bucket centre)",
        ylabel="NLL (nats a token)",
        title=f"by position, windows of {lines[0][0].protocol.contexts[-1]}",
    )


def _contexts(axes: "Axes", lengths: list[int]) -> None:
    """Makes the x axis logarithmic, with ticks at the given context lengths."""
    ticks = sorted(set(lengths))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(length) for length in ticks], minor=False)
    axes.set_xlabel("context (tokens)")


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
