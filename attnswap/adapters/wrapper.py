"""What holds the swaps of several adapters on one attention module, of which at most one serves."""

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
class Book:
    """What the wrappers of one model share: its config has to name the swaps that serve.

    Attributes:
        base: The base model, in a list: a module would take it for a part of itself.
        empty: The spec without any swap: seam, part and the attention implementation the model had.
        wrappers: The wrapper of each layer.
        written: The adapter that the config names.
    """

    base: list[PreTrainedModel]
    empty: PatchSpec
    wrappers: dict[int, "SwapAdapters"] = field(default_factory=dict)
    written: str | None = None

    def spec(self, name: str | None) -> PatchSpec:
        """Returns what an adapter does to its base; without a name, nothing."""
        slots = {layer: w.slots_of(name) for layer, w in self.wrappers.items()} if name is not None else {}
        return replace(self.empty, layers={layer: found for layer, found in slots.items() if found})

    def names(self) -> set[str]:
        """Returns the names of the adapters."""
        return {name for wrapper in self.wrappers.values() for name in wrapper.modules_to_save}

    def slots(self) -> list[Slot]:
        """Returns the slots of all adapters."""
        return [s for w in self.wrappers.values() for swaps in w.modules_to_save.values() for s in swaps.slots.values()]

    def active(self) -> list[str]:
        """Returns the adapters whose swaps serve: one or none."""
        return list(next(iter(self.wrappers.values())).active_adapters) if self.wrappers else []

    def write(self, name: str | None) -> None:
        """Enters what an adapter does into the model's config."""
        if name != self.written:
            self.written = name
            write_spec(self.stack(), self.spec(name))

    def stack(self) -> AttentionStack:
        """Returns the attention modules that have the wrappers."""
        return find_stack(self.base[0], self.empty.part)

    def detach(self) -> None:
        """Takes all wrappers off the model, which then is what it was."""
        stack = self.stack()
        self.empty = replace(self.empty, before=before_of(stack, self.empty.before))
        disconnect(stack, self.empty.before)
        unguard(outermost(stack.model))

    def attach(self) -> None:
        """Puts the wrappers on the model, in place of swaps that are on it."""
        stack = self.stack()
        for layer, (_, module) in stack.modules.items():
            module.add_module(KEY, self.wrappers[layer])
        connect(stack, self.empty.before)
        self.written = next(iter(self.active()), None)
        write_spec(stack, self.spec(self.written))
        guard(outermost(stack.model))


class SwapAdapters(ModulesToSaveWrapper, BaseTunerLayer):
    """The child ``attnswap`` of an attention module whose swaps belong to adapters.

    To peft it is one of the ``modules_to_save``, with a layer without swaps as the original; every adapter has an entry
    in every layer, if only an empty one. It counts as a tuner layer too, because transformers goes by these alone when
    it enables adapters again or asks which one is active.
    """

    other_param_names = ("modules_to_save",)  # what is an adapter's, which the empty map of tensors does not tell peft

    def __init__(self, book: Book, layer: int, original: LayerSwap) -> None:
        super().__init__(original, "")
        self.book = book
        self._active_adapter: list[str] = []
        self._adapters.clear()
        book.wrappers[layer] = self

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
        """Returns the swaps that serve when adapters are enabled."""
        return self.modules_to_save[self.active_adapters[0]] if self.active_adapters else self.original_module

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Lets another adapter's swaps serve; none, where no adapter of that name brought any.

        Raises:
            ValueError: Two adapters with swaps shall be active at once.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        known = [name for name in names if name in self._adapters]
        super().set_adapter(known, inference_mode)
        self._active_adapter = known
        self.book.write(known[0] if known else None)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Removes an adapter's swaps; if it was the active one, another's serve or none."""
        if adapter_name not in self._adapters:
            return
        if adapter_name in self.active_adapters:
            self.set_adapter([name for name in new_active_adapters or () if name != adapter_name])
        self.take(adapter_name)

    def _mixed_batch_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModelError("one batch cannot mix adapters with different swaps (adapter_names=...)")

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> LayerSwap:
        """Returns the swaps that serve, which are no longer an adapter's then."""
        return self.serving()

    @property
    def weight(self) -> Any:
        """There is none, which tuner layers otherwise look for inside."""
        raise AttributeError("weight")

    @property
    def bias(self) -> Any:
        """There is none."""
        raise AttributeError("bias")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Does nothing: a swap is no weight, and stays as it is when low-rank weights are merged."""

    def unmerge(self) -> None:
        """Does nothing."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether plain LoRA could say the same."""
        return False
