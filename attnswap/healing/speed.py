"""Time a step of each stage of a recipe, beside a step of plain distillation of the unpatched model.

python -m attnswap.healing.speed results/healing-speed recipes/heal/*.yaml training.bf16=false

The two alternate, so that other load on the machine affects both.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import attnswap
from attnswap.evaluation.result import write_atomically
from attnswap.healing.result import environment
from attnswap.loading import load_model
from attnswap.markdown import markdown_table
from attnswap.provenance import commit
from attnswap.training import Distillation, LossSection, StageSection, chunked_loss, load_config, teacher_of
from attnswap.training.config import TrainConfig
from attnswap.training.stages import parameters_to_freeze
from attnswap.training.teacher import matrix_dtype

ROUNDS = 5
MAX_SECONDS = 90.0
"""Seconds after which the timing of a stage ends, if it has at least two rounds."""
LONG_SECONDS = 10.0
"""Seconds of a pair of steps from which on the extra costs of a first step do not matter, so that it counts too."""
Step = Callable[[], None]


@contextmanager
def training_step(model: PreTrainedModel, stage: StageSection, length: int, config: TrainConfig) -> Iterator[Step]:
    """Yields a function that takes one training step of a stage on a window of random tokens."""
    teacher = teacher_of(model, dtype=matrix_dtype(config))
    for parameter in parameters_to_freeze(model, stage):
        parameter.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)  # a rate of 0, so that all steps are alike
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(length, device=model.device)[None]}
    model.train()

    def step() -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bool(config.training.get("bf16"))):
            total = model(**batch).loss
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with chunked_loss(model, objective=Distillation(teacher, stage.loss)):
        yield step


def measure(config: TrainConfig, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Times the stages of a recipe.

    Args:
        config: The recipe.
        rounds: How often each step is timed after a first one, if steps are not long.

    Returns:
        For each stage its name, the length of its windows, the median seconds of a step of plain distillation and of
        a step of the stage, the median and range of their ratio, and the number of rounds.
    """
    found = []
    for stage in config.stages:
        length = stage.sequence_length or config.data.sequence_length
        plain, healed = (load_model(config.model.reference, dtype=torch.float32) for _ in range(2))
        assert config.swap is not None
        ramp = 1.0 if stage.ramp is None else 0.5  # between 0 and 1 some swaps compute softmax too
        attnswap.patch(healed, config.swap, part=config.part, layers=config.layers, heads=config.heads, ramp=ramp)
        trains = "attention" if stage.train == "swap" else stage.train  # an unpatched model has no swap parameters
        taught = replace(stage, loss=LossSection(kl=1.0, ce=0.0), train=trains)
        with (
            training_step(plain, taught, length, config) as theirs,
            training_step(healed, stage, length, config) as ours,
        ):
            times = _interleaved(theirs, ours, rounds)
        ratios = [b / a for a, b in times]
        found.append(
            {
                "stage": stage.name,
                "length": length,
                "plain_seconds": statistics.median(a for a, _ in times),
                "healing_seconds": statistics.median(b for _, b in times),
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "largest": max(ratios),
                "rounds": len(ratios),
            }
        )
    return found


def _interleaved(theirs: Step, ours: Step, rounds: int) -> list[tuple[float, float]]:
    """Returns the seconds of both steps, round by round."""
    started = time.perf_counter()
    first = _timed(theirs), _timed(ours)
    times = [first] if sum(first) > LONG_SECONDS else []
    while len(times) < rounds and (len(times) < 2 or time.perf_counter() - started < MAX_SECONDS):
        times.append((_timed(theirs), _timed(ours)))
    return times


def _timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def table(result: dict[str, Any]) -> str:
    """Returns the times as a Markdown table."""
    head = ("recipe", "stage", "tokens of a window", "plain distillation (s)", "healing (s)", "ratio [range]")
    rows = []
    for name, stages in result["recipes"].items():
        for s in stages:
            ratio = f"{s['ratio']:.2f} [{s['least']:.2f}, {s['largest']:.2f}]"
            times = f"{s['plain_seconds']:.2f}", f"{s['healing_seconds']:.2f}"
            rows.append((name, s["stage"], str(s["length"]), *times, ratio))
    return markdown_table(head, rows, words=2) + "\n"


def main(folder: str, words: list[str]) -> None:
    """Times recipes and writes ``speed.json`` and ``speed.md``.

    Args:
        folder: The folder of the two files.
        words: Recipes, and overrides (``key=value``) that apply to all of them.
    """
    overrides = [word for word in words if "=" in word]
    result: dict[str, Any] = {
        "schema": "attnswap.healing-speed/1",
        "command": " ".join(["python -m attnswap.healing.speed", folder, *words]),
        "commit": commit(),
        "environment": environment(),
        "recipes": {},
    }
    for recipe in (word for word in words if "=" not in word):
        result["recipes"][Path(recipe).stem] = measure(load_config(Path(recipe), overrides))
        print(table(result), flush=True)
        write_atomically(Path(folder) / "speed.json", (json.dumps(result, indent=1) + "\n").encode())
        write_atomically(Path(folder) / "speed.md", table(result).encode())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
