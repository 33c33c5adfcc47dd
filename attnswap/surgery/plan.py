"""What one call of ``patch`` adds to a stack, checked before anything is changed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from attnswap.errors import ConfigError
from attnswap.surgery.patched import open_stack
from attnswap.surgery.select import LayersLike, check_keys, check_stages, fitting_heads, select_layers
from attnswap.surgery.spec import PatchSpec, Slot
from attnswap.surgery.stacks import AttentionStack
from attnswap.swaps import Swap, resolve
from attnswap.swaps.base import ModelInfo

HeadsLike = Iterable[int] | int | None


@dataclass
class Plan:
    """The slots that are to be added to a stack.

    Attributes:
        stack: The attention modules.
        spec: All slots of the stack: those it has, and those that are added.
        added: The new slots by layer and name.
    """

    stack: AttentionStack
    spec: PatchSpec
    added: dict[int, dict[str, Slot]] = field(default_factory=dict)

    def add(self, layer: int, slot: Slot, info: ModelInfo) -> None:
        """Adds a slot to a layer.

        Raises:
            ConfigError: One of its heads has a swap already.
        """
        present = self.spec.layers.get(layer, {})
        _check_free(layer, slot, present, info)
        name = _slot_name(slot.swap, present)
        self.spec = self.spec.with_slot(layer, name, slot)
        self.added.setdefault(layer, {})[name] = slot


def make_plan(
    model: PreTrainedModel,
    whole: PreTrainedModel,
    part: str | None,
    wanted: list[tuple[Swap, HeadsLike]],
    layers: LayersLike,
    ramp: float,
) -> Plan:
    """Checks what a user asks for and returns what is to be added.

    Args:
        model: The model, patched already or not.
        whole: The outermost model around it, or the model itself.
        part: As in :func:`attnswap.patch`.
        wanted: Swaps with their heads.
        layers: As in :func:`attnswap.patch`.
        ramp: lambda of the new slots.

    Raises:
        ConfigError: A swap, layer or head does not exist or does not fit, or a head is already swapped.
        UnsupportedModelError: The attention cannot be served.
    """
    stack, spec = open_stack(model, part, whole)
    chosen = select_layers(layers, stack.layers)
    info = stack.info(chosen[0])
    plan = Plan(stack, spec)
    for swap, heads in wanted:
        slot = Slot(swap.bind(info), fitting_heads(swap, heads, info), ramp)
        check_keys(stack, chosen, slot.swap)
        check_stages(stack, slot.swap, info)
        for layer in chosen:
            plan.add(layer, slot, info)
    return plan


def _check_free(layer: int, slot: Slot, present: Mapping[str, Slot], info: ModelInfo) -> None:
    wanted = set(range(info.heads) if slot.heads is None else slot.heads)
    for name, other in present.items():
        taken = wanted & set(range(info.heads) if other.heads is None else other.heads)
        if taken:
            raise ConfigError(
                f'head {min(taken)} of layer {layer} already has the swap "{name}"; unpatch the model first, or choose '
                "other heads or layers"
            )


def _slot_name(swap: Swap, present: Mapping[str, Slot]) -> str:
    base = swap.name.replace("-", "_").replace("+", "_and_")
    names = [base, *(f"{base}_{i}" for i in range(1, len(present) + 1))]
    return next(name for name in names if name not in present)


def swaps_with_heads(swap: Any, heads: HeadsLike) -> list[tuple[Swap, HeadsLike]]:
    """Returns swaps with their heads, from one swap or from a mapping of several.

    Raises:
        ConfigError: A swap does not exist, the mapping is empty, or heads are given twice.
    """
    if isinstance(swap, Mapping) and "name" not in swap:
        if heads is not None:
            raise ConfigError("give heads either in the mapping of swaps or as heads=, not both")
        if not swap:
            raise ConfigError("the mapping of swaps is empty")
        return [(resolve(one), its_heads) for one, its_heads in swap.items()]
    return [(resolve(swap), heads)]
