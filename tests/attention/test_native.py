"""The native CPU kernels against the dense oracle in fp64, in fp32 and at the edges, and what happens without them."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attnswap
from attnswap.attention import dense, native, tiled
from attnswap.attention.native import build
from attnswap.attention.problem import Problem, complete_features
from attnswap.attention.tiled import scores as tiled_scores
from attnswap.attention.visibility import Visibility
from attnswap.swaps import Swap
from attnswap.swaps import expression as fn
from attnswap.swaps.base import Feature, Terms
from attnswap.swaps.softmax import Softmax
from attnswap.swaps.statistics import Root, Statistic

SWAPS = [
    attnswap.Softpick(),
    attnswap.Sigmoid(bias=-2.0),
    attnswap.Sigmoid(bias="learned"),
    attnswap.SSMax(),
    attnswap.ForgettingGate(),
    attnswap.Entmax(),
    attnswap.Entmax(alpha=2.0),
    attnswap.Entmax(alpha="learned"),
]
needs_compiler = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


def problem_of(
    swap: Swap, visibility: Visibility, shape: tuple[int, int, int, int], level: float = 1.0, **options: Any
):
    """A call with random tensors in fp64: batch, heads, key/value heads, width."""
    batch, heads, kv_heads, width = shape
    generator = torch.Generator().manual_seed(visibility.q_length * 7 + visibility.k_length)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    query = draw(batch, heads, visibility.q_length, width) * level
    key, value = (draw(batch, kv_heads, visibility.k_length, width) for _ in range(2))
    features = {}
    for name, feature in swap.features().items():
        if feature.per == "head":
            features[name] = draw(heads)
        elif name == "log_forget":
            features[name] = -draw(batch, heads, visibility.k_length).abs() * 0.1
    features = complete_features(swap, features, query, key, value)
    return Problem(swap, query, key, value, visibility, features, width**-0.5, **options)


def results(problem: Problem, attend: Any, dtype: torch.dtype) -> list[Tensor]:
    """Output and the gradient of everything that learns."""
    leaves = {n: getattr(problem, n) for n in ("query", "key", "value", "sinks") if getattr(problem, n) is not None}
    leaves |= problem.features
    leaves = {n: x.detach().to(dtype).requires_grad_() for n, x in leaves.items()}
    features = {n: leaves[n] for n in problem.features}
    own = {n: x for n, x in leaves.items() if n not in features}
    out = attend(Problem(**{**vars(problem), **own, "features": features}))
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out.backward(upstream.to(out.dtype))
    return [out.detach().double(), *(x.grad.double() if x.grad is not None else x * 0 for x in leaves.values())]


def oracle(problem: Problem) -> Tensor:
    return dense.attend(problem)[0]


def conditioning(problem: Problem, rounding: float) -> list[float]:
    """How far the exact results move when queries, relatively, and scores, absolutely, are off by ``rounding``.

    The weights of scores near 0 are near 1, where rounding is absolute.
    """
    generator, exact = torch.Generator().manual_seed(0), results(problem, oracle, torch.float64)
    moved, seen = [0.0] * len(exact), problem.visibility

    def noise(*shape: int) -> Tensor:
        return rounding * (2 * torch.rand(shape, generator=generator) - 1).double()

    for _ in range(4):
        bias = noise(1, problem.query.shape[1], seen.q_length, seen.k_length) + (0 if seen.bias is None else seen.bias)
        nudged = {"query": problem.query * (1 + noise(*problem.query.shape)), "visibility": replace(seen, bias=bias)}
        near = results(Problem(**{**vars(problem), **nudged}), oracle, torch.float64)
        moved = [max(m, float((a - b).abs().max())) for m, a, b in zip(moved, near, exact, strict=True)]
    return moved


def layouts() -> dict[str, Visibility]:
    """One visibility of each kind, long enough for several tiles."""
    cpu, q, k = torch.device("cpu"), 300, 300
    holes, left = torch.ones(2, k, dtype=torch.bool), torch.ones(2, k, dtype=torch.bool)
    holes[0, 40:60], holes[1, 257:299], left[1, :131] = False, False, False
    starts = torch.zeros(2, q, dtype=torch.long)
    starts[0, 100:], starts[1, 256:] = 100, 256
    generator = torch.Generator().manual_seed(1)
    dense_mask = torch.rand(2, 4, q, k, generator=generator) < 0.3
    dense_mask[0, :, 5] = False
    return {
        "causal": Visibility(q, k, cpu),
        "full": Visibility(q, k, cpu, causal=False),
        "short queries": Visibility(3, 290, cpu, q_offset=287),
        "early queries": Visibility(20, 10, cpu, q_offset=-10),
        "window": Visibility(q, k, cpu, window=37),
        "documents": Visibility(q, k, cpu, row_start=starts),
        "left padding": Visibility(q, k, cpu, key_valid=left),
        "holes": Visibility(q, k, cpu, key_valid=holes),
        "mask": Visibility(q, k, cpu, dense=dense_mask),
        "mask of one head": Visibility(q, k, cpu, dense=dense_mask[:1, :1]),
        "bias": Visibility(q, k, cpu, bias=torch.randn(1, 4, q, k, generator=generator)),
        "static": Visibility(2, k, cpu, q_offset=torch.tensor(130)),
    }


@pytest.mark.thinned(10)
@pytest.mark.parametrize("backend", [pytest.param(native, marks=needs_compiler), tiled], ids=["native", "tiled"])
@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("swap", SWAPS)
def test_every_layout_in_fp64(swap: Swap, name: str, backend: Any, monkeypatch):
    """Outputs and all gradients, to rounding, for grouped keys, caps, sinks and ramps."""
    visibility = layouts()[name]
    if swap.causal_only and visibility.sees_future:
        pytest.skip("works over time")
    if swap.statistics() and backend is tiled:
        pytest.skip("needs whole rows")
    monkeypatch.setattr(tiled_scores, "KEYS", 100)  # several tiles
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64)
    ramp = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    variants: list[dict[str, Any]] = [{}, {"softcap": 2.0, "sinks": sinks}]
    variants += [{"ramp": ramp}] if swap.native_ramp else []
    for options in variants:
        problem = problem_of(swap, visibility, (2, 4, 2, 8), **options)
        for found, wanted in zip(
            results(problem, backend.attend, torch.float64), results(problem, oracle, torch.float64), strict=True
        ):
            assert (found - wanted).abs().max() <= 1e-11 * max(1.0, float(wanted.abs().max())), options.keys()


@needs_compiler
@pytest.mark.thinned(10)
@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("swap", SWAPS)
def test_every_layout_in_bf16(swap: Swap, name: str):
    """Within 2e-2 of fp64 on the same rounded inputs, by products of bf16 where the processor has them.

    Gradients of a row whose denominator nearly vanishes may move as far as another rounding of the queries moves them.
    """
    visibility = layouts()[name]
    if swap.causal_only and visibility.sees_future:
        pytest.skip("works over time")
    problem = problem_of(swap, visibility, (2, 4, 2, 40))
    rounded = {n: getattr(problem, n).bfloat16().double() for n in ("query", "key", "value")}
    problem = Problem(**{**vars(problem), **rounded})
    own = dict.fromkeys(problem.features, torch.float32)  # as learned features and gates are kept

    def half(p: Problem) -> Tensor:
        cast = {n: getattr(p, n).to(torch.bfloat16) for n in rounded}
        return native.attend(Problem(**{**vars(p), **cast, "features": {n: p.features[n].float() for n in own}}))

    wanted = results(problem, oracle, torch.float64)
    doubts = conditioning(problem, 2**-9)
    for found, exact, doubt in zip(results(problem, half, torch.float32), wanted, doubts, strict=True):
        assert (found - exact).abs().max() <= max(2e-2 * max(1.0, float(exact.abs().max())), doubt)


@needs_compiler
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(SWAPS),
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from([1, 3, 16, 40]),
    st.sampled_from([1, 3]),
    st.sampled_from([0.0, 0.01, 1.0, 30.0]),
    st.booleans(),
)
def test_fp32_is_as_exact_as_stock_softmax(
    swap: Swap, queries: int, keys: int, width: int, groups: int, level: float, holes: bool
):
    """Within max(2e-6, 4 times the error of stock fp32 softmax) of fp64, ten times that for gradients.

    Where a swap is itself ill conditioned (softpick near scores of 0, sums in the gradients of numbers), four times
    what rounding of queries and scores does to the exact result is allowed, or what its formula does in plain fp32.
    """
    valid = torch.rand(1, keys, generator=torch.Generator().manual_seed(keys)) < 0.7 if holes else None
    visibility = Visibility(queries, keys, torch.device("cpu"), q_offset=keys - queries, key_valid=valid)
    problem = problem_of(swap, visibility, (1, groups, 1, width), level)
    problem = Problem(
        **{
            **vars(problem),
            **{n: getattr(problem, n).float().double() for n in ("query", "key", "value")},
            "features": {n: x.float().double() for n, x in problem.features.items()},
        }
    )
    softmax = Problem(**{**vars(problem), "swap": Softmax(), "features": {}})

    def stock(p: Problem) -> Tensor:
        mask = visibility.mask().expand(1, 1, queries, keys)
        out = scaled_dot_product_attention(p.query, p.key, p.value, attn_mask=mask, scale=p.scaling, enable_gqa=True)
        return torch.where(mask.any(-1, keepdim=True), out, 0.0)

    pairs = zip(*(results(softmax, stock, d) for d in (torch.float32, torch.float64)), strict=True)
    stock_error = max(float((a - b).abs().max()) for a, b in pairs)
    exact, plain = (results(problem, oracle, dtype) for dtype in (torch.float64, torch.float32))
    doubts = conditioning(problem, 2**-23)
    for place, found in enumerate(results(problem, native.attend, torch.float32)):
        assert found.isfinite().all()
        wanted = exact[place]
        allowed = max(2e-6, 4 * stock_error) * (1 if place == 0 else 10) * max(1.0, float(wanted.abs().max()))
        allowed = max(allowed, 4 * doubts[place], 4 * float((plain[place] - wanted).abs().max()))
        if not (swap.statistics() and level == 30.0):  # a key may cross the threshold by rounding
            assert (found - wanted).abs().max() <= allowed, place


@needs_compiler
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("level", [1e4, -1e4, -300.0])
def test_extreme_scores_stay_finite(swap: Swap, level: float):
    """Scores of +-1e4, and rows whose scores all lie far below 0."""
    visibility = Visibility(70, 70, torch.device("cpu"))
    problem = problem_of(swap, visibility, (1, 2, 1, 4))
    key = problem.key.abs() if level < 0 else problem.key
    problem = Problem(
        **{**vars(problem), "query": problem.query.abs() * level if level < 0 else problem.query * level, "key": key}
    )
    for found in results(problem, native.attend, torch.float32):
        assert found.isfinite().all()


@needs_compiler
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("attend", [oracle, native.attend, tiled.attend], ids=["dense", "native", "tiled"])
def test_a_number_that_is_none_is_not_swallowed(swap: Swap, attend: Any):
    """NaN in a query reaches that row's output and no other: a broken model must not look sound."""
    if swap.statistics() and attend is tiled.attend:
        pytest.skip("needs whole rows")
    problem = problem_of(swap, Visibility(30, 30, torch.device("cpu")), (1, 2, 1, 4))
    problem.query[0, 1, 20, 0] = torch.nan
    out = attend(problem)
    assert out[0, 1, 20].isnan().all()
    assert out[:, :, :20].isfinite().all()
    assert out[0, 0].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("decay", [1e-3, 0.05, 0.7])
def test_skipped_tiles_change_nothing(decay: float):
    """Tiles that a gate has faded out are skipped; the result stays within rounding of the whole computation."""
    swap, length = attnswap.ForgettingGate(), 2100
    problem = problem_of(swap, Visibility(length, length, torch.device("cpu")), (1, 1, 1, 8))
    gate = torch.full((1, 1, length), -decay, dtype=torch.float64)
    gate[..., 700:900] = 0.0  # an open stretch inside: decay is not the same everywhere
    problem = Problem(**{**vars(problem), "features": {"log_forget": gate}})
    wanted = results(problem, oracle, torch.float64)
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        for found, exact in zip(results(problem, native.attend, dtype), wanted, strict=True):
            assert (found - exact).abs().max() <= allowed * max(1.0, float(exact.abs().max()))


class Hill(Swap):
    """Softmax over keys of which some in the middle are favoured."""

    def features(self) -> dict[str, Any]:
        return {"log_forget": Feature("key", what="an additive score")}

    def terms(self, call: Any) -> Terms:
        return Terms(key_bias=call.features["log_forget"].double())


@needs_compiler
def test_a_bias_that_falls_again_hides_no_tile():
    """A tile is as near as its best key, not as its last."""
    problem = problem_of(Hill(), Visibility(1024, 1024, torch.device("cpu")), (1, 1, 1, 8))
    hill = torch.full((1, 1, 1024), -500.0, dtype=torch.float64)
    hill[..., 300:310] = 0.0
    problem = Problem(**{**vars(problem), "features": {"log_forget": hill}})
    for found, wanted in zip(
        results(problem, native.attend, torch.float64), results(problem, oracle, torch.float64), strict=True
    ):
        assert (found - wanted).abs().max() <= 1e-10


@needs_compiler
def test_every_run_gives_the_same_bits():
    """Which thread takes which task must not show: no sum depends on it."""
    problem = problem_of(attnswap.Softpick(), Visibility(300, 300, torch.device("cpu")), (1, 4, 2, 8))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = [results(problem, native.attend, torch.float32) for _ in range(10)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_compiler
def test_no_second_derivative_in_silence():
    q = torch.randn(1, 1, 4, 4, requires_grad=True)
    out = attnswap.attention(q, q, q, "softpick", backend="native")
    (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), q)


class Cubic(Swap):
    """A row swap of a user's own: cubes above the threshold."""

    def statistics(self) -> dict[str, Statistic]:
        return {"cut": Root(self.cube, lambda top, n, p: (top, top + fn.log(n)))}

    def weight(self, s: Any, shift: Any, p: SimpleNamespace) -> Any:
        return self.cube(s, p.cut, p)

    def cube(self, s: Any, cut: Any, p: SimpleNamespace) -> Any:
        above = fn.relu(1 + (s - cut) / 3)
        return above * above * above


@needs_compiler
def test_a_row_swap_needs_its_weight_and_root_alone():
    """alpha = 4/3 is the same cube, so the released entmax vouches for it by way of ours."""
    problem = problem_of(Cubic(), Visibility(40, 40, torch.device("cpu")), (1, 2, 1, 4))
    entmax = Problem(**{**vars(problem), "swap": attnswap.Entmax(alpha=4 / 3)})
    wanted = results(entmax, oracle, torch.float64)
    for attend in (oracle, native.attend):
        for found, exact in zip(results(problem, attend, torch.float64), wanted, strict=True):
            assert (found - exact).abs().max() < 1e-10


@needs_compiler
def test_a_wrong_slope_would_be_noticed(monkeypatch):
    """Negative control: with the sign of a printed slope turned the comparison fails."""
    from attnswap.attention import codegen

    original = codegen.trace

    def turned(swap: Swap, whole: bool = False) -> dict[str, Any]:
        trees = original(swap, whole)
        return {**trees, "norm_slope": -trees["norm_slope"]}

    monkeypatch.setattr(codegen, "trace", turned)
    swap = attnswap.Softpick(eps=0.123)  # compiled nowhere else
    problem = problem_of(swap, Visibility(20, 20, torch.device("cpu")), (1, 1, 1, 4))
    found, wanted = results(problem, native.attend, torch.float64), results(problem, oracle, torch.float64)
    assert (found[0] - wanted[0]).abs().max() < 1e-12
    assert (found[1] - wanted[1]).abs().max() > 1e-3


@needs_compiler
@pytest.mark.parametrize(
    "without", ["ONEDNN_MAX_CPU_ISA", pytest.param("torch.backends.mkldnn", marks=pytest.mark.slow)]
)
def test_bf16_without_products_of_bf16(without: str):
    """What serves processors that have none: the same result, and what tracing is told about its shapes."""
    program = f"""
import torch
torch.backends.mkldnn.set_flags({without == "ONEDNN_MAX_CPU_ISA"})
"""
    program += """
from attnswap.attention import attention
torch.manual_seed(0)
q, k = torch.randn(1, 4, 40, 16).bfloat16().requires_grad_(), torch.randn(1, 2, 40, 16).bfloat16()
def attend(q, k, backend):
    return attention(q, k, k, "softpick", is_causal=True, enable_gqa=True, backend=backend)
traced = torch.compile(lambda q: attend(q, k, "native"), backend="aot_eager", fullgraph=True)
wanted = torch.autograd.grad(attend(exact := q.detach().double().requires_grad_(), k.double(), "dense").sum(), exact)[0]
for out in (attend(q, k, "native"), traced(q)):
    (found,) = torch.autograd.grad(out.sum(), q)
    print(float((found.double() - wanted).abs().max() / wanted.abs().max()) < 2e-2)
"""
    environment = {**os.environ, **({without: "AVX512_CORE"} if without.isupper() else {})}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "True"], done.stderr


WITHOUT = """
import sys, warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import attnswap
    q = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    out = [attnswap.attention(q, q, q, "softpick", is_causal=True) for _ in range(3)][0]
ours = [str(w.message) for w in caught if "attnswap" in str(w.message)]
print(len(ours), ours[:1], float(out.double().sum()))
try:
    attnswap.attention(q, q, q, "softpick", backend="native")
except attnswap.errors.ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler"),
        pytest.param({"CXX": "false"}, "does not build", marks=pytest.mark.slow),
        pytest.param({"ATTNSWAP_NATIVE": "0"}, "ATTNSWAP_NATIVE", marks=pytest.mark.slow),
    ],
)
def test_without_a_compiler(change: dict[str, str], reason: str, tmp_path):
    """One warning that says what to do, and the same result from another backend."""
    environment = {**os.environ, "ATTNSWAP_CACHE": str(tmp_path), **change}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.strip().splitlines()
    told = reason in first and first.startswith("1 ")
    assert told or (first.startswith("0 ") and "ATTNSWAP_NATIVE" in change), first  # what a user asked for is no news
    assert reason in second
    q = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    whole = attnswap.attention(q, q, q, "softpick", is_causal=True, backend="dense")
    assert float(first.split()[-1]) == pytest.approx(float(whole.double().sum()), abs=1e-4)


@needs_compiler
def test_printed_vector_functions_are_exact():
    """The vectors the kernels use, at every magnitude, through a swap that shows its scores' images."""
    scores = torch.tensor([-200.0, -90.0, -87.5, -80.0, -20.0, -1.0, -1e-4, 0.0, 1e-4, 0.5, 1.0, 5.0, 20.0, 80.0])
    for function, reference in (
        (fn.exp, torch.exp),
        (fn.sigmoid, torch.sigmoid),
        (fn.softplus, torch.nn.functional.softplus),
        (lambda x: fn.tanh(x) + 1, lambda x: torch.tanh(x) + 1),
        (lambda x: fn.log1p(fn.exp(x)), lambda x: torch.log1p(torch.exp(x))),
        (lambda x: fn.log(2 + fn.abs(x)), lambda x: torch.log(2 + x.abs())),
    ):

        class Image(Swap):
            shifted: ClassVar[bool] = False

            def weight(self, s: Any, shift: Any, p: SimpleNamespace, function: Any = function) -> Any:
                return function(s)

            def norm(self, s: Any, shift: Any, p: SimpleNamespace) -> Any:
                return 0.0 * s

            def null(self, shift: Any, n: Any, p: SimpleNamespace) -> Any:
                return 1.0

        one = torch.ones(1, 1, 1, 1)
        for score in scores:
            problem = Problem(Image(), one * score, one, one, Visibility(1, 1, torch.device("cpu")), {}, 1.0)
            found, wanted = float(native.attend(problem)), float(reference(score.double()))
            assert math.isclose(found, wanted, rel_tol=3e-7, abs_tol=1e-30), (float(score), found, wanted)
