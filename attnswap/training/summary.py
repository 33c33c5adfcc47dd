"""The summary of a training run, as plain values and as a table."""

import statistics
from typing import Any

import torch
import transformers
from rich.table import Table
from rich.text import Text

import attnswap
from attnswap.provenance import commit
from attnswap.training.config import TrainConfig
from attnswap.training.movement import Moved, as_json, by_kind
from attnswap.training.trainer import StepLog, SwapTrainer, windows_per_step
from attnswap.visible import visible


def summarise(
    config: TrainConfig,
    trainer: SwapTrainer,
    metrics: dict[str, float],
    held_out: dict[str, float] | None,
    movement: dict[str, Moved],
    steps: StepLog,
    trainable: int,
    skipped: list[int],
    description: dict[str, Any],
    fit_tokens: int,
) -> dict[str, Any]:
    """Returns the content of ``summary.json``.

    Args:
        config: The recipe.
        trainer: The trainer after training.
        metrics: The metrics that ``train`` returned.
        held_out: Held-out metrics of the saved weights; None: they were not evaluated.
        movement: How far each swap parameter moved.
        steps: The log of the run, with the duration of each step of this process.
        trainable: Number of trained weights.
        skipped: The steps that were skipped because a loss or gradient was not finite.
        description: Identifies the training text.
        fit_tokens: Number of tokens that initial swap parameters were fitted to.
    """
    args, state = trainer.args, trainer.state
    not_computed = [] if trainer.skip_steps is None else trainer.skip_steps.skipped
    computed = {step: duration for step, duration in steps.seconds.items() if step not in not_computed}
    at_start = next((entry for entry in state.log_history if "eval_loss" in entry and entry["step"] == 0), None)
    return {
        "schema": "attnswap.train/1",
        "commit": commit(),
        "swap": config.swap if config.swap is not None else "none",
        "model": config.model.reference,
        "steps": state.global_step,
        "best_step": trainer.loaded_step,
        "train_loss": _mean_loss(state.log_history, metrics["train_loss"]),
        "held_out_loss_before": at_start["eval_loss"] if at_start else None,
        "held_out_loss": held_out["eval_loss"] if held_out else None,
        "held_out_tokens": held_out["eval_tokens"] if held_out else None,
        "sequence_length": config.data.sequence_length,
        "data": {"source": config.data.source, **description},
        "tokens": tokens_of(config, trainer),
        "fit_tokens": fit_tokens,
        "stages": [
            {
                "name": stage.section.name,
                "steps": stage.steps,
                "sequence_length": stage.section.sequence_length or config.data.sequence_length,
                "seconds_per_step": _median(computed, range(stage.first, stage.first + stage.steps)),
            }
            for stage in trainer.stages
        ],
        "windows_per_step": windows_per_step(args),
        "processes": args.world_size,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else config.model.dtype,
        "skipped_steps": skipped,
        "steps_at_rest": len(not_computed),
        "seconds": steps.runtime,
        "seconds_per_step": None if trainer.stages else _median(computed, range(state.global_step)),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "parameters_trained": trainable,
        "parameters_of_swap": sum(p.numel() for p in attnswap.swap_parameters(trainer.model).values()),
        "moved": as_json(by_kind(movement)),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _median(seconds: dict[int, float], steps: range) -> float | None:
    """Returns the median duration of the steps in a range that this process computed; None if it computed none."""
    known = [seconds[step] for step in steps if step in seconds]
    return statistics.median(known) if known else None


def _mean_loss(log: list[dict[str, Any]], default: float) -> float:
    """Returns the mean logged loss over all steps of a run, resumed or not; a default if no loss was logged."""
    entries = [entry for entry in log if "loss" in entry]
    starts = [0, *(entry["step"] for entry in entries)]
    steps = [entry["step"] - start for entry, start in zip(entries, starts, strict=False)]
    if not sum(steps):
        return default
    return sum(entry["loss"] * count for entry, count in zip(entries, steps, strict=True)) / sum(steps)


def tokens_of(config: TrainConfig, trainer: SwapTrainer) -> int:
    """Returns the number of tokens that a run has read, padding included."""
    done, windows = trainer.state.global_step, windows_per_step(trainer.args)
    if not trainer.stages:
        return done * windows * config.data.sequence_length
    return sum(
        max(0, min(stage.steps, done - stage.first))
        * windows
        * (stage.section.sequence_length or config.data.sequence_length)
        for stage in trainer.stages
    )


def table(summary: dict[str, Any]) -> Table:
    """Returns the summary as a table for the terminal."""
    swap = summary["swap"]
    name = swap if isinstance(swap, str) else swap["name"]
    title = visible(f"{name} on {summary['model']}")
    view = Table(title=Text(title, "table.title"), show_header=False)
    view.add_column(style="bold", overflow="fold")
    view.add_column(justify="right", overflow="fold")
    if summary["fit_tokens"]:
        view.add_row("fitted to", f"{summary['fit_tokens']:,} tokens")
    parts = summary["stages"] or [{"name": "steps", **summary}]
    for part in parts:
        said = f"{part['steps']} of {summary['windows_per_step'] * part['sequence_length']} tokens"
        if part["seconds_per_step"] is not None:
            said += f", {part['seconds_per_step']:.2f} s each ({summary['precision']})"
        view.add_row(Text(visible(part["name"])), said)
    view.add_row("trained weights", f"{summary['parameters_trained']:,} of {summary['parameters']:,}")
    view.add_row("training loss, mean", f"{summary['train_loss']:.4f}")
    before, after = summary["held_out_loss_before"], summary["held_out_loss"]
    if after is not None:
        view.add_row("held-out loss", f"{after:.4f}" if before is None else f"{before:.4f} -> {after:.4f}")
        view.add_row("held-out tokens", f"{summary['held_out_tokens']:,}")
    for kind, moved in summary["moved"].items():
        view.add_row(f"{kind} moved", f"at most {moved['largest']:.2e}, rms {moved['rms']:.2e}")
    view.add_row("seconds in all", f"{summary['seconds']:.0f}")
    return view
