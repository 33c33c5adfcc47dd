"""Gradients of what a swap learns, in 16 bits: as near to the reference as its own rounding."""

import itertools

import pytest
import torch

import attnswap
from tests.helpers.calls import Case, bound, compare, draw, run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "seed"), itertools.product(attnswap.swaps.names(), range(2)))
def test_learned_tensors_keep_their_gradient(name: str, seed: int, dtype: torch.dtype):
    """Scores as far apart as those of pretrained models; what is learned sums over all of them."""
    case = Case(batch=1, queries=90, keys=90, width=32, value_width=32, seed=seed)
    swap = bound(attnswap.swaps.resolve(name), case)
    inputs = draw(swap, case)
    inputs.tensors["query"] *= 4
    inputs = inputs.rounded(dtype)
    found = run(swap, inputs, "auto", dtype)
    wanted = run(swap, inputs, "dense", torch.float64)
    for learned in swap.features():
        part = f"gradient of {learned}"
        compare({part: found[part]}, {part: wanted[part]}, 0.0, 1e-2, f"{name} {dtype}")
