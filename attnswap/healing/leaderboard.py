"""The leaderboard of all committed experiments, made from their JSON files.

python -m attnswap.healing.leaderboard results
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnswap.evaluation.result import write_atomically
from attnswap.healing.report import minutes_of, recovered_of, swap_of, tokens_of, where_of
from attnswap.healing.result import SCHEMA
from attnswap.markdown import markdown_table

PAGE = "leaderboard.md"


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the results of all experiments in a folder, by the names of their own folders."""
    found = {}
    for path in sorted(folder.glob("*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("schema") == SCHEMA:
            found[path.parent.name] = result
    return found


def table(results: dict[str, dict[str, Any]], link: str = "", contexts: Sequence[int] | None = None) -> str:
    """Returns a table with one row per experiment, ordered by the largest ratio to the control.

    Args:
        results: See :func:`read_results`.
        link: Prefix of the links to the folders.
        contexts: Context lengths that have a column; None: all.
    """
    contexts = contexts or sorted({entry["context"] for result in results.values() for entry in result["contexts"]})
    head = ["experiment", "swap", "where", "tokens", "minutes", "measured on"]
    head += [f"/ control at {n}" for n in contexts]
    head += ["recovered", "cost without swap", "sinks", "dead heads", "row sum", "KL"]
    rows = []
    for name, result in sorted(results.items(), key=lambda item: worst(item[1])):
        by_context = {entry["context"]: entry for entry in result["contexts"]}
        cells = [f"[{name}]({link}{name}/)", swap_of(result), where_of(result), tokens_of(result)]
        cells += [str(minutes_of(result)), f"{result['protocol']['scored_tokens']:,}"]
        cells += [_ratio(by_context[n]) if n in by_context else "-" for n in contexts]
        cells.append(recovered_of(result["contexts"]))
        cells.append(f"{min(result['proof_of_use']['cost_of_bypass'].values()):+.1%}")
        healed = result["structure"]["healed"]
        cells += [f"{healed['sink_rate']:.1%}", f"{healed['dead_head_rate']:.1%}", f"{healed['row_sum']:.2f}"]
        cells.append(f"{result['fidelity']['kl']:.4f}")
        rows.append(cells)
    return markdown_table(head, rows, words=3)


def worst(result: dict[str, Any]) -> float:
    """Returns the largest ratio to the control over all contexts."""
    return max(entry["ratio_to_control"]["ratio"] for entry in result["contexts"])


def page(results: dict[str, dict[str, Any]]) -> str:
    """Returns the leaderboard as Markdown."""
    return f"""# Healed models beside their controls

Made by `python -m attnswap.healing.leaderboard results` from the `result.json` of each folder; do not edit.

An experiment trains a recipe and its control: the unpatched model after the same recipe, without the stages that need a
swap or only compare attention outputs with the teacher. Where a control has nothing to learn, it is the original model.

- **where**: the layers (and heads) that have the swap.
- **tokens**: the tokens of training, and those that a least-squares start was fitted to.
- **minutes**: the time of training on two cores, pauses included.
- **measured on**: the number of tokens scored at each context length.
- **/ control**: the healed model's perplexity divided by the control's on the same tokens, with a paired 95% interval.
  The interval is a bootstrap over blocks of that text. 8,192 tokens fill only two windows of 8192, so there the
  interval does not cover how much windows differ.
- **recovered**: the share of the damage, in nats, that healing recovered, at the worst context length.
- **cost without swap**: the increase in the healed model's perplexity when the swap is ablated (softmax in its place),
  at the context length with the smallest increase.
- **sinks, dead heads**: the shares of heads that are attention sinks, or that attend to nothing.
- **row sum**: the sum of a query's weights, averaged over heads and queries.
- **KL**: the KL divergence from the original model, in nats per token.

{table(results)}
"""


def _ratio(entry: dict[str, Any]) -> str:
    ratio = entry["ratio_to_control"]
    return f"{ratio['ratio']:.4f} [{ratio['lo']:.4f}, {ratio['hi']:.4f}]"


def main(folder: str) -> None:
    """Writes the page into a folder of results."""
    results = read_results(Path(folder))
    write_atomically(Path(folder) / PAGE, page(results).encode())
    print(f"{len(results)} experiments: {Path(folder) / PAGE}")


if __name__ == "__main__":
    main(sys.argv[1])
