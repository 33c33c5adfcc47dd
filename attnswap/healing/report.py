"""The report of an experiment: tables, a picture, and the files of its folder."""

import io
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnswap.evaluation.figure import COLOURS, plain
from attnswap.evaluation.result import write_atomically
from attnswap.healing.result import MIN_COST
from attnswap.markdown import markdown_table
from attnswap.training.strict import dump_yaml
from attnswap.visible import visible

MODELS = ("original", "control", "unhealed", "fitted", "healed")
COMPARED = ("healed / control [95%]", "recovered", "without swap")


def rows_of(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns the header of the table and its rows, one per context."""
    models = [name for name in MODELS if name in result["contexts"][0]["perplexity"]]
    rows: list[tuple[str, ...]] = [("context", *models, *COMPARED)]
    for entry in result["contexts"]:
        ppl, ratio = entry["perplexity"], entry["ratio_to_control"]
        rows.append(
            (
                str(entry["context"]),
                *(f"{ppl[name]:.3f}" if ppl[name] < 1e4 else f"{ppl[name]:.1e}" for name in models),
                f"{ratio['ratio']:.4f} [{ratio['lo']:.4f}, {ratio['hi']:.4f}]",
                recovered_of([entry]),
                f"{entry['bypassed_to_healed']['ratio']:.3f}x",
            )
        )
    return rows


def table(result: dict[str, Any]) -> RenderableType:
    """Returns tables for the terminal: perplexities, comparisons, and whether the swap is used.

    There are two tables, since one of all columns would be wider than many terminals.
    """
    rows = rows_of(result)
    models = len(rows[0]) - len(COMPARED)
    perplexities = _table([row[:models] for row in rows])
    compared = _table([(row[0], *row[models:]) for row in rows])
    return Group(Text(visible(title(result))), "", perplexities, "", compared, "", Text(visible(use_of(result))))


def _table(rows: Sequence[tuple[str, ...]]) -> Table:
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in rows[0]:
        made.add_column(Text(visible(column)), justify="right", overflow="fold")
    for row in rows[1:]:
        made.add_row(*(Text(visible(cell)) for cell in row))
    return made


def use_of(result: dict[str, Any]) -> str:
    """Returns a sentence on what ablating the swap costs, and whether that proves its use."""
    use = result["proof_of_use"]
    cost = (
        f"cost without swap: {min(use['cost_of_bypass'].values()):+.1%} perplexity, at the context where it is smallest"
    )
    if use["used"] is None:
        return f"{cost} (no minimum is required of a swap that starts as softmax)"
    return f"{cost}: the swap is {'used' if use['used'] else f'not used (required: more than {MIN_COST:.0%})'}"


def title(result: dict[str, Any]) -> str:
    """Returns a line that names swap, layers, model and training tokens."""
    return f"{swap_of(result)}, {where_of(result)} of {result['model']}: {tokens_of(result)} tokens"


def where_of(result: dict[str, Any]) -> str:
    """Returns the layers of the swap, and its heads if it is not in all heads."""
    layers = "all layers" if result["layers"] is None else f"layers {result['layers']}"
    return layers if result["heads"] is None else f"heads {result['heads']} of {layers}"


def recovered_of(contexts: list[dict[str, Any]]) -> str:
    """Returns the smallest share of the damage that healing undid, over some contexts."""
    shares = [entry["recovered_fraction"] for entry in contexts if entry["recovered_fraction"] is not None]
    if shares:
        return f"{min(shares):.3f}"
    return "nothing lost" if all("unhealed" in entry["perplexity"] for entry in contexts) else "unhealed overflows"


def tokens_of(result: dict[str, Any]) -> str:
    """Returns the number of training tokens, and of tokens for the fit before."""
    fitted = result.get("fit_tokens")
    return f"{result['tokens']:,}" + (f" + {fitted:,} to fit" if fitted else "")


def minutes_of(result: dict[str, Any]) -> int:
    """Returns the minutes of the healed model's training, resumed runs included."""
    return math.ceil(result["seconds"]["healed"] / 60)


def swap_of(result: dict[str, Any]) -> str:
    """Returns the swap's name with its options."""
    options = ", ".join(f"{k}={v}" for k, v in result["swap"].items() if k != "name")
    return result["swap"]["name"] + (f" ({options})" if options else "")


def markdown(result: dict[str, Any]) -> str:
    """Returns the table and the other measurements as Markdown."""
    lines = [f"{title(result)}; perplexity on {result['corpus']['id']}", ""]
    structure = result["structure"]
    attention = [
        [figure.replace("_", " "), *(f"{found[figure]:.4g}" for found in structure.values())]
        for figure in next(iter(structure.values()))
    ]
    head, *rows = rows_of(result)
    lines += [markdown_table(head, rows), "", markdown_table(["attention", *structure], attention, words=1)]
    fidelity, use, control = result["fidelity"], result["proof_of_use"], result.get("control_steps", {})
    scored = result["protocol"]["scored_tokens"]
    looked = result.get("structure_tokens")  # missing in old results
    seen = f", attention on {looked:,}" if looked else ""
    said = [f"Trained in {minutes_of(result)} minutes, measured on {scored:,} tokens at each context length{seen}."]
    said += [f"KL from the original {fidelity['kl']:.4f} nats per token, top-1 agreement {fidelity['top1']:.1%}."]
    if use["movement"]:
        moves = ", ".join(f"{name} {largest:.2g}" for name, largest in use["movement"].items())
        said.append(f"Largest change of the swap's parameters: {moves}.")
    if use["used"] is not None:
        said.append(f"Proof of use: the swap is {'used' if use['used'] else 'not used'}.")
    if control.get("steps_at_rest"):
        said.append(
            f"The control had nothing to learn: {control['steps_at_rest']} of its {control['steps']} steps were "
            "skipped, because the gradients of the steps before them were 0."
        )
    lines += ["", " ".join(said), ""]
    return visible("\n".join(lines))


def plot(result: dict[str, Any], path: Path) -> Path:
    """Draws the training losses, and perplexity and its ratio to the control by context, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    seen = [(point["tokens"], point["ratio"]) for point in result.get("held_out", [])]
    panels = 4 if seen else 3
    figure = Figure(figsize=(5 * panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right, *last = figure.subplots(1, panels)
    points = result["curve"]
    parts = [key for key in ("kl", "transfer", "regression", "sinks") if any(key in p for p in points)]
    for key, colour in zip(parts or ["loss"], COLOURS, strict=False):
        drawn = [(p["tokens"], p[key]) for p in points if key in p]
        left.plot(*zip(*drawn, strict=True), color=colour, label=key)
    left.set(xlabel="tokens", ylabel="parts of the loss", yscale="log", title="training")
    ramp = [(p["tokens"], p["lambda"]) for p in points if "lambda" in p]
    if any(value < 1 for _, value in ramp):
        twin = left.twinx()
        twin.plot(*zip(*ramp, strict=True), color="grey", ls=":", label="lambda")
        twin.set(ylabel="lambda (dotted)", ylim=(0, 1.05))
    left.legend()
    lengths = [entry["context"] for entry in result["contexts"]]
    for name, colour in zip(("control", "healed", "bypassed"), COLOURS, strict=False):
        middle.plot(lengths, [e["perplexity"][name] for e in result["contexts"]], marker="o", color=colour, label=name)
    originals = [e["perplexity"]["original"] for e in result["contexts"]]
    middle.plot(lengths, originals, color="black", ls="--", label="original")
    middle.set(ylabel="perplexity", title=plain(f"on {result['corpus']['id']}"), yscale="log")
    middle.legend()
    ratios = [entry["ratio_to_control"] for entry in result["contexts"]]
    right.plot(lengths, [r["ratio"] for r in ratios], marker="o", color=COLOURS[0])
    right.fill_between(lengths, [r["lo"] for r in ratios], [r["hi"] for r in ratios], alpha=0.2, color=COLOURS[0], lw=0)
    right.axhline(1.0, color="black", ls="--", lw=1)
    right.set(ylabel="perplexity, healed / control", title="paired, 95% interval")
    for axes in (middle, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(n) for n in lengths], minor=False)
        axes.set_xlabel("context (tokens)")
    for axes in last:
        axes.plot(*zip(*seen, strict=True), marker="o", color=COLOURS[0])
        axes.axhline(1.0, color="black", ls="--", lw=1)
        axes.set(xlabel="tokens", ylabel="perplexity, healed / control", yscale="log", title="held-out training text")
    for axes in (middle, *last):
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
    figure.suptitle(plain(title(result)))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
    return path


def write(result: dict[str, Any], folder: Path, healed: Path) -> None:
    """Writes the folder of a result: JSON, table, picture, recipe and the log of the steps.

    Args:
        result: See :func:`attnswap.healing.summarise_healing`.
        folder: The folder.
        healed: The folder of the trained model.
    """
    write_atomically(folder / "result.json", (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    write_atomically(folder / "result.md", markdown(result).encode())
    plot(result, folder / "result.png")
    write_atomically(folder / "recipe.yaml", dump_yaml(result["recipe"]).encode())
    shutil.copyfile(healed / "steps.jsonl", folder / "steps.jsonl")
