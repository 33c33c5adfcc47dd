"""lambda over training steps, and lambda as a checkpoint has it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import attnswap
from attnswap.errors import CheckpointError
from attnswap.surgery.attach import base_of, spec_of
from attnswap.surgery.patch import follow
from attnswap.surgery.spec import KEY, PatchSpec, with_towers

SPEC = "attnswap.json"


class RampSchedule(TrainerCallback):
    """Moves lambda of every swap with the step. A resumed run goes on at the value of its step.

    Args:
        schedule: Steps until lambda is ``end``, evenly; or a function from the number of a step, counted from 1, to its
            lambda.
        start: lambda before the first step.
        end: lambda from the last of those steps on.
    """

    def __init__(self, schedule: int | Callable[[int], float], start: float = 0.0, end: float = 1.0) -> None:
        self.schedule, self.start, self.end = schedule, start, end

    def at(self, step: int) -> float:
        """Returns lambda of a step."""
        if callable(self.schedule):
            return self.schedule(step)
        return self.start + (self.end - self.start) * min(step / max(self.schedule, 1), 1.0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the value of the step to come."""
        if 0 < state.max_steps <= state.global_step:  # resumed at the end
            return
        attnswap.set_ramp(base_of(kwargs["model"]), self.at(state.global_step + 1))


def follow_checkpoint(model: Any, checkpoint: Path) -> None:
    """Moves lambda of a model's swaps to where a checkpoint has it, which its tensors alone cannot do.

    Args:
        model: A patched model, or one with swap adapters. Others are left alone.
        checkpoint: A folder with a config.json or an adapter_config.json.

    Raises:
        CheckpointError: The checkpoint's entry is damaged or of other swaps.
    """
    base = base_of(model)
    if not isinstance(base, PreTrainedModel) or spec_of(base) is None:
        return
    values = _spec_in(checkpoint, getattr(model, "active_adapter", None))
    if values is not None:
        follow(base, PatchSpec.from_dict(values))


def note_ramps(model: Any, checkpoint: Path) -> None:
    """Writes what the swaps of a model are into a checkpoint: those of sharded models hold no config."""
    base = base_of(model)
    spec = spec_of(base) if isinstance(base, PreTrainedModel) else None
    if spec is not None:
        (checkpoint / SPEC).write_text(json.dumps(spec.to_dict(), indent=1) + "\n", encoding="utf-8")


def _spec_in(checkpoint: Path, adapter: str | None) -> dict[str, Any] | None:
    if (checkpoint / SPEC).is_file():
        return _read(checkpoint / SPEC)
    for folder in (checkpoint / str(adapter), checkpoint):
        if (folder / "adapter_config.json").is_file():
            return _read(folder / "adapter_config.json").get("spec")
    if not (checkpoint / "config.json").is_file():
        return None
    parts = with_towers(_read(checkpoint / "config.json"))
    return next((part[KEY] for part in parts if isinstance(part.get(KEY), dict)), None)


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f'"{file}" is not JSON: {error}') from None
