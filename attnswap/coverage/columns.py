"""The checks of one model, which are the columns of the coverage table.

Each check raises an error if it fails, and returns the measured error or effect otherwise.
"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from attnswap.coverage.tiny import PARTS, VOCABULARY
from attnswap.errors import NumericsError
from attnswap.surgery.parameters import swap_parameters
from attnswap.surgery.patch import patch, unpatch
from attnswap.surgery.patched import patched_stacks
from attnswap.surgery.spec import KEY
from attnswap.swaps import SwapLike

TOKENS = 12
TOLERANCE = 1e-4
"""Tolerance for logits and layer outputs, relative to their standard deviation if that is above 1."""


def tokens() -> Tensor:
    """Returns two rows of token ids, none of them special tokens."""
    return torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Returns the logits of a forward without a KV cache."""
    return model(input_ids=tokens(), use_cache=False).logits


def gap(a: Tensor, b: Tensor) -> float:
    """Returns the largest difference, divided by the standard deviation of ``b`` if that is above 1."""
    return float((a - b).abs().max()) / max(1.0, float(b.std()))


@torch.no_grad()
def move_away(model: PreTrainedModel, seed: int = 1) -> None:
    """Perturbs all swap parameters, so that the swap differs clearly from softmax."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in swap_parameters(model).items():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(0.2 + 0.1 * noise.abs() if name.endswith("gain") else p + 0.5 * noise / p.shape[-1] ** (p.ndim > 1) / 2)


def identity(model: PreTrainedModel, stock: Tensor) -> float:
    """Checks that a swap that starts as softmax does not change the model."""
    patch(model, "ssmax", part=PARTS.get(model.config.model_type))
    off = gap(logits(model), stock)
    unpatch(model)
    return _below(off)


def dispatch(model: PreTrainedModel, stock: Tensor, swap: SwapLike) -> float:
    """Checks that a perturbed swap changes the logits. That it reaches every head is checked by :func:`patch`."""
    patch(model, swap, part=PARTS.get(model.config.model_type))
    move_away(model)
    moved = gap(logits(model), stock)
    if not moved > 100 * TOLERANCE:
        raise NumericsError(f"the logits change by {moved:.1e} only")
    return moved


def oracle(model: PreTrainedModel, run: Callable[[], object] | None = None) -> float:
    """Checks that every layer equals the dense fp64 reference on the same queries, keys and values.

    Args:
        model: The patched model.
        run: Runs the model; default: one forward without a KV cache.
    """
    if not any(
        stack.seam == "interface" for stack, _ in patched_stacks(model)
    ):  # the layers compute the dense reference itself, in fp32
        return _below(gap(logits(model).double(), logits(copy.deepcopy(model).double())))
    original, worst = AttentionInterface._global_mapping[KEY], [0.0]

    def checked(module, query, key, value, attention_mask, **kwargs):  # type: ignore[no-untyped-def]
        out = original(module, query, key, value, attention_mask, **kwargs)
        if KEY not in module._modules:
            return out
        wide = (x.double() for x in (query, key, value))
        right = original(module, *wide, attention_mask, **{**kwargs, "output_attentions": True})[0]
        worst[0] = max(worst[0], gap(out[0].double(), right))
        return out

    AttentionInterface._global_mapping[KEY] = checked
    try:
        run() if run else logits(model)
    finally:
        AttentionInterface._global_mapping[KEY] = original
    return _below(worst[0])


@torch.no_grad()
def cached(model: PreTrainedModel) -> float:
    """Checks that decoding with a KV cache, token by token after a prompt, equals the full forward."""
    ids, prompt = tokens(), TOKENS - 4
    right = logits(model)
    out = model(input_ids=ids[:, :prompt], use_cache=True)
    steps, past = [out.logits[:, -1:]], out.past_key_values
    for i in range(prompt, TOKENS):
        out = model(input_ids=ids[:, i : i + 1], past_key_values=past, use_cache=True)
        steps.append(out.logits)
        past = out.past_key_values
    return _below(gap(torch.cat(steps, 1), right[:, prompt - 1 :]))


def gradients(model: PreTrainedModel) -> float:
    """Checks that every swap parameter gets a finite gradient that is not zero."""
    model.zero_grad()
    model(input_ids=tokens(), use_cache=False).logits.square().mean().backward()
    sizes = {name: 0.0 if p.grad is None else float(p.grad.abs().max()) for name, p in swap_parameters(model).items()}
    model.zero_grad()
    bad = [name for name, size in sizes.items() if not 0 < size < float("inf")]
    if bad:
        raise NumericsError(f"{len(bad)} parameters have no gradient, such as {bad[0]}")
    return min(sizes.values(), default=0.0)


def reload(model: PreTrainedModel) -> float:
    """Checks that the logits after ``save_pretrained`` and ``from_pretrained`` are the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))
        again = type(model).from_pretrained(folder)
        off = gap(logits(again), logits(model))
    return _below(off, 0.0)


def undo(model: PreTrainedModel, stock: Tensor) -> float:
    """Checks that unpatching restores the logits of the original model, bit for bit."""
    unpatch(model)
    return _below(gap(logits(model), stock), 0.0)


def _below(off: float, most: float = TOLERANCE) -> float:
    if not off <= most:
        raise NumericsError(f"off by {off:.1e}")
    return off


PATCHED_CHECKS: dict[str, Callable[[PreTrainedModel], float]] = {
    "oracle": oracle,
    "cached": cached,
    "gradients": gradients,
    "reload": reload,
}
"""Checks of a patched model by name, in this order."""
