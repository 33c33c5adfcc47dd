"""Round weights to few bits, to measure how well a model would survive quantization."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from attnswap.errors import ConfigError, UnsupportedModelError
from attnswap.surgery.body import base_of
from attnswap.surgery.parameters import swap_parameters

GROUP = 64
"""Consecutive weights along the input dimension that share a scale, if the dimension is a multiple of it."""


@contextmanager
def rounded(model: nn.Module, bits: int, group: int = GROUP) -> Iterator[int]:
    """Rounds the weights of a model's linear layers to the nearest of ``2^bits - 1`` levels, inside a ``with`` block.

    Symmetric round-to-nearest with one scale per group of a row. Embeddings, the head, norms, experts that share one
    tensor and the swaps' parameters are not rounded. After the block the original weights are back, bit for bit.

    Args:
        model: The model, with or without a PEFT wrapper.
        bits: From 2 to 8.
        group: Weights that share a scale. A row whose length is not a multiple of it has one scale.

    Yields:
        The number of rounded weights.

    Raises:
        ConfigError: ``bits`` is out of range.
        UnsupportedModelError: The model has no linear layers to round, or is quantized already.
    """
    if not 2 <= bits <= 8:
        raise ConfigError(f"bits must lie between 2 and 8, not {bits}")
    chosen = layers_to_round(model)
    kept = [module.weight.data for module in chosen]
    try:
        for module, weight in zip(chosen, kept, strict=True):
            transposed = isinstance(module, Conv1D)  # GPT-2 stores weights as (in, out)
            module.weight.data = (
                round_to_nearest(weight.T, bits, group).T if transposed else round_to_nearest(weight, bits, group)
            )
        yield sum(weight.numel() for weight in kept)
    finally:
        for module, weight in zip(chosen, kept, strict=True):
            module.weight.data = weight


def layers_to_round(model: nn.Module) -> list[nn.Linear | Conv1D]:
    """Returns the layers whose weights :func:`rounded` rounds.

    Raises:
        UnsupportedModelError: The model has no such layers, or they are quantized already.
    """
    inner = base_of(model)
    own = {id(p) for p in swap_parameters(inner).values()}
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    linear = [m for m in inner.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    chosen = [module for module in linear if id(module.weight) not in own]
    if not chosen:
        raise UnsupportedModelError(f"{type(inner).__name__} has no linear layers whose weights could be rounded")
    coarse = next((m.weight.dtype for m in chosen if m.weight.dtype.itemsize < 2), None)
    if coarse is not None:
        raise UnsupportedModelError(
            f"the weights of {type(inner).__name__} are already quantized ({str(coarse).removeprefix('torch.')}): "
            "load the model without quantization"
        )
    return chosen


def round_to_nearest(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """Rounds a matrix of shape (out, in) symmetrically, with one scale per ``group`` weights of a row."""
    size = group if weight.shape[1] % group == 0 else weight.shape[1]
    parts = weight.float().reshape(weight.shape[0], -1, size)
    top = 2 ** (bits - 1) - 1
    scale = (parts.abs().amax(-1, keepdim=True) / top).clamp(min=torch.finfo(torch.float32).tiny)
    return ((parts / scale).round().clamp(-top, top) * scale).reshape(weight.shape).to(weight.dtype)
