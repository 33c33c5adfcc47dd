"""The parameters that patching added, by name and as groups for an optimizer."""

from typing import Any

from torch import nn

from attnswap.surgery.module import SwapModule


def swap_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that patching added, by their names in the model."""
    found: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, SwapModule):
            found |= {f"{prefix}.{name}": p for name, p in module.named_parameters()}
    return found


def parameter_groups(
    model: nn.Module, *, lr: float = 1e-4, weight_decay: float = 0.0, swap_lr_multiplier: float = 10.0
) -> list[dict[str, Any]]:
    """Returns optimizer parameter groups: the swaps' parameters get a higher learning rate and no weight decay.

    Args:
        model: A model, patched or not.
        lr: Learning rate of the model's own weights.
        weight_decay: Weight decay of the model's own matrices; vectors (norms, biases) have none.
        swap_lr_multiplier: Learning rate of the swaps' parameters divided by ``lr``.

    Returns:
        Groups for a ``torch`` optimizer, each with a ``"name"``; frozen parameters and empty groups are left out.
    """
    ours = {id(p) for p in swap_parameters(model).values()}
    free = [p for p in model.parameters() if p.requires_grad]
    groups = [
        ("matrices", [p for p in free if id(p) not in ours and p.ndim > 1], lr, weight_decay),
        ("vectors", [p for p in free if id(p) not in ours and p.ndim <= 1], lr, 0.0),
        ("swap", [p for p in free if id(p) in ours], lr * swap_lr_multiplier, 0.0),
    ]
    return [{"name": n, "params": p, "lr": rate, "weight_decay": d} for n, p, rate, d in groups if p]
