"""lambda as a function of the training step, and lambda in checkpoints."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import attnswap
from attnswap.errors import CheckpointError, ConfigError
from attnswap.surgery.body import base_of
from attnswap.surgery.entry import is_patched
from attnswap.surgery.move import follow
from attnswap.surgery.patched import patched_stacks, spec_of, stacks_of
from attnswap.surgery.spec import KEY, PatchSpec, read_entry
from attnswap.training.sections import RampSection

SPEC = "attnswap.json"
ENTRIES = "entries"
"""The key under which that file has the entries of several parts."""


Ramps = float | dict[int, float | tuple[float, ...]]
"""One lambda for all swaps, or one for each layer, or one for each head of a layer."""


class RampSchedule(TrainerCallback):
    """Sets lambda of all swaps in each training step.

    With :func:`attnswap.training.protect`, a resumed run continues with the lambda of its step. Without it, resuming
    raises an error if the checkpoint and the model have different lambdas.

    Args:
        schedule: Number of steps until every lambda is ``end``. Or a function from a step, counted from 1, to lambda or
            any other argument of :func:`attnswap.set_ramp`.
        start: lambda before the first step.
        end: lambda after the last step.
        shape: ``"linear"``, ``"geometric"`` or ``"cosine"``; for this and the following arguments see
            :class:`attnswap.training.RampSection`.
        layers: Whether layers move together, or one after another.
        heads: Whether the heads of a layer move together, or one after another.
        spread: Share of the steps over which the starts of layers or heads are spread.
    """

    def __init__(
        self,
        schedule: int | Callable[[int], Any],
        start: float = 0.0,
        end: float = 1.0,
        *,
        shape: Literal["geometric", "linear", "cosine"] = "linear",
        layers: Literal["together", "first to last", "last to first"] = "together",
        heads: Literal["together", "one by one"] = "together",
        spread: float = 0.5,
    ) -> None:
        self.schedule = schedule
        self.section = RampSection(start, end, 1.0, shape, layers=layers, heads=heads, spread=spread)

    def at(self, step: int, model: PreTrainedModel) -> Any:
        """Returns lambda of a step, as an argument of :func:`attnswap.set_ramp`."""
        if callable(self.schedule):
            return self.schedule(step)
        return ramp_at(self.section, step / max(self.schedule, 1), model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warns if the run ends before lambda reaches its end."""
        if not callable(self.schedule) and state.max_steps < self.schedule:
            warnings.warn(
                f"RampSchedule: lambda reaches {self.section.end} after {self.schedule} steps, but the run ends after "
                f"{state.max_steps}, so that the model will not compute its swap fully: shorten the schedule",
                stacklevel=2,
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets lambda of the step."""
        if 0 < state.max_steps <= state.global_step:  # resumed after the last step
            return
        model = base_of(kwargs["model"])
        attnswap.set_ramp(model, self.at(state.global_step + 1, model))


def ramp_at(section: RampSection, progress: float, model: PreTrainedModel) -> Ramps:
    """Returns lambda of all swaps of a model at some point of a ramp.

    Args:
        section: The ramp.
        progress: Share of the ramp's steps that are done.
        model: A patched model.
    """
    if section.layers == section.heads == "together":
        return _value_at(section, progress)
    spec = spec_of(model)
    assert spec is not None
    stack = stacks_of(model)[0]
    info = stack.info(stack.layers[0])
    order = sorted(spec.layers, reverse=section.layers == "last to first")
    groups = info.heads // info.kv_heads
    found: dict[int, float | tuple[float, ...]] = {}
    for layer, slots in spec.layers.items():
        place = 0 if section.layers == "together" else order.index(layer)
        count = 1 if section.layers == "together" else len(order)
        if section.heads == "together":
            found[layer] = _value_at(section, progress, place, count)
            continue
        counts = {slot.count(info.heads) for slot in slots.values()}
        if len(counts) > 1:
            raise ConfigError(
                f"ramp.heads: the swaps of layer {layer} have different numbers of heads, so that their heads cannot "
                "move one by one: set heads: together"
            )
        (heads,) = counts
        # Heads that share keys and values move together, since some swaps have one parameter for all of them.
        parts = -(-heads // groups)
        found[layer] = tuple(
            _value_at(section, progress, place * parts + head // groups, count * parts) for head in range(heads)
        )
    return found


def _value_at(section: RampSection, progress: float, place: int = 0, count: int = 1) -> float:
    """Returns lambda of the layer or head that starts as number ``place`` of ``count``."""
    if count > 1:
        progress = (progress - section.spread * place / (count - 1)) / (1 - section.spread)
    if progress >= 1:
        return section.end
    if progress <= 0:
        return section.start
    if section.shape == "geometric":
        first = section.start or section.least
        return first * (section.end / first) ** progress
    share = progress if section.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return section.start + (section.end - section.start) * share


def load_ramps(model: Any, checkpoint: Path) -> None:
    """Sets lambda of a model's swaps to that of a checkpoint.

    Args:
        model: A patched model, or one with swap adapters. Other models are not changed.
        checkpoint: A folder with a config.json or an adapter_config.json.

    Raises:
        CheckpointError: The checkpoint's description of the swaps is damaged, or is of other swaps.
    """
    base = base_of(model)
    if not isinstance(base, PreTrainedModel) or not is_patched(base):
        return
    specs = _specs_in(checkpoint, getattr(model, "active_adapter", None), base.config)
    if specs:
        follow(base, specs)


def save_ramps(model: Any, checkpoint: Path) -> None:
    """Writes the spec of a model's swaps into a checkpoint, since checkpoints of sharded models have no config."""
    base = base_of(model)
    found = patched_stacks(base) if isinstance(base, PreTrainedModel) else []
    if found:
        # Towers that were patched as models of their own may have the same part, which one entry cannot name twice.
        entries = [spec.to_dict() for _, spec in found]
        values = entries[0] if len(entries) == 1 else {ENTRIES: entries}
        (checkpoint / SPEC).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _specs_in(checkpoint: Path, adapter: str | None, config: PreTrainedConfig) -> list[PatchSpec]:
    """Returns the specs of all parts that a checkpoint swaps, in the order of the model's towers."""
    if (checkpoint / SPEC).is_file():
        values = _read(checkpoint / SPEC)
        entries = values[ENTRIES] if isinstance(values.get(ENTRIES), list) else [values]
        return [spec for entry in entries for spec in read_entry(entry)]
    for folder in (checkpoint / str(adapter), checkpoint):
        if (folder / "adapter_config.json").is_file():
            entry = _read(folder / "adapter_config.json").get("spec")
            return [] if entry is None else read_entry(entry)
    if not (checkpoint / "config.json").is_file():
        return []
    values = _read(checkpoint / "config.json")
    names = [name for name, tower in vars(config).items() if isinstance(tower, PreTrainedConfig)]
    towers = [values, *(tower for name in names if isinstance(tower := values.get(name), dict))]
    return [spec for tower in towers if isinstance(entry := tower.get(KEY), dict) for spec in read_entry(entry)]


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f'"{file}" is not JSON: {error}') from None
    if not isinstance(values, dict):
        raise CheckpointError(f'"{file}" is damaged: it is not a JSON object')
    return values
