"""lambda over training steps, and lambda as a checkpoint has it."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import attnswap
from attnswap.errors import CheckpointError, ConfigError
from attnswap.surgery.body import base_of
from attnswap.surgery.entry import is_patched
from attnswap.surgery.move import follow
from attnswap.surgery.patched import patched_stacks, spec_of, stacks_of
from attnswap.surgery.spec import KEY, PatchSpec, Slot, read_entry, with_towers, write_entry
from attnswap.training.sections import RampSection

SPEC = "attnswap.json"


Ramps = float | dict[int, float | tuple[float, ...]]
"""lambda of every swap, or of each layer, or of each head of a layer's swaps."""


class RampSchedule(TrainerCallback):
    """Moves lambda of every swap with the step.

    A run that is resumed under :func:`attnswap.training.protect` goes on at the value of its step; a plain trainer's is
    refused where its checkpoint has another lambda than the model.

    Args:
        schedule: Steps until every lambda is ``end``; or a function from the number of a step, counted from 1, to its
            lambda (or what :func:`attnswap.set_ramp` takes).
        start: lambda before the first step.
        end: lambda from the last of those steps on.
        shape: ``"linear"``, ``"geometric"`` or ``"cosine"``; this and the rest as in
            :class:`attnswap.training.RampSection`.
        layers: Which layers move first.
        heads: Whether the heads of a layer move together.
        spread: Share of the steps over which the layers or heads begin.
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
        """Returns what lambda is at a step."""
        if callable(self.schedule):
            return self.schedule(step)
        return ramps(self.section, step / max(self.schedule, 1), model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warns of a run that ends before lambda does."""
        if not callable(self.schedule) and state.max_steps < self.schedule:
            warnings.warn(
                f"RampSchedule: lambda takes {self.schedule} steps to {self.section.end}, and the run ends after "
                f"{state.max_steps}: its model will be on the way there",
                stacklevel=2,
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the value of the step to come."""
        if 0 < state.max_steps <= state.global_step:  # resumed at the end
            return
        model = base_of(kwargs["model"])
        attnswap.set_ramp(model, self.at(state.global_step + 1, model))


def ramps(section: RampSection, progress: float, model: PreTrainedModel) -> Ramps:
    """Returns lambda of every swap of a model at some point of a ramp.

    Args:
        section: The ramp.
        progress: Steps done over the steps of the ramp.
        model: A patched model.
    """
    if section.layers == section.heads == "together":
        return _along(section, progress)
    spec = spec_of(model)
    assert spec is not None
    stack = stacks_of(model)[0]
    info = stack.info(stack.layers[0])
    order = sorted(spec.layers, reverse=section.layers == "last to first")
    groups = info.heads // info.kv_heads
    found: dict[int, float | tuple[float, ...]] = {}
    for layer, slots in spec.layers.items():
        rank = 0 if section.layers == "together" else order.index(layer)
        count = 1 if section.layers == "together" else len(order)
        if section.heads == "together":
            found[layer] = _along(section, progress, rank, count)
            continue
        (heads,) = {slot.count(info.heads) for slot in slots.values()} if _alike(slots, info.heads) else {0}
        if not heads:
            raise ConfigError(f"ramp.heads: the swaps of layer {layer} have different numbers of heads: set together")
        # Heads that share keys and values move together, for some swaps keep a value for both.
        parts = -(-heads // groups)
        found[layer] = tuple(_along(section, progress, rank * parts + h // groups, count * parts) for h in range(heads))
    return found


def _alike(slots: dict[str, Slot], heads: int) -> bool:
    return len({slot.count(heads) for slot in slots.values()}) == 1


def _along(section: RampSection, progress: float, rank: int = 0, count: int = 1) -> float:
    """Returns lambda of the one that begins as number ``rank`` of ``count``."""
    if count > 1:
        progress = (progress - section.spread * rank / (count - 1)) / (1 - section.spread)
    if progress >= 1:
        return section.end
    if progress <= 0:
        return section.start
    if section.shape == "geometric":
        first = section.start or section.least
        return first * (section.end / first) ** progress
    share = progress if section.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return section.start + (section.end - section.start) * share


def follow_checkpoint(model: Any, checkpoint: Path) -> None:
    """Moves lambda of a model's swaps to where a checkpoint has it, which its tensors alone cannot do.

    Args:
        model: A patched model, or one with swap adapters. Others are left alone.
        checkpoint: A folder with a config.json or an adapter_config.json.

    Raises:
        CheckpointError: The checkpoint's entry is damaged or of other swaps.
    """
    base = base_of(model)
    if not isinstance(base, PreTrainedModel) or not is_patched(base):
        return
    specs = _specs_in(checkpoint, getattr(model, "active_adapter", None))
    if specs:
        follow(base, specs)


def note_ramps(model: Any, checkpoint: Path) -> None:
    """Writes what the swaps of a model are into a checkpoint: those of sharded models hold no config."""
    base = base_of(model)
    found = patched_stacks(base) if isinstance(base, PreTrainedModel) else []
    if found:
        entry = write_entry([spec for _, spec in found])
        (checkpoint / SPEC).write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")


def _specs_in(checkpoint: Path, adapter: str | None) -> list[PatchSpec]:
    """Returns the specs of all parts that a checkpoint swaps, as its files have them."""
    if (checkpoint / SPEC).is_file():
        return read_entry(_read(checkpoint / SPEC))
    for folder in (checkpoint / str(adapter), checkpoint):
        if (folder / "adapter_config.json").is_file():
            entry = _read(folder / "adapter_config.json").get("spec")
            return [] if entry is None else read_entry(entry)
    if not (checkpoint / "config.json").is_file():
        return []
    towers = with_towers(_read(checkpoint / "config.json"))
    return [spec for tower in towers if isinstance(entry := tower.get(KEY), dict) for spec in read_entry(entry)]


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f'"{file}" is not JSON: {error}') from None
    if not isinstance(values, dict):
        raise CheckpointError(f'"{file}" is damaged: it holds no names and values')
    return values
