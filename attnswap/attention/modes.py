"""What torch does around a call: transforms of ``torch.func`` and forward-mode derivatives.

Kernels with a backward pass of their own take part in neither: they would read through a transform's wrappers, or leave
a tangent behind, and give a derivative of 0. Plain torch operations do.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def transformed() -> bool:
    """Whether a transform of ``torch.func``, such as grad, jvp or vmap, is running."""
    return bool(torch._C._are_functorch_transforms_active())


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode AD differentiates by a tensor."""
    return unpack_dual(x).tangent is not None


def differentiated(x: Tensor) -> bool:
    """Whether a derivative by a tensor may be asked for, so that its value alone decides nothing."""
    return x.requires_grad or transformed() or has_tangent(x)


def mode_of(tensors: Iterable[Tensor]) -> str | None:
    """Names what goes on around a computation with some tensors, for a message; None: nothing."""
    if transformed():
        return "the transforms of torch.func (grad, jvp, vmap, ...)"
    return "forward-mode derivatives" if any(has_tangent(x) for x in tensors) else None


def plain(x: Tensor) -> Tensor:
    """Returns what a tensor holds under all transforms: under ``vmap`` for every sample at once.

    A look at values may decide how something is computed, not what.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x
