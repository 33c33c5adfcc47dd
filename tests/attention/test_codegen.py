"""A swap's maths is written once: the C++ form, the derivatives and the tensor form all say the same.

Everything printed is compiled once, into one shared library, and called with double and float.
"""

import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnswap
from attnswap.attention.codegen import arguments, cpp, trace
from attnswap.swaps import ModelInfo, Swap, base
from attnswap.swaps import expression as fn
from attnswap.swaps.expression import VOCABULARY, Expr, constant, derivative, symbol
from tests.helpers.calls import Case, bound, variants
from tests.helpers.generated_code import FUNCTIONS, assert_close, build, check_cpp, rows_of, torch_forms
from tests.helpers.ids import variant_id


class EveryWord(Swap):
    """A swap that uses the whole vocabulary, with per-head features; no name, so it is not registered."""

    def features(self) -> dict[str, base.Feature]:
        return {"alpha": base.Feature("head", initial=1.0), "beta": base.Feature("head", initial=0.5)}

    def weight(self, s: Any, shift: Any, p: SimpleNamespace) -> Any:
        t = p.alpha * fn.clamp(s, -3.0, 3.0) - p.beta
        soft = fn.softplus(t) + fn.sigmoid(t) * fn.tanh(p.beta * t)
        return fn.where(s > p.beta, fn.power(fn.relu(s) + 0.5, 1 + p.alpha * p.alpha), soft / (1 + fn.abs(t)))

    def norm(self, s: Any, shift: Any, p: SimpleNamespace) -> Any:
        t = fn.maximum(fn.minimum(s, 2.0 * p.alpha), -shift)
        return fn.log(1 + fn.exp(-fn.abs(t))) + fn.sign(t - p.beta) * t + (1 - s) / (2 + fn.exp(shift - 9))

    def null(self, shift: Any, n: Any, p: SimpleNamespace) -> Any:
        return n * p.ramp + fn.where(p.beta < n, 1.0, 2.0)


def elementwise() -> list[Swap]:
    case = Case()
    found = [bound(s, case) for s in variants() if s.traits.route == "elementwise"]
    return [*found, EveryWord()]


# --- random expression trees ------------------------------------------------------------------------------------------


def random_tree(rng: random.Random, depth: int) -> Expr:
    """A tree over x, y and z that stays finite for moderate values, drawn from the whole vocabulary."""
    if depth == 0:
        return rng.choice([symbol("x"), symbol("y"), symbol("z"), constant(round(rng.uniform(-2, 2), 3))])

    def child() -> Expr:
        return random_tree(rng, depth - 1)

    forms: list[Callable[[], Expr]] = [
        lambda: child() + child(),
        lambda: child() - child(),
        lambda: child() * child(),
        lambda: child() / (1 + fn.abs(child())),
        lambda: -child(),
        lambda: 2.0 - child(),
        lambda: 1.5 / (1.25 + fn.tanh(child())),
        lambda: fn.exp(fn.tanh(child())),
        lambda: fn.log(1.0 + fn.abs(child())),
        lambda: fn.tanh(child()),
        lambda: fn.relu(child()),
        lambda: fn.abs(child()),
        lambda: fn.sign(child()) * child(),
        lambda: fn.sigmoid(child()),
        lambda: fn.softplus(child()),
        lambda: fn.power(0.5 + fn.abs(child()), fn.tanh(child())),
        lambda: fn.power(0.1 + fn.relu(child()), 2.0),
        lambda: fn.minimum(child(), child()),
        lambda: fn.maximum(child(), child()),
        lambda: fn.clamp(child(), -0.7, 1.1),
        lambda: fn.where(child() > child(), child(), child()),
        lambda: fn.where(child() < child(), child(), 0.3),
    ]
    return as_expr(rng.choice(forms)())


def as_expr(value: Any) -> Expr:
    return value if isinstance(value, Expr) else constant(value)


def evaluate(tree: Expr, values: dict[str, Tensor]) -> Tensor:
    """Computes a tree with torch, one node at a time."""
    arithmetic = {
        "add": torch.add,
        "sub": torch.sub,
        "mul": torch.mul,
        "div": torch.div,
        "gt": torch.gt,
    }
    like = next(iter(values.values()))
    if tree.op == "symbol":
        return values[tree.args[0]]
    if tree.op == "constant":
        return torch.full_like(like, tree.args[0])
    parts = [evaluate(a, values) for a in tree.args]
    return arithmetic[tree.op](*parts) if tree.op in arithmetic else VOCABULARY[tree.op].torch(*parts)


def trees() -> list[Expr]:
    rng = random.Random(0)
    return [random_tree(rng, depth) for depth in (1, 2, 3, 4) for _ in range(25)]


class Printed(Swap):
    """Lets a tree over x, y, z be printed as if it were a swap's weight (s, shift, n)."""

    def __init__(self, tree: Expr) -> None:
        object.__setattr__(self, "tree", tree)

    def __repr__(self) -> str:
        return repr(self.tree)

    def weight(self, s: Any, shift: Any, p: SimpleNamespace) -> Any:
        return self._renamed(self.tree, {"x": s, "y": shift, "z": p.ramp})

    def norm(self, s: Any, shift: Any, p: SimpleNamespace) -> Any:
        return as_expr(derivative(self.weight(s, shift, p), "shift"))

    def null(self, shift: Any, n: Any, p: SimpleNamespace) -> Any:
        return as_expr(derivative(self.weight(symbol("s"), shift, p), "ramp"))

    def _renamed(self, tree: Expr, names: dict[str, Expr]) -> Expr:
        if tree.op == "symbol":
            return names[tree.args[0]]
        if tree.op == "constant":
            return tree
        return Expr(tree.op, tuple(self._renamed(a, names) for a in tree.args))


# --- the compiled library ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Swap, str, Tensor], Tensor]:
    """Everything these tests print, compiled once."""
    return build([*elementwise(), *(Printed(t) for t in trees())], tmp_path_factory.mktemp("codegen"))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("swap", elementwise(), ids=variant_id)
def test_the_cpp_form_equals_the_tensor_form(compiled, swap: Swap):
    check_cpp(compiled, swap, 1e-3 if isinstance(swap, EveryWord) else 5e-5)


def test_softpick_in_cpp_equals_the_formula_written_out(compiled):
    """Against plain Python numbers: relu(e^z - c), |e^z - c| and c eps, each times e^-m."""
    swap = attnswap.Softpick()
    for s, shift, c in ((2.0, 3.0, 1.0), (-1.0, 0.5, 1.0), (0.4, 0.4, 0.25), (-2.0, -0.3, 0.5), (-0.5, 0.0, 0.125)):
        row = torch.tensor([[s, shift, 5.0, c]], dtype=torch.float64)
        difference = (math.exp(s) - c) * math.exp(-shift)
        assert float(compiled(swap, "weight", row)) == pytest.approx(max(difference, 0.0), rel=1e-13, abs=0)
        assert float(compiled(swap, "norm", row)) == pytest.approx(abs(difference), rel=1e-13)
        assert float(compiled(swap, "null", row)) == pytest.approx(c * 1e-6 * math.exp(-shift), rel=1e-13)
        slope = math.exp(s - shift)
        wanted = slope if difference > 0 else 0.0
        assert float(compiled(swap, "weight_slope", row)) == pytest.approx(wanted, rel=1e-13, abs=0)
        assert float(compiled(swap, "norm_slope", row)) == pytest.approx(math.copysign(slope, difference), rel=1e-13)


def test_the_printed_sigmoid_slope_keeps_its_precision_in_the_tails(compiled):
    scores = [-700.0, -40.0, -3.0, 0.5, 20.0, 40.0, 700.0]
    rows = torch.tensor([[s, 0.0, 9.0, 1.0] for s in scores], dtype=torch.float64)
    swap = bound(attnswap.Sigmoid(bias=-1.5), Case())
    wanted = [math.exp(-abs(s)) / (1 + math.exp(-abs(s))) ** 2 for s in scores]
    assert compiled(swap, "weight_slope", rows).tolist() == pytest.approx(wanted, rel=1e-13, abs=0)


def test_softpick_in_cpp_is_finite_at_extreme_scores(compiled):
    rows = torch.tensor([[s, max(s, 0.0), 9.0, 1.0] for s in (-1e4, -800.0, 0.0, 800.0, 1e4)], dtype=torch.float64)
    for function in FUNCTIONS:
        for dtype in (torch.float64, torch.float32):
            assert compiled(attnswap.Softpick(), function, rows.to(dtype)).isfinite().all()


def test_printed_source_shares_common_parts_and_names_its_arguments():
    source = cpp(attnswap.Softpick())
    assert arguments(attnswap.Softpick()) == ["s", "shift", "n", "ramp"]
    learned = attnswap.Sigmoid(bias="learned").bind(ModelInfo(4, 2, 8, 16))
    assert arguments(learned) == ["s", "shift", "n", "ramp", "bias"]
    weight = source.split("inline T norm")[0]
    assert weight.count("vexp") == 2, "a shared part is printed twice"
    for function in FUNCTIONS:
        assert f"inline T {function}(T s, T shift, T n, T ramp)" in source


def test_the_trace_of_a_swap_is_its_own_maths():
    swap = attnswap.Softpick()
    rows = rows_of(swap)
    values = dict(zip(arguments(swap), rows.unbind(1), strict=True))
    wanted = torch_forms(swap, rows)
    for name, tree in trace(swap).items():
        assert_close(evaluate(tree, values).expand(len(rows)), wanted[name], 1e-14, name)


# --- the vocabulary ---------------------------------------------------------------------------------------------------

ONE = ("exp", "log", "log1p", "tanh", "relu", "abs", "sign", "sigmoid", "softplus")
POINTS = torch.tensor([-7.3, -1.1, -0.2, 0.15, 0.8, 1.9, 6.4], dtype=torch.float64)


def word_cases() -> list[tuple[str, tuple[Tensor, ...]]]:
    pairs = torch.cartesian_prod(POINTS, POINTS + 0.05).unbind(1)
    found: list[tuple[str, tuple[Tensor, ...]]] = [(w, (POINTS.abs() if w.startswith("log") else POINTS,)) for w in ONE]
    found.append(("power", (pairs[0].abs(), pairs[1])))
    found += [("minimum", pairs), ("maximum", pairs)]
    return found


def test_the_word_cases_cover_the_vocabulary():
    assert {w for w, _ in word_cases()} | {"where"} == set(VOCABULARY)
    assert all(callable(getattr(fn, word)) for word in VOCABULARY)


@pytest.mark.parametrize(("word", "points"), word_cases(), ids=[word for word, _ in word_cases()])
def test_a_word_says_the_same_in_every_form(word: str, points: tuple[Tensor, ...]):
    leaves = [p.clone().requires_grad_() for p in points]
    value = getattr(fn, word)(*leaves)
    number = [getattr(fn, word)(*(float(p[i]) for p in points)) for i in range(len(points[0]))]
    assert all(type(x) is float for x in number), "a number does not stay a number"
    assert torch.allclose(value.detach(), torch.tensor(number, dtype=torch.float64), rtol=1e-14, atol=0)
    names = ["x", "y", "z"][: len(points)]
    tree = getattr(fn, word)(*(symbol(n) for n in names))
    values = dict(zip(names, points, strict=True))
    assert torch.equal(evaluate(tree, values), value.detach())
    slopes = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    for name, wanted in zip(names, slopes, strict=True):
        got = evaluate(derivative(tree, name), values)
        wanted = torch.zeros_like(got) if wanted is None else wanted
        assert torch.allclose(got, wanted, rtol=1e-13, atol=3e-16), f"d {word} / d {name}"


def test_where_chooses_values_and_slopes():
    a, b = POINTS, POINTS.flip(0) * 2
    tree = fn.where(symbol("c") > 0.0, symbol("a") * 3.0, symbol("b"))
    values = {"c": POINTS, "a": a, "b": b}
    assert torch.equal(evaluate(tree, values), torch.where(POINTS > 0, a * 3, b))
    zero = torch.zeros_like(POINTS)
    assert torch.equal(evaluate(derivative(tree, "a"), values), torch.where(POINTS > 0, 3 + zero, zero))
    assert torch.equal(evaluate(derivative(tree, "b"), values), torch.where(POINTS > 0, zero, 1 + zero))
    assert not evaluate(derivative(tree, "c"), values).any()
    assert fn.where(2.0 > 1.0, 5.0, 6.0) == 5.0


def test_words_mix_tensors_and_numbers_in_the_dtype_of_the_tensor():
    x = POINTS
    assert torch.equal(fn.maximum(x, 0.1), x.clamp(min=0.1))
    assert torch.equal(fn.minimum(0.1, x), x.clamp(max=0.1))
    assert torch.equal(fn.clamp(x, -0.1, 0.1), x.clamp(-0.1, 0.1))
    assert torch.equal(fn.power(x.abs(), 1.5), x.abs() ** 1.5)
    assert torch.equal(fn.power(2.0, x), 2**x)
    assert torch.equal(fn.where(x > 0, x, 0.1), torch.where(x > 0, x, torch.full_like(x, 0.1)))
    assert torch.equal(fn.where(2.0 > 1.0, x, 0.1), x), "a condition between numbers beside tensors"
    assert fn.where(x > 0, x.float(), 1.0).dtype == torch.float32


@pytest.mark.parametrize("size", [30.0, 1e3, 1e4])
def test_softplus_and_sigmoid_are_stable_far_out(size: float):
    far = torch.tensor([-size, size], dtype=torch.float64, requires_grad=True)
    cases = {
        "softplus": (fn.softplus, [math.exp(-size), size + math.exp(-size)], [math.exp(-size), 1.0]),
        "sigmoid": (fn.sigmoid, [math.exp(-size), 1.0], [math.exp(-size)] * 2),
        "tanh": (fn.tanh, [-1.0, 1.0], [0.0, 0.0]),
    }
    for word, (function, values, slopes) in cases.items():
        got = function(far)
        assert got.detach().tolist() == pytest.approx(values, rel=1e-12, abs=0)
        assert [function(float(x)) for x in far.detach()] == pytest.approx(values, rel=1e-12, abs=0)
        assert torch.autograd.grad(got.sum(), far)[0].tolist() == pytest.approx(slopes, rel=1e-12, abs=3e-16)
        tree = derivative(function(symbol("x")), "x")
        printed = evaluate(tree, {"x": far.detach()})
        tolerance = 3e-16 if word == "tanh" else 0.0
        assert printed.tolist() == pytest.approx(slopes, rel=1e-12, abs=tolerance), f"slope of {word}"


def test_plain_numbers_overflow_as_tensors_do():
    """exp(1000) is infinity for a tensor; a plain number must not raise instead."""
    assert fn.exp(1000.0) == math.inf == float(fn.exp(torch.tensor(1000.0)))
    assert fn.power(1e300, 2.0) == math.inf
    assert fn.log(0.0) == -math.inf == float(fn.log(torch.tensor(0.0)))


def test_the_slope_of_a_power_by_its_exponent_is_zero_at_zero():
    """0 ** p is 0 for every p > 0, so moving p changes nothing; 0 * log 0 must not become NaN."""
    tree = derivative(fn.power(fn.relu(symbol("x")), symbol("p")), "p")
    got = evaluate(tree, {"x": torch.tensor([-1.0, 0.0, 2.0]), "p": torch.tensor([2.0, 2.0, 2.0])})
    assert got.tolist() == pytest.approx([0.0, 0.0, 4 * math.log(2)])


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_derivatives_of_random_trees_equal_autograd(depth: int):
    rng = random.Random(depth)
    generator = torch.Generator().manual_seed(depth)
    moved = 0
    for _ in range(60):
        tree = random_tree(rng, depth)
        values = {n: torch.randn(32, generator=generator, dtype=torch.float64).requires_grad_() for n in "xyz"}
        out = evaluate(tree, values)
        slopes = (
            torch.autograd.grad(out.sum(), list(values.values()), allow_unused=True)
            if out.requires_grad
            else [None] * 3
        )
        for name, wanted in zip("xyz", slopes, strict=True):
            got = evaluate(derivative(tree, name), {k: v.detach() for k, v in values.items()})
            wanted = torch.zeros_like(got) if wanted is None else wanted
            scale = wanted.abs().clamp(min=1.0)
            assert ((got - wanted).abs() / scale).max() < 1e-11, f"d/d{name} of {tree}"
            moved += bool(wanted.any())
    assert moved > 40


def test_random_trees_and_their_derivatives_in_cpp_equal_torch(compiled):
    generator = torch.Generator().manual_seed(7)
    for tree in trees():
        rows = torch.randn(32, 4, generator=generator, dtype=torch.float64)
        values = dict(zip("xyz", (rows[:, 0], rows[:, 1], rows[:, 3]), strict=True))
        printed = Printed(tree)
        for function, wanted in (
            ("weight", evaluate(tree, values)),
            ("weight_slope", evaluate(derivative(tree, "x"), values)),
            ("norm", evaluate(derivative(tree, "y"), values)),
            ("null", evaluate(derivative(tree, "z"), values)),
        ):
            got = compiled(printed, function, rows)
            scale = wanted.abs().clamp(min=1.0)
            assert ((got - wanted).abs() / scale).max() < 1e-11, f"{function} of {tree}"


def test_trees_fold_what_needs_no_computing():
    x = symbol("x")
    assert (x + 0.0, 0.0 + x, x - 0.0, x * 1.0, 1.0 * x, x / 1.0) == (x,) * 6
    assert x * 0.0 == 0.0 * x == constant(0)
    assert as_expr(constant(2.0) * 3.0 + 1.0) == constant(7.0)
    assert derivative(x * x, "y") == constant(0)
    assert derivative(fn.exp(2.0 * x), "x") == fn.exp(2.0 * x) * 2.0
