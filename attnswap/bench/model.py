"""Time a training step and generation of a patched model, compared with the unpatched model."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from attnswap.bench.calls import TimedCall
from attnswap.bench.machine import environment
from attnswap.bench.statistics import median_interval
from attnswap.bench.timing import interleave
from attnswap.errors import ConfigError, nearest
from attnswap.evaluation.result import write_atomically
from attnswap.loading import load_model
from attnswap.surgery.parameters import swap_parameters
from attnswap.surgery.patch import patch
from attnswap.swaps import names

SCHEMA = "attnswap.bench.model/1"
TASKS = ("step", "generate")
BOUND = 1.15
"""The upper bound of the time relative to the unpatched model that the project promises, in fp32."""
NUDGE = 0.01
"""Added to every learned number of a swap, since some swaps run softmax kernels as long as they equal softmax."""


@dataclass(frozen=True)
class ModelPlan:
    """The options of a measurement.

    Attributes:
        reference: The model (see :func:`attnswap.loading.resolve`).
        swaps: Names of swaps; None: every known swap.
        dtype: Name of the torch dtype of the model.
        tasks: ``"step"``: a training step with AdamW on one row of ``step_tokens`` tokens. ``"generate"``: greedy
            generation of ``new`` tokens after a prompt of ``prompt`` tokens.
        step_tokens: Tokens in a training step.
        prompt: Tokens in the prompt.
        new: Tokens to generate.
        rounds: Number of pairs of samples.
        seed: Seed of the tokens and of the bootstrap.
    """

    reference: str
    swaps: Sequence[str] | None = None
    dtype: str = "float32"
    tasks: Sequence[str] = TASKS
    step_tokens: int = 2048
    prompt: int = 4096
    new: int = 128
    rounds: int = 9
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for an unknown task, or for too few rounds for a confidence interval."""
        for task in self.tasks:
            if task not in TASKS:
                raise ConfigError(f'unknown task "{task}".{nearest(task, list(TASKS))} Tasks: {", ".join(TASKS)}')
        if self.rounds < 3:
            raise ConfigError(f"{self.rounds} rounds are too few for a confidence interval: give at least 3")


def measure_model(plan: ModelPlan, announce: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Times each task with each swap against the unpatched model.

    Args:
        plan: The options.
        announce: Called with a line of text before and after each measurement.

    Returns:
        Plain values: the options, the environment, and for each swap and task the seconds of every round and the median
        ratio with its 95% interval.

    Raises:
        ConfigError: An option is wrong, or the model cannot be loaded.
    """
    plan.check()
    stock = load_model(plan.reference).to(getattr(torch, plan.dtype))
    found = []
    for swap in names() if plan.swaps is None else plan.swaps:
        patched = copy.deepcopy(stock)
        patch(patched, swap)
        with torch.no_grad():
            for parameter in swap_parameters(patched).values():
                parameter.add_(NUDGE)
        for task in plan.tasks:
            announce(f"{swap}: {task}, {plan.rounds} rounds")
            sdpa, ours = (_call(model, task, plan) for model in (stock, patched))
            rounds = interleave(sdpa, ours, plan.rounds)
            ratio = median_interval([r.ours / r.sdpa for r in rounds], seed=plan.seed)
            seconds = [{"unpatched": r.sdpa, "patched": r.ours} for r in rounds]
            found.append({"swap": swap, "task": task, "ratio": asdict(ratio), "bound": BOUND, "rounds": seconds})
            announce(f"{swap}: {task} takes {ratio.median:.2f} [{ratio.lo:.2f}, {ratio.hi:.2f}] times as long")
    return {"schema": SCHEMA, "plan": asdict(plan), "env": environment(), "results": found}


def _call(model: PreTrainedModel, task: str, plan: ModelPlan) -> TimedCall:
    generator = torch.Generator().manual_seed(plan.seed)
    length = plan.step_tokens if task == "step" else plan.prompt
    ids = torch.randint(1, model.config.vocab_size, (1, length), generator=generator)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    @torch.enable_grad()
    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    def generate() -> torch.Tensor:
        options = {"min_new_tokens": plan.new, "max_new_tokens": plan.new, "do_sample": False, "pad_token_id": 0}
        function: Any = model.generate
        return function(ids, attention_mask=torch.ones_like(ids), **options)

    return TimedCall(step if task == "step" else generate, (), ids)


def model_table(report: dict[str, Any]) -> Table:
    """Returns a table for the terminal of the result of :func:`measure_model`."""
    env, plan = report["env"], report["plan"]
    title = f"time over the unpatched model's, {plan['dtype']}, {env['cpu']}, {env['threads']} threads"
    table = Table(title=title, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("swap", "task", "ratio [95%]", "unpatched s", "bound"):
        table.add_column(name)
    for row in report["results"]:
        ratio, stock = row["ratio"], sorted(r["unpatched"] for r in row["rounds"])
        kept = "pass" if ratio["hi"] < row["bound"] else "fail"
        interval = f"{ratio['median']:.2f} [{ratio['lo']:.2f}, {ratio['hi']:.2f}]"
        seconds = f"{stock[len(stock) // 2]:.2f}"
        table.add_row(row["swap"], row["task"], interval, seconds, f"{kept} <{row['bound']:.2f}")
    return table


def write_model_report(report: dict[str, Any], out: Path) -> Path:
    """Writes ``model.json``, atomically, and returns its path."""
    path = out / "model.json"
    write_atomically(path, (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    return path
