"""Find the layer and head in which the first non-finite number appears, in the forward and backward pass."""

from typing import Any

import torch
from torch import Tensor

from attnswap.distributed import to_local
from attnswap.surgery.parameters import swap_parameters
from attnswap.surgery.patched import gate_hooks

FORWARD = ("query", "output")
BACKWARD = ("gradient of the output", "gradient of the query")


class Watch:
    """Records non-finite numbers in the attention and the gradients of a model, until it is removed.

    Args:
        model: A ``transformers`` model. Of an unpatched one, only the gradients of parameters are recorded.
    """

    def __init__(self, model: Any) -> None:
        self.bad: dict[tuple[int, str], Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        self.swaps: dict[int, dict[str, list[int] | None]] = {}
        self._enters = gate_hooks(model)
        for hook in self._enters:
            hook.watch = self
        own = swap_parameters(model)
        self._handles = [
            p.register_hook(self._parameter(name, name in own))
            for name, p in model.named_parameters()
            if p.requires_grad
        ]

    def remove(self) -> None:
        """Removes all hooks."""
        for hook in self._enters:
            hook.watch = None
        for handle in self._handles:
            handle.remove()

    def __call__(self, call: Any, query: Tensor, output: Tensor, dim: int) -> None:
        """Checks the attention of one layer; called by its attention function.

        Args:
            call: The :class:`~attnswap.surgery.call.LayerCall`.
            query: Shape (batch, heads, queries, head_dim).
            output: The output of attention.
            dim: The dimension of the output that counts heads.
        """
        layer = call.layer
        self.swaps[layer] = {slot.swap.name: slot.heads and list(slot.heads) for slot in call.slots.values()}
        self._note(layer, "query", query, 1)
        self._note(layer, "output", output, dim)
        for name, tensor, heads in (("output", output, dim), ("query", query, 1)):
            if tensor.requires_grad:
                tensor.register_hook(
                    lambda g, name=name, heads=heads: self._note(layer, f"gradient of the {name}", g, heads)
                )

    def _note(self, layer: int, what: str, tensor: Tensor, heads: int) -> None:
        others = [d for d in range(tensor.ndim) if d != heads]
        found = ~torch.isfinite(tensor.detach()).all(dim=others)
        key = (layer, what)
        self.bad[key] = self.bad[key] | found if key in self.bad else found

    def _parameter(self, name: str, own: bool) -> Any:
        def note(gradient: Tensor) -> None:
            local = to_local(gradient)
            finite = torch.isfinite(local.detach())
            # The first dimension of a swap's parameters counts heads.
            self.parameters[name] = ~(
                finite.flatten(1).all(1) if own and local.ndim > 1 else finite if own else finite.all()
            )

        return note

    def first(self) -> dict[str, Any] | None:
        """Returns where the first non-finite number appeared, in the order of computation, or None."""
        layers = sorted({layer for layer, _ in self.bad})
        order = [(layer, what) for layer in layers for what in FORWARD]
        order += [(layer, what) for layer in reversed(layers) for what in BACKWARD]
        for layer, what in order:
            heads = self._heads(layer, what)
            if heads:
                own = {n for n, its in self.swaps[layer].items() if its is None or set(its) & set(heads)}
                return {"layer": layer, "where": what, "heads": heads, "swap": sorted(own) or ["none"]}
        return None

    def _heads(self, layer: int, what: str) -> list[int]:
        return self.bad[layer, what].nonzero().flatten().tolist() if (layer, what) in self.bad else []

    def report(self) -> dict[str, Any]:
        """Returns all recorded non-finite numbers, as plain values."""
        layers = sorted({layer for layer, _ in self.bad})
        return {
            "first": self.first(),
            "layers": {
                str(layer): {what: heads for what in (*FORWARD, *BACKWARD) if (heads := self._heads(layer, what))}
                for layer in layers
            },
            "swap_parameters": {
                name: bad.nonzero().flatten().tolist()
                for name, bad in self.parameters.items()
                if bad.ndim and bad.any()
            },
            "parameters": [name for name, bad in self.parameters.items() if not bad.ndim and bad],
        }

    def summary(self) -> str:
        """Returns a part of a sentence that says where the first non-finite number appeared."""
        found = self.first()
        if found is None:
            return "attention was finite in all layers, so that it began elsewhere, such as in the loss"
        heads = ", ".join(map(str, found["heads"]))
        return (
            f"first in the {found['where']} of layer {found['layer']}, head {heads} (swap: {', '.join(found['swap'])})"
        )
