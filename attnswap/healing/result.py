"""The result of an experiment, as plain values."""

import itertools
import math
import platform
import shlex
import sys
from datetime import UTC, datetime
from typing import Any

import torch
import transformers

import attnswap
from attnswap import swaps
from attnswap.evaluation.bootstrap import Comparison, compare
from attnswap.healing.experiment import Experiment
from attnswap.healing.run import Measured
from attnswap.provenance import commit
from attnswap.training.config import TrainConfig, as_run
from attnswap.training.stages import stages_of

SCHEMA = "attnswap.heal/1"
PAIRS = {
    "ratio_to_control": ("healed", "control"),
    "ratio_to_original": ("healed", "original"),
    "control_to_original": ("control", "original"),
    "unhealed_to_control": ("unhealed", "control"),
    "unhealed_to_original": ("unhealed", "original"),
    "bypassed_to_healed": ("bypassed", "healed"),
}
"""Names of comparisons, with the two models that each compares."""
MIN_COST = 0.05
"""A swap counts as used if ablating it (softmax in its place) raises the perplexity by more than this share."""


def summarise_healing(experiment: Experiment, measured: Measured) -> dict[str, Any]:
    """Returns the content of ``result.json``.

    Args:
        experiment: The experiment.
        measured: Its measurements.
    """
    losses = measured.losses
    compared = {name: _by_context(losses, ours, theirs) for name, (ours, theirs) in PAIRS.items() if ours in losses}
    contexts = [
        {
            "context": length,
            "perplexity": {name: found.at(length).ppl for name, found in losses.items()},
            "bits_per_byte": {name: found.at(length).bpb for name, found in losses.items()},
            **{name: _ratio(entries[length]) for name, entries in compared.items()},
            "recovered_fraction": recovered(
                compared.get("unhealed_to_original", {}).get(length),
                {name: found.at(length).ppl for name, found in losses.items()},
            ),
        }
        for length in losses["healed"].protocol.contexts
    ]
    config, healed = experiment.config, measured.training["healed"]
    control = measured.training.get("control", {})
    assert config.swap is not None
    swap = swaps.resolve(config.swap)
    first = losses["healed"]
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "swap": config.swap if isinstance(config.swap, dict) else {"name": config.swap},
        "layers": config.layers,
        "heads": config.heads,
        "identity_start": swap.exact_identity,
        "model": config.model.reference,
        "command": shlex.join(["attnswap", *sys.argv[1:]]),
        "commit": healed.get("commit"),
        "measured_at": commit(),
        "seed": experiment.seed,
        "recipe": as_run(config),
        "data": healed["data"],
        "tokens": healed["tokens"],
        "fit_tokens": healed.get("fit_tokens", 0),
        "steps": healed["steps"],
        "control_steps": {name: control.get(name, 0) for name in ("steps", "steps_at_rest")},
        "control_commit": control.get("commit"),
        "seconds": {name: summary["seconds"] for name, summary in measured.training.items()},
        "corpus": first.corpus,
        "protocol": {**first.protocol.to_dict(), "dtype": first.env["dtype"]},
        "contexts": contexts,
        "proof_of_use": proof_of_use(contexts, measured.movement, identity=swap.exact_identity),
        "structure": {name: found["summary"] for name, found in measured.structure.items()},
        "structure_tokens": measured.structure["healed"]["tokens"],
        "fidelity": measured.fidelity["healed"],
        "curve": curve(measured, config),
        "held_out": held_out(measured, config),
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """Returns the versions and the number of threads of this process."""
    return {
        "attnswap": attnswap.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def recovered(damage: Comparison | None, perplexity: dict[str, float]) -> float | None:
    """Returns the share of the damage that healing undid, in nats: ``ln(unhealed / healed) / ln(unhealed / control)``.

    A share of perplexity would be misleading: of a perplexity of 1e10, even a useless model recovers nearly all.

    Args:
        damage: The unhealed model compared with the original; None if its losses are not finite. The control is no
            measure of damage, since it may be better than the original.
        perplexity: The perplexity by model.

    Returns:
        1 if the healed model equals the control; None if the swap did no measurable damage.
    """
    if damage is None or damage.lo <= 0:
        return None
    nats = {name: math.log(perplexity[name]) for name in ("unhealed", "healed", "control")}
    lost = nats["unhealed"] - nats["control"]
    return (nats["unhealed"] - nats["healed"]) / lost if lost > 0 else None


def proof_of_use(
    contexts: list[dict[str, Any]], movement: dict[str, dict[str, float]], *, identity: bool
) -> dict[str, Any]:
    """Returns whether the healed model uses its swap: the cost of ablating it, and how far its parameters moved."""
    cost = {str(entry["context"]): entry["bypassed_to_healed"]["ratio"] - 1 for entry in contexts}
    kinds: dict[str, float] = {}
    for name, moved in movement.items():
        kind = name.rpartition(".")[2]
        kinds[kind] = max(kinds.get(kind, 0.0), moved["largest"])
    least = min(cost.values())
    return {"cost_of_bypass": cost, "movement": kinds, "used": None if identity else least > MIN_COST}


def curve(measured: Measured, config: TrainConfig) -> list[dict[str, Any]]:
    """Returns the parts of the loss over training, with the number of tokens read up to each step."""
    keys = ("loss", "kl", "ce", "transfer", "regression", "sinks", "lambda", "stage")
    read = tokens_by_step(measured, config)
    return [
        {"step": entry["step"], "tokens": read[entry["step"]], **{k: entry[k] for k in keys if k in entry}}
        for entry in measured.log
        if "loss" in entry
    ]


def held_out(measured: Measured, config: TrainConfig) -> list[dict[str, Any]]:
    """Returns the held-out loss over training, and the ratio of its perplexity to the control's final one, if known."""
    control = measured.training.get("control", {}).get("held_out_loss")
    read = tokens_by_step(measured, config)
    return [
        {
            "step": entry["step"],
            "tokens": read[entry["step"]],
            "nll": entry["eval_loss"],
            "ratio": math.exp(entry["eval_loss"] - control),
        }
        for entry in measured.log
        if "eval_loss" in entry and control is not None
    ]


def tokens_by_step(measured: Measured, config: TrainConfig) -> list[int]:
    """Returns the number of tokens read after 0, 1, 2, ... steps."""
    healed = measured.training["healed"]
    lengths = [0]  # of the windows of each step, which depends on the stage
    for stage in stages_of(config):
        lengths += [stage.section.sequence_length or config.data.sequence_length] * stage.steps
    read = list(itertools.accumulate(lengths if len(lengths) > 1 else [0, *[1] * healed["steps"]]))
    return [round(healed["tokens"] * part / read[-1]) for part in read]


def _by_context(losses: dict[str, Any], ours: str, theirs: str) -> dict[int, Comparison]:
    return {entry.length: entry for entry in compare(losses[ours], losses[theirs])}


def _ratio(entry: Comparison) -> dict[str, float]:
    return {
        "ratio": entry.ratio,
        "lo": math.exp(entry.lo),
        "hi": math.exp(entry.hi),
        "log_ratio": entry.log_ratio,
        "log_lo": entry.lo,
        "log_hi": entry.hi,
    }
