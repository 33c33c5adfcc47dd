"""How much a model loses when its weights are rounded to few bits, which outliers make worse."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from attnswap.errors import ConfigError, UnsupportedModelError
from attnswap.surgery.body import base_of
from attnswap.surgery.parameters import swap_parameters

GROUP = 64
"""Weights that share a scale, along the input dimension, where it divides by it."""


@contextmanager
def rounded(model: nn.Module, bits: int, group: int = GROUP) -> Iterator[int]:
    """Rounds the weights of a model's linear layers to the nearest of ``2^bits - 1`` levels while the context lasts.

    Symmetric round-to-nearest with a scale per group of a row; embeddings, the head, norms, experts that are kept in
    one tensor and the swaps' own parameters stay. Afterwards the weights are what they were, bit for bit.

    Args:
        model: The model; a peft wrapper is looked through.
        bits: From 2 to 8.
        group: Weights that share a scale; rows that it does not divide have one scale each.

    Yields:
        How many weights were rounded.

    Raises:
        ConfigError: ``bits`` is out of range.
        UnsupportedModelError: The model has no linear layers to round, or they are quantized already.
    """
    if not 2 <= bits <= 8:
        raise ConfigError(f"bits must lie between 2 and 8, not {bits}")
    chosen = layers_to_round(model)
    kept = [module.weight.data for module in chosen]
    try:
        for module, weight in zip(chosen, kept, strict=True):
            turned = isinstance(module, Conv1D)  # GPT-2's: (in, out)
            module.weight.data = (
                round_to_nearest(weight.T, bits, group).T if turned else round_to_nearest(weight, bits, group)
            )
        yield sum(weight.numel() for weight in kept)
    finally:
        for module, weight in zip(chosen, kept, strict=True):
            module.weight.data = weight


def layers_to_round(model: nn.Module) -> list[nn.Linear | Conv1D]:
    """Returns the layers whose weights :func:`rounded` rounds.

    Raises:
        UnsupportedModelError: There are none, or their weights are quantized already.
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
            f"the weights of {type(inner).__name__} are {str(coarse).removeprefix('torch.')} already: "
            "load the model unquantized"
        )
    return chosen


def round_to_nearest(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """Returns a matrix (out, in) rounded symmetrically with one scale for each ``group`` of a row's weights."""
    size = group if weight.shape[1] % group == 0 else weight.shape[1]
    parts = weight.float().reshape(weight.shape[0], -1, size)
    top = 2 ** (bits - 1) - 1
    scale = (parts.abs().amax(-1, keepdim=True) / top).clamp(min=torch.finfo(torch.float32).tiny)
    return ((parts / scale).round().clamp(-top, top) * scale).reshape(weight.shape).to(weight.dtype)
