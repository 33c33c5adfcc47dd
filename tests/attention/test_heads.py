"""Some heads of a layer: the map of query to key/value heads in every backend, and how the parts are put together."""

import importlib.util
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import attnswap
from attnswap.attention import native, triton
from attnswap.attention.dispatch import BACKENDS
from attnswap.attention.heads import in_order, kv_heads_of, pick, regular_heads
from attnswap.attention.native import build
from attnswap.attention.problem import Problem, complete_features
from attnswap.attention.visibility import Visibility, split_mask
from tests.helpers.calls import Case, allowed_error, backends_of, bound, compare, draw, short_blocks, variants
from tests.helpers.ids import variant_id

MAPS = {
    "odd order": (2, 0, 3, 2),
    "whole groups out of order": (3, 3, 1, 1),
    "two of three sizes": (0, 0, 0, 0, 2, 2),
    "one head": (1,),
    "one for all": (2, 2, 2),
    "as it lies": (0, 0, 1, 1, 2, 2, 3, 3),
}
"""The key/value head of each query head, of four; most leave some key/value head without a query head."""


@pytest.mark.parametrize(
    ("kv_heads", "chosen", "groups"),
    [
        ((1, 1, 0, 0), (1, 0), 2),
        ((0, 0, 1), (0, 0, 1), 1),
        ((2, 0, 2), (2, 0, 2), 1),
        ((0, 0, 0, 0, 2, 2), (0, 0, 2), 2),
        ((3, 3, 3), (3,), 3),
        ((1, 1, 2, 2, 1, 1), (1, 2, 1), 2),
    ],
)
def test_regular_heads(kv_heads, chosen, groups):
    assert regular_heads(kv_heads) == (chosen, groups)
    assert [h for h in chosen for _ in range(groups)] == list(kv_heads)


def test_kv_heads_of():
    assert kv_heads_of((4, 0, 7, 5), 2) == (2, 0, 3, 2)


@pytest.mark.parametrize("heads", [(0,), (3,), (1, 2), (0, 2, 4), (4, 0, 2), (2, 1), (3, 3, 0), (5, 1, 1, 5)])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_pick(heads, dim):
    """Equals plain indexing, gradients included, and is a view where the heads grow in even steps."""
    x = torch.randn(6, 6, 6, 2, dtype=torch.float64, requires_grad=True)
    picked, wanted = pick(x, heads, dim), x.index_select(dim, torch.tensor(heads))
    assert torch.equal(picked, wanted)
    upstream = torch.randn_like(wanted)
    (mine,) = torch.autograd.grad(picked, x, upstream)
    (theirs,) = torch.autograd.grad(wanted, x, upstream)
    assert torch.allclose(mine, theirs, atol=1e-15)
    even = len({b - a for a, b in pairwise(heads)}) <= 1 and list(heads) == sorted(set(heads))
    assert (picked.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()) == even


def test_parts_in_order():
    whole = torch.randn(2, 3, 9, 4, requires_grad=True)
    parts = [(heads, pick(whole, heads, 2)) for heads in ((4, 0, 7, 5), (1, 2, 3), (8, 6))]
    found = in_order(parts, 2)
    assert torch.equal(found, whole)
    (gradient,) = torch.autograd.grad(found, whole, whole.detach())
    assert torch.equal(gradient, whole.detach())
    assert in_order([((0, 1), whole)], 2) is whole
    assert torch.equal(in_order([((1, 0), whole[:, :, :2])], 2), whole[:, :, [1, 0]])


# --- the map in every backend -----------------------------------------------------------------------------------------


def call_of(swap, kv_heads, mask):
    """Tensors of a call whose heads read four key/value heads as the map says, a visibility, and what flows back."""
    count = len(kv_heads)
    named = list(dict.fromkeys(kv_heads))
    case = Case(kv_heads=count, groups=1, queries=9, keys=9, width=5, mask=mask, seed=len(kv_heads))
    inputs = draw(swap, case)
    generator = torch.Generator().manual_seed(7)
    tensors = dict(inputs.tensors)
    for name in ("key", "value"):
        tensors[name] = torch.randn(2, 4, *tensors[name].shape[2:], generator=generator, dtype=torch.float64)
    features = {
        name: x[:, : len(named)] if swap.features()[name].heads == "kv" else x for name, x in inputs.features.items()
    }
    given = inputs.options.get("attn_mask")
    both = (None, None) if given is None else split_mask(given, (2, count, 9, 9))
    causal = bool(inputs.options.get("is_causal"))
    visibility = Visibility(9, 9, torch.device("cpu"), causal, dense=both[0], bias=both[1])
    return inputs, tensors, features, visibility


def solve(swap, kv_heads, mask, backend, dtype, ramp, repeated=False) -> dict[str, Tensor]:
    """Output and gradients of a call, by the map or with everything repeated for each head by plain indexing."""
    inputs, tensors, features, visibility = call_of(swap, kv_heads, mask)
    leaves = {k: x.to(dtype, copy=True).requires_grad_() for k, x in (tensors | features).items()}
    query, key, value = (leaves[k] for k in ("query", "key", "value"))
    mine: dict[str, Tensor] = {k: leaves[k] for k in features}
    if repeated:
        owner = torch.tensor(kv_heads)
        named = list(dict.fromkeys(kv_heads))
        place = torch.tensor([named.index(h) for h in kv_heads])
        key, value = key[:, owner], value[:, owner]
        mine = {k: x[:, place] if swap.features()[k].heads == "kv" else x for k, x in mine.items()}
    own = None if repeated else kv_heads
    complete = complete_features(swap, mine, query, key, value, own)
    problem = Problem(swap, query, key, value, visibility, complete, 5**-0.5, ramp=ramp, kv_heads=own)
    out = BACKENDS[backend].attend(problem)
    assert out.dtype == dtype
    out.backward(inputs.upstream.to(dtype))
    found = {f"gradient of {k}": torch.zeros_like(x) if x.grad is None else x.grad for k, x in leaves.items()}
    return {"output": out.detach(), **found}


@pytest.mark.thinned(12)
@pytest.mark.parametrize("kv_heads", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("swap", variants(), ids=variant_id)
def test_every_backend_follows_the_map(swap, kv_heads):
    """Outputs and all gradients equal those of keys and values repeated by hand; unused heads get exactly 0."""
    swap = bound(swap, Case(kv_heads=len(kv_heads), groups=1))
    unused = [h for h in range(4) if h not in kv_heads]
    ramps = (1.0, torch.linspace(0.25, 1.0, len(kv_heads))) if swap.native_ramp else (1.0,)
    per_kv = any(f.heads == "kv" for f in swap.features().values())
    for mask in ("causal", "per head", "additive"):
        if swap.causal_only and mask != "causal":
            continue
        inputs = call_of(swap, kv_heads, mask)[0]
        for ramp in ramps:
            if per_kv and isinstance(ramp, Tensor):
                ramp = torch.tensor([0.25 + 0.25 * h for h in kv_heads])  # the heads of a group share lambda
            wanted = solve(swap, kv_heads, mask, "dense", torch.float64, ramp, repeated=True)
            backends = {"dense", "chunked", "native", "folded"} & set(backends_of(swap))
            for backend in sorted(backends):
                for dtype in (torch.float64, torch.float32):
                    allowed = 1e-11 if dtype == torch.float64 else allowed_error(inputs, "plain")
                    with short_blocks():
                        found = solve(swap, kv_heads, mask, backend, dtype, ramp)
                    compare(found, wanted, allowed, 10 * allowed, f"{backend} {dtype} {mask}")
                    for name in ("key", "value"):
                        assert not found[f"gradient of {name}"][:, unused].any()


@pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_reads_the_keys_as_they_lie(dtype, monkeypatch):
    """No copy of keys or values is made for a map, over several tiles; all runs are the same."""
    received = []
    original = native.ops.forward
    monkeypatch.setattr(native.ops, "forward", lambda *given: received.append(given) or original(*given))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 300, 32, generator=generator).to(dtype) for h in (5, 3, 3))
    kv_heads = (2, 0, 2, 2, 0)
    visibility = Visibility(300, 300, torch.device("cpu"))
    found = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = native.attend(Problem(attnswap.Softpick(), *leaves, visibility, {}, 0.2, kv_heads=kv_heads))
        out.backward(out.detach())
        found.append([out.detach(), *(x.grad for x in leaves)])
        assert received[-1][2].data_ptr() == leaves[1].data_ptr() and received[-1][3].data_ptr() == leaves[2].data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    # The same engine on keys and values repeated by hand: only the sums over heads may be rounded differently.
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    picked = [leaves[0], *(x[:, list(kv_heads)] for x in leaves[1:])]
    out = native.attend(Problem(attnswap.Softpick(), *picked, visibility, {}, 0.2))
    out.backward(out.detach())
    assert torch.equal(found[0][0], out) and torch.equal(found[0][1], leaves[0].grad)
    for mine, leaf in zip(found[0][2:], leaves[1:], strict=True):
        assert (mine - leaf.grad).abs().max() <= 4 * torch.finfo(dtype).eps * leaf.grad.abs().max()
    assert not found[0][2][:, 1].any() and not found[0][3][:, 1].any()


@pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
@pytest.mark.parametrize("kv_heads", [(0, 1), (0, 1, 2), (0, 1, -1)])
def test_the_engine_refuses_a_map_that_does_not_fit(kv_heads):
    x = torch.randn(1, 3, 4, 8)
    problem = Problem(attnswap.Softpick(), x, x[:, :2], x[:, :2], Visibility(4, 4, x.device), {}, 1.0)
    with pytest.raises(RuntimeError, match="key/value head"):
        native.attend(replace(problem, kv_heads=kv_heads))


def test_triton_gets_equal_groups():
    """Its kernels know no map; the heads are picked before they are launched."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    key = torch.randn(1, 3, 4, 8)
    problem = Problem(attnswap.Softpick(), torch.randn(1, 4, 4, 8), key, key + 1, Visibility(4, 4, key.device), {}, 1.0)
    given = dict(zip(triton.ops.ORDER, triton.operands(replace(problem, kv_heads=(2, 2, 0, 0))), strict=True))
    assert torch.equal(given["key"], key[:, [2, 0]]) and torch.equal(given["value"], key[:, [2, 0]] + 1)
    given = dict(zip(triton.ops.ORDER, triton.operands(replace(problem, kv_heads=(2, 0, 1, 1))), strict=True))
    assert torch.equal(given["key"], key[:, [2, 0, 1, 1]])
