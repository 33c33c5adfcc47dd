"""The patched stacks of a model: which they are, and what their modules hold.

The entry in a config says which stacks those are. Which swaps they have, and at which lambda, is read from the modules.
"""

from collections.abc import Iterator
from dataclasses import replace

from transformers import PreTrainedModel

from attnswap.errors import CheckpointError, ConfigError
from attnswap.surgery.entry import entries_of
from attnswap.surgery.module import child_of
from attnswap.surgery.seam import GateHook, gate_hook_of, route_of
from attnswap.surgery.spec import KEY, PatchSpec, Slot, read_entry
from attnswap.surgery.stacks import AttentionStack, find_stack, refuse_half, refuse_own_parts


def written_stacks(model: PreTrainedModel, loading: bool = False) -> list[tuple[AttentionStack, PatchSpec]]:
    """Returns the stacks that the entries of a model's configs name, with the specs as they were written.

    Args:
        model: The model.
        loading: As in :func:`attnswap.surgery.entry.entries_of`.

    Raises:
        CheckpointError: An entry is damaged, or two entries name the same attention.
        ConfigError: It names attention that the model does not have.
    """
    found: list[tuple[AttentionStack, PatchSpec]] = []
    for config, entry, saved in entries_of(model, loading):
        for spec in read_entry(entry):
            own = config is getattr(model, "config", None)
            stack = find_stack(model, spec.part, None if own else config, saved=saved)
            shared = [other for other, _ in found if stack.shares(other)]
            again = [other for other in shared if other.part == stack.part and len(other.modules) == len(stack.modules)]
            if shared and not again:
                raise CheckpointError(
                    f"the attnswap entry of config.json names {stack.name} twice, as parts {shared[0].part!r} and "
                    f"{stack.part!r}: was it edited?"
                )
            if not shared:  # else the config of a half of the model, which repeats the entry of the whole
                found.append((stack, spec))
    return found


def patched_stacks(model: PreTrainedModel, read: bool = True) -> list[tuple[AttentionStack, PatchSpec]]:
    """Returns the stacks of a model that are patched, with what their modules hold now; none if it is not patched.

    Args:
        model: Any model.
        read: Whether to read lambda from its buffers; if not, it is as it was read last.

    Raises:
        NumericsError: A buffer holds no lambda.
    """
    return [(stack, _present(stack, spec, read)) for stack, spec in written_stacks(model)]


def _present(stack: AttentionStack, written: PatchSpec, read: bool) -> PatchSpec:
    swaps = {layer: child_of(module) for layer, (_, module) in stack.modules.items()}
    held = {i: child.present_slots() if read else child.slots for i, child in swaps.items() if child is not None}
    layers = {layer: slots for layer, slots in held.items() if slots}
    return replace(written, before=before_of(stack, written.before), layers=layers)


def stacks_of(model: PreTrainedModel) -> list[AttentionStack]:
    """Returns the stacks that are patched, or the one that would be by default."""
    return [stack for stack, _ in written_stacks(model)] or [find_stack(model)]


def spec_of(model: PreTrainedModel, read: bool = True) -> PatchSpec | None:
    """Returns what was done to a model of which one part is patched, or None if it is not patched.

    Args:
        model: Any model.
        read: As in :func:`patched_stacks`.

    Raises:
        ConfigError: Several parts of the model are patched.
    """
    found = patched_stacks(model, read)
    if len(found) > 1:
        raise ConfigError(
            f"several parts of this {type(model).__name__} are patched ({', '.join(s.name for s, _ in found)}), "
            "where one is expected"
        )
    return found[0][1] if found else None


def slots_of(model: PreTrainedModel) -> Iterator[tuple[AttentionStack, int, str, Slot]]:
    """Yields every slot of a model with its stack, layer and name, at the lambda that its buffer holds."""
    for stack, spec in patched_stacks(model):
        for layer, slots in spec.layers.items():
            for name, slot in slots.items():
                yield stack, layer, name, slot


def before_of(stack: AttentionStack, written: str) -> str:
    """Returns the attention implementation that layers without swaps run on.

    Args:
        stack: The attention modules.
        written: The one the model had when it was patched, for modules that are not connected.
    """
    route = route_of(stack.siblings)
    return written if route is None else route.before


def gate_hooks(model: PreTrainedModel) -> list[GateHook]:
    """Returns the pre-forward hooks of a patched model's attention modules; none if it is not patched."""
    modules = (module for stack, _ in written_stacks(model) for _, module in stack.modules.values())
    return [hook for module in modules if (hook := gate_hook_of(module)) is not None]


def open_stack(model: PreTrainedModel, part: str | None, whole: PreTrainedModel) -> tuple[AttentionStack, PatchSpec]:
    """Returns the attention that a user wants to patch, with the spec of the swaps that it has already.

    Args:
        model: The model, patched already or not.
        part: As in :func:`attnswap.patch`.
        whole: The outermost model around it, or the model itself.

    Raises:
        ConfigError: There is no such attention or several, the model's swaps belong to adapters, or a part of the
            attention is patched already as another part of the model.
        UnsupportedModelError: The attention cannot be served.
    """
    refuse_adapters(model)
    known = patched_stacks(model)
    refuse_own_parts([stack for stack, _ in known])
    if part is None and known:
        if len(known) > 1:
            raise ConfigError(
                "several parts of this model are patched: choose part= from "
                + ", ".join(f'"{stack.name}"' for stack, _ in known)
            )
        return known[0]
    stack = find_stack(model, part)
    for other, spec in known:
        shared = stack.shares(other)
        if len(shared) == len(stack.modules) == len(other.modules):
            return other, spec
        if shared:
            raise ConfigError(
                f"part={part!r}: layer {min(shared)} of it is patched already as a layer of another part "
                f'("{other.name}"); name that part, or call attnswap.unpatch first'
            )
    refuse_half(stack, whole)
    before = before_of(stack, stack.config._attn_implementation)
    return stack, PatchSpec(before, seam=stack.seam, part=part)


def refuse_adapters(model: PreTrainedModel) -> None:
    """Refuses to change swaps that belong to adapters.

    Raises:
        ConfigError: The model's swaps do.
    """
    if any(hasattr(module._modules.get(KEY), "serving") for module in model.modules()):
        raise ConfigError(
            "this model's swaps belong to peft adapters: add, switch and remove them with peft (unload() gives the "
            "base model back)"
        )
