"""``make demo``: the whole turn on the embedded model, offline.

Patches it, fine-tunes it and a control with the same recipe, and measures the original, the control and the result on
text that none of them was trained on.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

import attnswap
from attnswap.cli import quieten
from attnswap.cli.terminal import Terminal
from attnswap.devices import has_bf16_instructions
from attnswap.errors import AttnSwapError
from attnswap.evaluation import Evaluation, compare, evaluate_perplexity, plot
from attnswap.evaluation.result import write_atomically
from attnswap.loading import EMBEDDED, load_model, load_tokenizer
from attnswap.markdown import markdown_table
from attnswap.text import evaluation_text

RECIPES = Path(attnswap.__file__).parent.parent / "recipes"
CONTEXTS = (512, 1024, 2048, 4096, 8192)
RUNS = {"control": "control", "ssmax": "ssmax"}
"""Name of each fine-tuned model and its recipe; the control differs in nothing but the swap."""


@dataclass(frozen=True)
class Size:
    """How much the demo does: training steps of 1024 tokens, scored tokens at each context, and the dtype of it all."""

    steps: int
    scored: int
    dtype: torch.dtype


WHOLE = Size(40, 16384, torch.bfloat16)
SHORT = Size(20, 4096, torch.float32)
"""For a processor that has no instructions for bf16, which also takes several times as long in fp32."""


def main(out: Path = Path("out"), size: Size | None = None, contexts: tuple[int, ...] = CONTEXTS) -> None:
    """Runs the demo and leaves ``demo.md``, ``demo.json`` and ``demo.png`` in ``out``.

    Args:
        out: Where results go; models of an earlier demo there are replaced.
        size: How much is done; default: what this machine can do in good time.
        contexts: Context lengths to measure.
    """
    started = time.monotonic()
    quieten()
    device = "cuda" if torch.cuda.is_available() else "cpu"  # as fine_tune
    if size is None:
        size = WHOLE if has_bf16_instructions(device) else SHORT
    if size is SHORT:
        print("this processor has no instructions for bf16: a shorter demo, in fp32", flush=True)
    show_identity()
    for name, recipe in RUNS.items():
        fine_tune(recipe, out / name, size)
    references = {"original": EMBEDDED, **{name: str(out / name) for name in RUNS}}
    found: dict[str, Evaluation] = {}
    for name, reference in references.items():
        print(f"\nmeasuring {name}", flush=True)
        model = load_model(reference, dtype=size.dtype, device=device)
        found[name] = evaluate_perplexity(
            model,
            load_tokenizer(reference),
            contexts=contexts,
            max_tokens=size.scored,
            baseline=found.get("original"),
            model_id=name,
        )
        found[name].save(out / f"{name}.json")
    rows = compare_all(found)
    write(out, found, rows, size.steps, time.monotonic() - started)


def show_identity() -> None:
    """Patches the model and prints how far the largest logit moved."""
    print("patching SmolLM2-135M-Instruct with ssmax", flush=True)
    model, tokenizer = load_model(EMBEDDED), load_tokenizer(EMBEDDED)
    ids = tokenizer(evaluation_text()[:4000], return_tensors="pt").input_ids[:, :512]
    with torch.no_grad():
        before = model(ids).logits
        print(attnswap.patch(model, "ssmax"))
        change = float((model(ids).logits - before).abs().max())
    print(f"largest change of any logit over {ids.shape[1]} tokens at the identity start: {change:g}", flush=True)


def fine_tune(recipe: str, out: Path, size: Size) -> None:
    """Trains a recipe as a user would, with ``accelerate launch``."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", str(torch.get_num_threads())]
    launch += [] if torch.cuda.is_available() else ["--cpu"]
    values = [f"output_dir={out}", "overwrite=true"]
    values += [f"training.{key}={size.steps}" for key in ("max_steps", "eval_steps")]
    values += [] if size.dtype == torch.bfloat16 else ["training.bf16=false"]
    command = [*launch, str(RECIPES / "train.py"), str(RECIPES / f"{recipe}.yaml"), *values]
    print(f"\naccelerate launch recipes/train.py recipes/{recipe}.yaml {' '.join(values)}", flush=True)
    done = subprocess.run(command, check=False, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    if done.returncode:
        raise AttnSwapError(f"fine-tuning recipes/{recipe}.yaml failed with exit code {done.returncode}")


def compare_all(found: dict[str, Evaluation]) -> list[dict[str, float]]:
    """Returns one row for each context: perplexities, and the paired ratios with their 95% intervals."""
    against_original = {r.length: r for r in compare(found["ssmax"], found["original"])}
    against_control = {r.length: r for r in compare(found["ssmax"], found["control"])}
    rows = []
    for length in found["original"].nll:
        gain, paired = against_original[length], against_control[length]
        rows.append(
            {
                "context": length,
                **{name: e.at(length).ppl for name, e in found.items()},
                "log_ratio_to_original": gain.log_ratio,
                "standard_error": gain.se,
                "log_ratio_to_control": paired.log_ratio,
                "control_low": paired.lo,
                "control_high": paired.hi,
            }
        )
    return rows


def write(out: Path, found: dict[str, Evaluation], rows: list[dict[str, float]], steps: int, seconds: float) -> None:
    """Writes the table, the JSON and the picture, and prints the table."""
    head = ("context", *found, "ln ssmax/original (± standard error)", "ln ssmax/control [95%]")
    table, lines = Table(*head), []
    for row in rows:
        cells = [
            str(row["context"]),
            *(f"{row[name]:.3f}" for name in found),
            f"{row['log_ratio_to_original']:+.4f} +- {row['standard_error']:.4f}",
            f"{row['log_ratio_to_control']:+.4f} [{row['control_low']:+.4f}, {row['control_high']:+.4f}]",
        ]
        table.add_row(*cells)
        lines.append(cells)
    text = markdown_table(head, lines, words=len(head)) + "\n"
    scored = len(next(iter(found["original"].nll.values())))
    result = {"schema": "attnswap.demo/1", "steps": steps, "scored_tokens": scored, "seconds": seconds, "rows": rows}
    write_atomically(out / "demo.md", text.encode())
    write_atomically(out / "demo.json", (json.dumps(result, indent=2) + "\n").encode())
    plot([found["control"], found["ssmax"]], out / "demo.png", baseline=found["original"], labels=["control", "ssmax"])
    Terminal(width=None if sys.stdout.isatty() else 100).print(table)
    print(f"perplexity over the same {scored} tokens at every context; {seconds / 60:.1f} minutes in all")
    print(f"results: {out}/demo.md, {out}/demo.json, {out}/demo.png")


if __name__ == "__main__":
    main()
