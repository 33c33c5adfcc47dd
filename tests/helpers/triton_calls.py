"""Calls of the Triton kernels, on a GPU or in the process that interprets them, and how results are compared."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from attnswap.attention.dispatch import BACKENDS
from attnswap.attention.problem import Problem, complete_features
from attnswap.attention.visibility import Visibility
from attnswap.swaps import Swap
from tests.helpers.calls import Case, Inputs, bound, compare, draw, run
from tests.helpers.devices import device_of
from tests.helpers.ids import variant_id

LARGE = 4 if device_of("triton") == "cuda" else 1
"""Calls of several tiles are this much longer on a GPU, whose tiles are larger and whose threads are faster."""
Worker = Callable[..., Any]
ROUNDING = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""What an output may be off by, relative to the largest; gradients twice that, in half precision three times."""


def check(worker: Worker, swap: Swap, case: Case, dtype: torch.dtype = torch.float32, ramp: Any = 1.0) -> None:
    """Compares all results of one call."""
    swap = bound(swap, case)
    inputs = draw(swap, case).rounded(dtype)
    wanted = run(swap, inputs, "dense", torch.float64, ramp)
    found = worker(run, swap, inputs, "triton", dtype, ramp)
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        allowed = ROUNDING[dtype] * (3 if dtype != torch.float32 else 2)
        compare({name: found[name]}, {name: want}, ROUNDING[dtype], allowed, variant_id(swap))


def negated(swap: Swap, inputs: Inputs, function: str) -> dict[str, Tensor]:
    """Runs a swap one of whose printed functions has the wrong sign."""
    from attnswap.attention.triton import program

    printed = program.source(swap, True)
    start = printed.index(f"def {function}(")
    whole = printed[start:].split("\n\n")[0]
    result = whole.rsplit("return ", 1)[1]
    broken = printed.replace(whole, whole.replace(f"return {result}", f"return -({result})"))
    assert broken != printed
    with mock.patch.object(program, "source", return_value=broken):
        return run(swap, inputs, "triton", torch.float32)


def results(backend: str, problem: Problem, upstream: Tensor) -> dict[str, Tensor]:
    """Returns the output of a call and the gradients of all its tensors that take one, on the CPU."""
    out = BACKENDS[backend].attend(problem)
    out.backward(upstream.to(out))
    leaves = {"query": problem.query, "key": problem.key, "value": problem.value, **problem.features}
    if problem.sinks is not None:
        leaves["sinks"] = problem.sinks
    found = {f"gradient of {k}": torch.zeros_like(x) if x.grad is None else x.grad for k, x in leaves.items()}
    return {name: x.cpu() for name, x in {"output": out.detach(), **found}.items()}


def solve(
    swap: Swap, backend: str, dtype: torch.dtype, kind: str, inputs: torch.dtype = torch.float32, groups: int = 2
) -> dict[str, Tensor]:
    """Computes a call with a window, holes, documents, a soft cap, sinks or a cache, and all its gradients.

    Its tensors hold numbers of the dtype ``inputs``.
    """
    generator, device = torch.Generator().manual_seed(len(kind)), device_of(backend)
    batch, heads, queries, keys, width = 2 if kind in ("padding", "holes") else 1, groups, 75, 90, 32
    if kind == "square":
        queries = keys

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(inputs).to(device, dtype).requires_grad_()

    query, key, value = normal(batch, heads, queries, width), normal(batch, 1, keys, width), normal(batch, 1, keys, 24)
    sizes = {"head": (heads,), "query": (batch, heads, queries), "key": (batch, heads, keys)}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    drawn = {
        name: -(torch.rand(sizes[f.per], generator=generator) + 0.1) / (20 if f.per == "key" else 1)
        for name, f in swap.features().items()
    }
    features = {name: x.to(device, wide).requires_grad_() for name, x in drawn.items()}
    options: dict[str, Any] = {"q_offset": keys - queries}
    valid = torch.rand(batch, keys, generator=generator) < 0.8
    start = torch.arange(keys - queries, keys).div(30, rounding_mode="floor") * 30
    options |= {
        "window": {"window": 17},
        "padding": {"key_valid": torch.arange(keys) >= torch.tensor([[0], [70]])},
        "holes": {"key_valid": valid, "window": 40},
        "documents": {"row_start": start[None]},
        "static cache": {"q_offset": torch.tensor(3)},
        "bidirectional": {"causal": False},
    }.get(kind, {})
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    visibility = Visibility(queries, keys, torch.device(device), **options)
    sinks = torch.randn(heads, generator=generator).to(device, wide).requires_grad_() if kind == "sinks" else None
    problem = Problem(
        swap,
        query,
        key,
        value,
        visibility,
        complete_features(swap, features, query, key, value),
        width**-0.5,
        softcap=1.5 if kind == "soft cap" else None,
        sinks=sinks,
    )
    return results(backend, problem, torch.randn(batch, heads, queries, 24, generator=generator).to(inputs))


KINDS = ("window", "padding", "holes", "documents", "soft cap", "sinks", "static cache", "square", "bidirectional")
