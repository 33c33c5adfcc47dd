"""The child module of an attention module that holds its slots: learned tensors, lambda, and the gates' forward."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnswap.errors import UnsupportedModelError
from attnswap.surgery.ramps import check_form, mark, slot_at
from attnswap.surgery.spec import KEY, Slot
from attnswap.swaps.base import ModelInfo


class SwapModule(nn.Module):
    """The parameters of one slot.

    All its tensors stay fp32 whatever the model is cast to, and everything is computed in ``forward``, so that
    offloading, sharding and wrapping by other libraries see an ordinary module.

    Args:
        slot: The swap and the heads it serves.
        info: The layer it goes into.
        device: Where to create the tensors.
    """

    def __init__(self, slot: Slot, info: ModelInfo, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.swap = slot.swap
        self.initial_ramp = slot.ramp
        self.read: tuple[int, int] | None = None  # mark of the buffer when lambda was read last
        heads = slot.count(info.heads)
        groups = info.heads // info.kv_heads
        sizes = {"heads": heads, "kv_heads": max(1, heads // groups), "hidden": info.hidden}
        sizes |= {} if info.value_dim is None else {"value_dim": info.value_dim}
        self.starts: dict[str, tuple[float | Tensor, float]] = {}
        chosen = range(info.heads) if slot.heads is None else slot.heads
        for name, feature in slot.swap.features().items():
            if feature.per == "head":
                count = sizes["heads" if feature.heads == "query" else "kv_heads"]
                self._add(name, feature.shape(1, count, 0, 0, info.value_dim or 0), device)
                initial: Any = feature.initial or 0.0
                start = feature.start(_owners(chosen, feature.heads, groups)) if isinstance(initial, tuple) else initial
                self.starts[name] = (start, feature.std)
        for name, parameter in slot.swap.gate_parameters().items():
            self._add(name, tuple(size if isinstance(size, int) else sizes[size] for size in parameter.shape), device)
            self.starts[name] = (parameter.initial, parameter.std)
        self._per_head = (heads,)
        self.ramp: Tensor
        self.register_buffer("ramp", torch.tensor(slot.ramp, dtype=torch.float32, device=device))
        self.set_start()

    def _add(self, name: str, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device)))

    @torch.no_grad()
    def set_start(self, fill: Callable[[Tensor, float | Tensor, float], Any] | None = None) -> None:
        """Sets every parameter to its initial value, and lambda to the value it was patched with.

        Args:
            fill: Called with each parameter, its mean (a tensor where it differs between heads, which then comes with
                no deviation) and its deviation; default: fills it in place.
        """
        for name, (initial, std) in self.starts.items():
            (fill or _fill)(self.get_parameter(name), initial, std)
        if not self.ramp.is_meta:
            self.ramp.copy_(torch.tensor(self.initial_ramp, dtype=torch.float32, device="cpu"))

    def forward(self, hidden_states: Tensor) -> dict[str, Tensor]:
        """Computes the slot's features.

        Args:
            hidden_states: What enters the attention module, shape (batch, tokens, hidden).

        Returns:
            The swap's features by name and the ramp as ``"ramp"``, in fp32.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            gate_names = self.swap.gate_parameters()
            # FSDP2 hands out 16-bit copies of its fp32 parameters where its policy says so.
            # torch.func.functional_call puts plain tensors in their place.
            learned: dict[str, Tensor] = {k: getattr(self, k).float() for k in self.starts}
            features = {k: x for k, x in learned.items() if k not in gate_names}
            if gate_names:
                gates = {k: learned[k] for k in gate_names}
                features |= self.swap.gates(hidden_states.float(), gates)
        return {**features, "ramp": self.ramp}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SwapModule":
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in (*self._parameters, "ramp"):  # a state dict that is assigned rather than copied stays fp32 too
            if f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}{name}"] = state_dict[f"{prefix}{name}"].float()
        saved = state_dict.get(f"{prefix}ramp")
        if saved is not None and saved.shape != self.ramp.shape and saved.shape in ((), self._per_head):
            self.ramp = saved.new_empty(saved.shape, device=self.ramp.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Shows the config in the model's printout."""
        return repr(self.swap)


def _owners(heads: Iterable[int], kind: str, groups: int) -> list[int]:
    """Returns the heads of a kind that own some query heads: these, or the key/value heads that they read."""
    return list(heads) if kind == "query" else list(dict.fromkeys(head // groups for head in heads))


def _fill(tensor: Tensor, mean: float | Tensor, std: float) -> None:
    if tensor.is_meta:
        return
    if isinstance(mean, Tensor):
        tensor.copy_(mean.to(tensor.device))
    elif std:
        tensor.normal_(mean, std)
    else:
        tensor.fill_(mean)


class LayerSwap(nn.Module):
    """The slots of one attention module; lives there as the child ``attnswap``.

    Not an ``nn.ModuleDict``, which peft does not take among its ``modules_to_save``.

    Attributes:
        info: The layer's sizes.
        slots: The static part of each slot, by name.
    """

    def __init__(self, info: ModelInfo) -> None:
        super().__init__()
        self.info = info
        self.slots: dict[str, Slot] = {}

    def add(self, name: str, slot: Slot, device: torch.device | str | None) -> None:
        """Adds a slot with fresh parameters."""
        self.add_module(name, SwapModule(slot, self.info, device))
        self.slots = {**self.slots, name: slot}

    @torch.no_grad()
    def set_ramp(self, name: str, moved: Slot) -> None:
        """Gives a slot another lambda."""
        module, value = self.get_submodule(name), torch.tensor(moved.ramp, dtype=torch.float32)
        ramp = module.get_buffer("ramp")
        if (ramp.shape, ramp.dtype) == (value.shape, value.dtype) and not ramp.is_inference():
            ramp.copy_(value)  # in place: trainers and wrappers hold on to a model's buffers
        else:
            module.register_buffer("ramp", value.to(ramp.device))
        self.slots = {**self.slots, name: moved}

    def slots_at(self, features: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Slot]:
        """Returns the slots at the lambda that their buffers hold now.

        Args:
            features: What :meth:`forward` gave, here or on a copy of this module.
        """
        found = {name: self._slot_at(name, features[name]["ramp"]) for name in self.slots}
        if not torch.compiler.is_compiling() and any(found[name] is not slot for name, slot in self.slots.items()):
            self.slots = found
        return found

    def _slot_at(self, name: str, ramp: Tensor) -> Slot:
        slot = self.slots[name]
        if torch.compiler.is_compiling():
            return slot_at(slot, ramp)
        module: Any = self._modules[name]
        now = mark(ramp)
        found = slot_at(slot, ramp, known=now is not None and now == module.read)
        if found is not slot or ramp.ndim:
            check_form(found, ramp, self.info)
        module.read = now
        return found

    def present_slots(self) -> dict[str, Slot]:
        """Returns the slots at the lambda that the buffers of this module hold now."""
        for module in self.children():
            module.read = None  # type: ignore[assignment]  # on an accelerator too, where a forward does not wait
        return self.slots_at({name: {"ramp": self.get_submodule(name).get_buffer("ramp")} for name in self.slots})

    def drop(self, name: str) -> None:
        """Removes a slot and its parameters."""
        self.slots = {other: slot for other, slot in self.slots.items() if other != name}
        del self._modules[name]

    def forward(self, hidden_states: Tensor) -> dict[str, dict[str, Tensor]]:
        """Computes the features of every slot, by slot name.

        Raises:
            UnsupportedModelError: The hidden states have another width than the config says.
        """
        if hidden_states.shape[-1] != self.info.hidden and any(s.swap.gate_parameters() for s in self.slots.values()):
            raise UnsupportedModelError(
                f"hidden states of {hidden_states.shape[-1]} numbers enter this attention, but the model's config says "
                f"{self.info.hidden}; gates over hidden states do not fit here"
            )
        return {name: module(hidden_states) for name, module in self.named_children()}


def add_slot(module: nn.Module, info: ModelInfo, name: str, slot: Slot) -> None:
    """Adds a slot with fresh parameters to an attention module.

    Args:
        module: The attention module.
        info: The layer's sizes.
        name: The name of the slot.
        slot: The swap, its heads and lambda.
    """
    child = child_of(module)
    if child is None:
        child = LayerSwap(info)
        child.train(module.training)
        module.add_module(KEY, child)
    # Under a meta device context some models make a few parameters elsewhere; the first need not be among the rest.
    device = min((p.device for p in module.parameters()), key=lambda d: d.type != "meta", default=torch.device("cpu"))
    child.add(name, slot, device)


def child_of(module: nn.Module) -> LayerSwap | None:
    """Returns the layer's swaps, through the wrapper of another library if there is one."""
    child = module._modules.get(KEY)
    serving = getattr(child, "serving", None)  # of the adapters on this layer
    if callable(serving):
        return serving()
    if hasattr(child, "modules_to_save"):  # of plain peft: a frozen original, and a copy for each adapter
        active: Any = child
        names = [name for name in active.active_adapters if name in active.modules_to_save]
        child = active.modules_to_save[names[0]] if names else active.original_module
    while child is not None and not isinstance(child, LayerSwap):
        child = next(iter(child.children()), None)
    return child


def children_of(module: nn.Module) -> list[LayerSwap]:
    """Returns every copy of a layer's swaps; wrappers of other libraries keep a frozen and a trained one."""
    child = module._modules.get(KEY)
    if hasattr(child, "serving"):
        return [one] if (one := child_of(module)) else []
    return [] if child is None else [c for c in child.modules() if isinstance(c, LayerSwap)]
