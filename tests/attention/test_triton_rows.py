"""Row swaps, decayed tiles, NaN and half precision on the Triton kernels (see test_triton)."""

import importlib.util
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor

import attnswap
from attnswap.attention import triton as triton_backend
from attnswap.attention.dispatch import BACKENDS
from attnswap.attention.problem import Problem
from attnswap.attention.visibility import Visibility
from attnswap.swaps import Swap
from attnswap.swaps import expression as fn
from attnswap.swaps.base import Call, Feature, Terms
from attnswap.swaps.statistics import Root, Statistic
from tests.helpers.calls import Case, allowed_error, compare, draw, run
from tests.helpers.devices import device_of
from tests.helpers.ids import variant_id
from tests.helpers.triton_calls import KINDS, LARGE, Worker, check, negated, results, solve

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


class Cubes(Swap):
    """w = (1 + a (s - t) / 3)_+ ^ 3 with bounds that are not tight; no name, so it is not registered."""

    power: ClassVar[float] = 1 / 3

    def features(self) -> dict[str, Feature]:
        return {"sharpness": Feature("head", initial=0.0)}

    def statistics(self) -> dict[str, Statistic]:
        return {"cut": Root(self.cube, self.bounds, power=lambda p: self.power)}

    def weight(self, s: Any, shift: Any, p: SimpleNamespace) -> Any:
        return self.cube(s, p.cut, p)

    def cube(self, s: Any, cut: Any, p: SimpleNamespace) -> Any:
        above = fn.relu(1 + fn.exp(p.sharpness) * (s - cut) / 3)
        return above * above * above

    def bounds(self, top: Any, n: Any, p: SimpleNamespace) -> tuple[Any, Any]:
        return top - 1.0, top + 2.0 + fn.log(n) / fn.exp(p.sharpness)


class Halved(Cubes):
    """As :class:`Cubes`, but Newton would not do: far from the root, only halving the bounds gets anywhere."""

    power: ClassVar[float] = 1.0


class Doubled(Cubes):
    """A row swap that divides by twice its weights."""

    def norm(self, s: Any, shift: Any, p: SimpleNamespace) -> Any:
        return 2 * self.weight(s, shift, p)


Doubled.name = "doubled"  # set late, so that it is not registered


class Peaks(Swap):
    """Softmax with a key bias that rises and falls."""

    def features(self) -> dict[str, Feature]:
        return {"peak": Feature("key", what="added to the scores")}

    def terms(self, call: Call) -> Terms:
        return Terms(key_bias=call.features["peak"].double())


LEARNED = attnswap.Entmax(alpha="learned")
SWAPS = [attnswap.Entmax(), attnswap.Entmax(alpha=2.0), attnswap.Entmax(alpha=1.2), LEARNED, Cubes()]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("width", [64, 96, 128, pytest.param(256, marks=pytest.mark.slow)])
@pytest.mark.parametrize("swap", SWAPS, ids=variant_id)
def test_outputs_and_gradients(worker: Worker, swap: Swap, width: int):
    """Two tiles each way, shared key/value heads, and values of another width."""
    value_width = 64 if width == 96 else width
    queries, keys = 70 * LARGE, 100 * LARGE
    case = Case(batch=1, kv_heads=1, queries=queries, keys=keys, width=width, value_width=value_width, seed=width)
    check(worker, swap, case)


@pytest.mark.thinned(8)
@pytest.mark.parametrize("mask", ["none", "bool", "per head", "padding", "additive", "causal and bool"])
@pytest.mark.parametrize("swap", [LEARNED, Cubes(), SWAPS[1]], ids=variant_id)
def test_masks(worker: Worker, swap: Swap, mask: str):
    batch = 2 if mask == "padding" else 1
    check(worker, swap, Case(batch, kv_heads=1, queries=9, keys=70, width=16, value_width=24, mask=mask, seed=5))


QUICK = ("window", "padding", "sinks")
"""Kinds of calls whose masks reach the kernels of rows in different ways; the others are left to make test-all."""


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "square"],
)
@pytest.mark.parametrize("swap", [SWAPS[0], LEARNED], ids=variant_id)
def test_calls_of_a_model(worker: Worker, swap: Swap, kind: str):
    wanted = solve(swap, "dense", torch.float64, kind)
    compare(worker(solve, swap, "triton", torch.float32, kind), wanted, 4e-6, 1.6e-5, kind)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("swap", [SWAPS[0], LEARNED, Cubes()], ids=variant_id)
def test_half_precision(worker: Worker, swap: Swap, dtype: torch.dtype):
    case = Case(batch=1, kv_heads=1, queries=70 * LARGE, keys=70 * LARGE, width=64, value_width=64, seed=3)
    check(worker, swap, case, dtype)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "ramp", [0.25, 2.0**-20, torch.tensor([0.25, 1.0, 0.5, 0.75])], ids=["number", "next to softmax", "per head"]
)
def test_the_ramp_and_its_gradient(worker: Worker, ramp: Any):
    case = Case(batch=1, queries=9, keys=70, width=16, value_width=16, seed=6)
    check(worker, SWAPS[0], case, ramp=ramp)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("level", ["huge", "low"])
def test_scores_of_ten_thousand(worker: Worker, level: str):
    case = Case(queries=9, keys=12, width=64, value_width=16, level=level, seed=2)
    inputs = draw(LEARNED, case).rounded(torch.float32)
    if level == "huge":
        inputs.tensors["query"] = (inputs.tensors["query"] / 4).float().double()
    found, wanted = worker(run, LEARNED, inputs, "triton", torch.float32), run(LEARNED, inputs)
    allowed = allowed_error(inputs, level)
    compare(found, wanted, allowed, 4 * allowed, level)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("function", ["weight_slope", "weight_by_shift"])
def test_a_wrong_sign_is_caught(worker: Worker, function: str):
    """The output is right (bounds alone find the threshold) and the gradients of the scores are not."""
    case = Case(batch=1, queries=9, keys=20, width=16, value_width=16)
    inputs = draw(SWAPS[0], case).rounded(torch.float32)
    wanted, found = run(SWAPS[0], inputs), worker(negated, SWAPS[0], inputs, function)
    compare({"output": found["output"]}, {"output": wanted["output"]}, 4e-6, 4e-6, "output")
    for name in ("gradient of query", "gradient of key"):
        with pytest.raises(AssertionError, match="is off by"):
            compare({name: found[name]}, {name: wanted[name]}, 4e-6, 8e-6, name)


def test_a_wrong_weight_is_caught(worker: Worker):
    case = Case(batch=1, queries=9, keys=20, width=16, value_width=16)
    inputs = draw(SWAPS[0], case).rounded(torch.float32)
    with pytest.raises(AssertionError):
        compare(worker(negated, SWAPS[0], inputs, "weight"), run(SWAPS[0], inputs), 4e-6, 8e-6, "weight")


# --- the solver -------------------------------------------------------------------------------------------------------


def steps_of(swap: Swap, queries: int) -> tuple[int, Tensor, Tensor]:
    """How many steps the block of a call takes, its thresholds and its output."""
    from attnswap.attention.triton import forward_rows, launch

    generator, device = torch.Generator().manual_seed(1), torch.device(device_of("triton"))
    query, key, value = (torch.randn(1, 2, 60, 16, generator=generator).to(device) for _ in range(3))
    visibility = Visibility(queries, 60, device, causal=False)
    features = {name: torch.tensor([-0.5, 0.5], device=device) for name in swap.features()}
    problem = Problem(swap, query[:, :, :queries] * 6, key, value, visibility, features, 0.25)
    kernel, filled = launch.forward(dict(zip(triton_backend.ops.ORDER, triton_backend.operands(problem), strict=True)))
    with mock.patch.object(forward_rows, "newton", mock.Mock(wraps=forward_rows.newton)) as counted:
        kernel.run()
    return counted.call_count, filled[1].cpu(), filled[0].cpu()


@pytest.mark.skipif(device_of("triton") == "cuda", reason="the steps of compiled kernels cannot be counted")
@pytest.mark.parametrize("swap", [*SWAPS, Halved()], ids=variant_id)
def test_the_solver_stops_when_it_is_done(worker: Worker, swap: Swap):
    steps, _, _ = worker(steps_of, swap, 60)
    assert 2 * 2 <= steps <= 2 * (14 if isinstance(swap, Halved) else 9)  # two heads, a block each


def test_a_row_depends_on_itself_alone(worker: Worker):
    """Rows that need more steps do not move the others."""
    _, whole, out = worker(steps_of, LEARNED, 60)
    _, part, own = worker(steps_of, LEARNED, 7)
    assert torch.equal(whole[:, :, :7], part) and torch.equal(out[:, :, :7], own)


def test_a_row_swap_with_a_norm_of_its_own_is_refused(worker: Worker):
    said = worker(refusal_of, Doubled())
    assert said is not None and "divides by more than the weights" in said
    assert worker(refusal_of, Cubes()) is None


def refusal_of(swap: Swap) -> str | None:
    x = torch.ones(1, 1, 3, 8, device=device_of("triton"))
    features = {"sharpness": torch.zeros(1, device=x.device)}
    return triton_backend.refusal(Problem(swap, x, x, x, Visibility(3, 3, x.device), features, 1.0))


def check_operator() -> None:
    """Checks the operator's schema, shapes without values, and gradients under tracing."""
    generator, device = torch.Generator().manual_seed(0), torch.device(device_of("triton"))
    query, key, value = (torch.randn(1, n, 20, 16, generator=generator).to(device).requires_grad_() for n in (4, 2, 2))
    features = {"alpha_logit": torch.randn(4, generator=generator).to(device).requires_grad_()}
    problem = Problem(LEARNED, query, key, value, Visibility(20, 20, device), features, 0.25)
    torch.library.opcheck(triton_backend.ops.forward, triton_backend.operands(problem))


def test_the_operator_satisfies_torch(worker: Worker):
    worker(check_operator)


# --- decayed tiles ----------------------------------------------------------------------------------------------------

KEYS = 320


def decayed(backend: str, decay: float, poison: str, **options: Any) -> dict[str, Tensor]:
    """The forgetting gate over five tiles of keys; NaN in the first values, or in the last rows' upstream gradient."""
    generator = torch.Generator().manual_seed(3)
    query, key, value, upstream = (torch.randn(1, 2, KEYS, 16, generator=generator) for _ in range(4))
    log_forget = -decay * (1 + torch.rand(1, 2, KEYS, generator=generator))
    if poison == "value":
        value[:, :, :64] = torch.nan if backend == "triton" else 0.0
    elif poison == "gradient":
        upstream[:, :, 256:] = torch.nan if backend == "triton" else 0.0
    leaves = leaves_for(backend, query, key, value, log_forget)
    visibility = Visibility(KEYS, KEYS, leaves[0].device)
    problem = Problem(attnswap.ForgettingGate(), *leaves[:3], visibility, {"log_forget": leaves[3]}, 0.25, **options)
    return results(backend, problem, upstream)


def leaves_for(backend: str, *tensors: Tensor) -> list[Tensor]:
    """The tensors where a backend runs, as leaves: in fp32 for the kernels, in fp64 for the reference."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    return [x.to(device_of(backend), dtype, copy=True).requires_grad_() for x in tensors]


def rows_of(found: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    return {name: x[:, :, part] for name, x in found.items()}


def test_decayed_tiles_are_not_read(worker: Worker):
    """Rows from the third tile on never see the values of the first, nor these keys the gradients of late rows."""
    late, early = slice(128, None), slice(None, 128)
    found, wanted = worker(decayed, "triton", 0.5, "value"), decayed("dense", 0.5, "value")
    assert found["output"][:, :, :64].isnan().all(), "the NaN was there to be seen"
    for name in ("output", "gradient of query", "gradient of key"):
        compare(rows_of(found, late), {name: wanted[name][:, :, late]}, 2e-6, 8e-6, "values")
    found, wanted = worker(decayed, "triton", 0.5, "gradient"), decayed("dense", 0.5, "gradient")
    assert found["gradient of value"][:, :, 256:].isnan().all(), "the NaN was there to be seen"
    for name in ("gradient of key", "gradient of value"):
        compare(rows_of(found, early), {name: wanted[name][:, :, early]}, 2e-6, 8e-6, "gradients")


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("decay", "options"), [(0.01, {}), (0.5, {"softcap": 30.0})], ids=["weak", "soft cap"])
def test_tiles_that_may_matter_are_read(worker: Worker, decay: float, options: dict[str, Any]):
    """A weak gate leaves every tile; under a soft cap the bound does not hold, so no tile is left out."""
    found = worker(call_decayed, decay, options)
    assert found["output"].isnan().all()


def call_decayed(decay: float, options: dict[str, Any]) -> dict[str, Tensor]:
    return decayed("triton", decay, "value", **options)


@pytest.mark.slow
def test_what_is_left_out_is_not_missed(worker: Worker):
    """A gate whose tiles are left out in part: outputs and all gradients, to the rounding of fp32."""
    for decay in (0.1, 0.25, 2.0):
        found, wanted = worker(decayed, "triton", decay, ""), decayed("dense", decay, "")
        compare(found, wanted, 2e-6, 8e-6, str(decay))


def peaked(backend: str) -> dict[str, Tensor]:
    """A key bias that is low but for single keys inside the tiles, which then hold all weight."""
    generator = torch.Generator().manual_seed(4)
    query, key, value, upstream = (torch.randn(1, 2, KEYS, 16, generator=generator) for _ in range(4))
    peak = torch.full((1, 2, KEYS), -200.0)
    peak[..., 17], peak[..., 150], peak[..., 300:] = 0.0, -1.0, -3.0
    leaves = leaves_for(backend, query, key, value, peak)
    visibility = Visibility(KEYS, KEYS, leaves[0].device)
    problem = Problem(Peaks(), *leaves[:3], visibility, {"peak": leaves[3]}, 0.25)
    return results(backend, problem, upstream)


def test_a_bias_that_rises_inside_a_tile_is_seen(worker: Worker):
    compare(worker(peaked, "triton"), peaked("dense"), 4e-6, 8e-6, "peaks")


# --- NaN and half precision -------------------------------------------------------------------------------------------


def broken_row(swap: Swap, where: str) -> Tensor:
    """The output of a call with NaN in one query, or in one key."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 20, 16, generator=generator) for _ in range(3))
    {"query": query, "key": key}[where][0, 1, 12, 0] = torch.nan
    features = {name: -torch.rand({"head": (2,), "key": (1, 2, 20)}[f.per]) for name, f in swap.features().items()}
    device = torch.device(device_of("triton"))
    query, key, value = (x.to(device) for x in (query, key, value))
    features = {name: x.to(device) for name, x in features.items()}
    problem = Problem(swap, query, key, value, Visibility(20, 20, device), features, 0.25)
    return BACKENDS["triton"].attend(problem).cpu()


NORMALIZERS = [
    attnswap.Softpick(),
    attnswap.Sigmoid(bias="learned"),
    attnswap.SSMax(),
    attnswap.ForgettingGate(),
    attnswap.Entmax(),
    attnswap.Entmax(alpha=2.0),
    LEARNED,
]


@pytest.mark.parametrize("swap", NORMALIZERS, ids=variant_id)
def test_nan_stays_nan(worker: Worker, swap: Swap):
    """NaN in a query reaches that row and no other, NaN in a key all rows that see it: no broken model looks sound."""
    out = worker(broken_row, swap, "query")
    assert out[0, 1, 12].isnan().all()
    out[0, 1, 12] = 0.0
    assert out.isfinite().all()
    out = worker(broken_row, swap, "key")
    assert out[0, 1, 12:].isnan().all()
    out[0, 1, 12:] = 0.0
    assert out.isfinite().all()


def stored_for_backward(dtype: torch.dtype, training: bool) -> tuple[Tensor, Tensor]:
    """The output in ``dtype`` and what is kept for the backward, at values near 100."""
    generator = torch.Generator().manual_seed(0)
    device = torch.device(device_of("triton"))
    query, key, value = (torch.randn(1, 2, 20, 16, generator=generator).to(device, dtype) for _ in range(3))
    query.requires_grad_(training)
    problem = Problem(attnswap.Softpick(), query, key, value + 100, Visibility(20, 20, device), {}, 0.25)
    out, _, _, kept = triton_backend.ops.forward(*triton_backend.operands(problem))
    return out.detach().cpu(), kept.detach().cpu()


def test_the_backward_reads_an_output_that_was_not_rounded(worker: Worker):
    out, kept = worker(stored_for_backward, torch.bfloat16, True)
    assert kept.dtype == torch.float32 and kept.shape == out.shape
    assert 0.01 < (kept - out.float()).abs().max() <= 0.5, "the output is rounded to steps of one half"
    assert not worker(stored_for_backward, torch.bfloat16, False)[1].numel(), "nothing is kept without gradients"
    assert not worker(stored_for_backward, torch.float32, True)[1].numel(), "the output itself serves in fp32"
