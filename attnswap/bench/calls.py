"""Build the function call that a case measures, with its tensors and features."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attnswap.attention import attention
from attnswap.attention.dispatch import BACKENDS, choose
from attnswap.bench.cases import Case, Setting
from attnswap.bench.causal import causal_problem
from attnswap.bench.peers import PEERS
from attnswap.errors import UnsupportedModelError
from attnswap.swaps import ModelInfo, Swap, resolve


@dataclass(frozen=True)
class Tensors:
    """The tensors of a setting, which all of its cases share; ``upstream`` is the gradient of the output."""

    query: Tensor
    key: Tensor
    value: Tensor
    upstream: Tensor


def draw_tensors(setting: Setting, seed: int = 0) -> Tensors:
    """Draws standard normal tensors, which require gradients if the setting has a backward pass."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    shape = setting.shape

    def normal(heads: int) -> Tensor:
        size = (setting.batch, heads, setting.length, shape.head_dim)
        return torch.randn(size, generator=generator, device=setting.device).to(setting.torch_dtype)

    query, key, value = (
        normal(heads).requires_grad_(setting.backward) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    return Tensors(query, key, value, upstream=normal(shape.heads))


def draw_features(swap: Swap, case: Case, setting: Setting, seed: int = 0) -> dict[str, Tensor]:
    """Returns fp32 values for the features of a swap, at which the swap differs from softmax.

    Per-head values are their initial value plus 1/4. Per-token values are drawn from (-1/2, 0), which suits logarithms
    of gates and changes of temperature. Values that the case sets take precedence.
    """
    generator, device = torch.Generator(setting.device).manual_seed(seed), setting.device
    found = {}
    for name, feature in swap.features().items():
        heads = setting.shape.heads if feature.heads == "query" else setting.shape.kv_heads
        shape = feature.shape(setting.batch, heads, setting.length, setting.length, setting.shape.head_dim)
        if name in case.fill:
            value = torch.full(shape, case.fill[name], device=device)
        elif feature.per == "head":
            value = (feature.start(range(heads)).float() + 0.25).to(device).expand(shape).clone()
        else:
            value = -torch.rand(shape, generator=generator, device=device) / 2
        found[name] = value.requires_grad_(setting.backward)
    return found


@dataclass(frozen=True)
class TimedCall:
    """A function call to be timed.

    Attributes:
        forward: Computes the output.
        leaves: Tensors whose gradients are computed; empty without a backward pass.
        upstream: Gradient of the output.
        context: Returns a context manager in which the call runs; entering it is not timed.
        backend: Name of the backend, for swaps.
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    upstream: Tensor
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    backend: str | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        """Runs the call and returns the output, and the gradients if there is a backward pass."""
        if not self.leaves:
            with torch.no_grad():
                return (self.forward(),)
        out = self.forward()
        return (out.detach(), *torch.autograd.grad(out, self.leaves, self.upstream, allow_unused=True))


def build(case: Case, setting: Setting, tensors: Tensors, backend: str = "auto") -> TimedCall:
    """Returns the call of a case.

    Args:
        case: The case.
        setting: The setting.
        tensors: The tensors of the setting.
        backend: ``"auto"`` or a name of ``attnswap.attention.dispatch.BACKENDS``, for swaps.

    Raises:
        ConfigError: The backend is unknown or cannot compute the swap.
    """
    q, k, v = tensors.query, tensors.key, tensors.value
    leaves = (q, k, v) if setting.backward else ()
    if case.kind == "sdpa":
        return TimedCall(lambda: sdpa(q, k, v), leaves, tensors.upstream, context=flash_only)
    shape, features = setting.shape, {}
    if case.swap:
        info = ModelInfo(shape.heads, shape.kv_heads, shape.heads * shape.head_dim, setting.length, shape.head_dim)
        swap = resolve(case.swap).bind(info)
        features = draw_features(swap, case, setting)
    leaves = (*leaves, *features.values()) if setting.backward else ()
    if case.kind == "peer":
        attend = PEERS[case.label].make(setting)
        return TimedCall(lambda: attend(q, k, v, **features), leaves, tensors.upstream)
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "backend": backend, **features}
    return TimedCall(
        lambda: attention(q, k, v, swap, **options),
        leaves,
        tensors.upstream,
        backend=backend_name(swap, setting, tensors, features, backend),
    )


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Computes causal attention with torch, without a mask tensor and without repeating keys."""
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@contextlib.contextmanager
def flash_only() -> Any:
    """Restricts torch's attention to its flash kernel, inside a ``with`` block.

    Raises:
        UnsupportedModelError: The flash kernel cannot compute a call in the block.
    """
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        try:
            yield
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            raise UnsupportedModelError(
                "torch's flash attention cannot compute this call, so that there is no baseline: "
                "leave out this dtype or shape"
            ) from error


def backend_name(swap: Swap, setting: Setting, tensors: Tensors, features: dict[str, Tensor], backend: str) -> str:
    """Returns the name of the backend that computes a swap in this setting."""
    with torch.set_grad_enabled(setting.backward):
        problem = causal_problem(swap, tensors.query, tensors.key, tensors.value, features)
        chosen = choose(problem, backend)
    return next(name for name, known in BACKENDS.items() if known is chosen)
