"""The module that holds the swaps of several adapters on one attention module; at most one of them is active."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from transformers import PreTrainedModel

from attnswap.errors import UnsupportedModelError
from attnswap.surgery.connect import connect, disconnect
from attnswap.surgery.entry import write_spec
from attnswap.surgery.guard import guard, unguard
from attnswap.surgery.module import LayerSwap
from attnswap.surgery.owners import outermost
from attnswap.surgery.patched import before_of
from attnswap.surgery.spec import KEY, PatchSpec, Slot
from attnswap.surgery.stacks import AttentionStack, find_stack


@dataclass
class AdapterSet:
    """The wrappers of one model, and the entry of its config, which names the swaps of the active adapter.

    Attributes:
        base: The base model, in a list: as an attribute of a module it would count as its child.
        empty: The spec without any swap: seam, part and the attention implementation the model had.
        wrappers: The wrapper of each layer.
        written: The adapter that the config names.
    """

    base: list[PreTrainedModel]
    empty: PatchSpec
    wrappers: dict[int, "SwapAdapters"] = field(default_factory=dict)
    written: str | None = None

    def spec(self, name: str | None) -> PatchSpec:
        """Returns the spec of an adapter; without a name, the spec without any swap."""
        slots = {layer: w.slots_of(name) for layer, w in self.wrappers.items()} if name is not None else {}
        return replace(self.empty, layers={layer: found for layer, found in slots.items() if found})

    def names(self) -> set[str]:
        """Returns the names of the adapters."""
        return {name for wrapper in self.wrappers.values() for name in wrapper.modules_to_save}

    def slots(self) -> list[Slot]:
        """Returns the slots of all adapters."""
        return [s for w in self.wrappers.values() for swaps in w.modules_to_save.values() for s in swaps.slots.values()]

    def active(self) -> list[str]:
        """Returns the adapters whose swaps are active: one or none."""
        return list(next(iter(self.wrappers.values())).active_adapters) if self.wrappers else []

    def write(self, name: str | None) -> None:
        """Enters the spec of an adapter into the model's config."""
        if name != self.written:
            self.written = name
            write_spec(self.stack(), self.spec(name))

    def stack(self) -> AttentionStack:
        """Returns the attention modules that have the wrappers."""
        return find_stack(self.base[0], self.empty.part)

    def detach(self) -> None:
        """Removes all wrappers: the model is its unpatched base again."""
        stack = self.stack()
        self.empty = replace(self.empty, before=before_of(stack, self.empty.before))
        disconnect(stack, self.empty.before)
        unguard(outermost(stack.model))

    def attach(self) -> None:
        """Puts the wrappers on the model, in place of swaps that it has."""
        stack = self.stack()
        for layer, (_, module) in stack.modules.items():
            module.add_module(KEY, self.wrappers[layer])
        connect(stack, self.empty.before)
        self.written = next(iter(self.active()), None)
        write_spec(stack, self.spec(self.written))
        guard(outermost(stack.model))


class SwapAdapters(ModulesToSaveWrapper, BaseTunerLayer):
    """The child ``attnswap`` of an attention module whose swaps belong to adapters.

    For peft it is one of the ``modules_to_save``, whose original is a module without swaps. Every adapter has an entry
    in every layer, which may be empty. It is a tuner layer too, because transformers looks only at tuner layers when it
    enables adapters or asks which one is active.
    """

    other_param_names = ("modules_to_save",)  # what is an adapter's, which the empty map of tensors does not tell peft

    def __init__(self, adapters: AdapterSet, layer: int, original: LayerSwap) -> None:
        super().__init__(original, "")
        self.adapters = adapters
        self._active_adapter: list[str] = []
        self._adapters.clear()
        adapters.wrappers[layer] = self

    def update(self, adapter_name: str, tied_module: Any = None, **kwargs: Any) -> None:
        """Does nothing: adapters enter by :meth:`put`, with swaps of their own rather than copies."""

    def put(self, name: str, swaps: LayerSwap) -> None:
        """Adds an adapter's swaps for this layer."""
        self.modules_to_save[name] = swaps.requires_grad_(False)  # until it is made the active one
        self._adapters.add(name)

    def take(self, name: str) -> None:
        """Removes an adapter that is not active."""
        del self.modules_to_save[name]
        self._adapters.remove(name)

    def slots_of(self, name: str) -> dict[str, Slot]:
        """Returns the slots that an adapter has in this layer, at the lambda that their buffers hold."""
        return self.modules_to_save[name].present_slots() if name in self.modules_to_save else {}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Returns nothing: :mod:`attnswap.adapters.reading` finds the tensors, and says what is missing."""
        return {}

    def serving(self) -> LayerSwap:
        """Returns the swaps that are computed when adapters are enabled."""
        return self.modules_to_save[self.active_adapters[0]] if self.active_adapters else self.original_module

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activates the swaps of another adapter, or none if the adapter has none.

        Raises:
            ValueError: Two adapters with swaps would be active at once.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        known = [name for name in names if name in self._adapters]
        super().set_adapter(known, inference_mode)
        self._active_adapter = known
        self.adapters.write(known[0] if known else None)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Removes an adapter's swaps; if it was the active one, those of another adapter are activated, if any."""
        if adapter_name not in self._adapters:
            return
        if adapter_name in self.active_adapters:
            self.set_adapter([name for name in new_active_adapters or () if name != adapter_name])
        self.take(adapter_name)

    def _mixed_batch_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModelError("one batch cannot mix adapters with different swaps (adapter_names=...)")

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> LayerSwap:
        """Returns the active swaps, which then belong to no adapter."""
        return self.serving()

    @property
    def weight(self) -> Any:
        """Raises AttributeError: there is no weight, and tuner layers would look for one inside."""
        raise AttributeError("weight")

    @property
    def bias(self) -> Any:
        """Raises AttributeError: there is no bias."""
        raise AttributeError("bias")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Does nothing: a swap is not a weight, and stays when low-rank weights are merged."""

    def unmerge(self) -> None:
        """Does nothing."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter can be converted into plain LoRA: never."""
        return False
