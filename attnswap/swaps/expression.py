"""The small vocabulary in which a swap writes its maths once.

Every function here takes torch tensors, plain numbers or :class:`Expr` nodes. On tensors it computes; on nodes it
builds an expression tree, from which derivatives and the C++ and Triton forms are printed. A swap therefore defines its
weight curve as one ordinary Python function and every backend speaks the same formula.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Expr:
    """A node of an expression tree.

    Attributes:
        op: A name of :data:`VOCABULARY`, an arithmetic operator, ``"symbol"`` or ``"constant"``.
        args: Child nodes; for a symbol its name, for a constant its value.
    """

    op: str
    args: tuple[Any, ...]

    def __add__(self, other: Any) -> "Expr":
        return node("add", self, other)

    def __radd__(self, other: Any) -> "Expr":
        return node("add", other, self)

    def __sub__(self, other: Any) -> "Expr":
        return node("sub", self, other)

    def __rsub__(self, other: Any) -> "Expr":
        return node("sub", other, self)

    def __mul__(self, other: Any) -> "Expr":
        return node("mul", self, other)

    def __rmul__(self, other: Any) -> "Expr":
        return node("mul", other, self)

    def __truediv__(self, other: Any) -> "Expr":
        return node("div", self, other)

    def __rtruediv__(self, other: Any) -> "Expr":
        return node("div", other, self)

    def __neg__(self) -> "Expr":
        return node("mul", -1.0, self)

    def __gt__(self, other: Any) -> "Expr":
        return node("gt", self, other)

    def __lt__(self, other: Any) -> "Expr":
        return node("gt", other, self)


def symbol(name: str) -> Expr:
    """Returns the variable ``name``."""
    return Expr("symbol", (name,))


def constant(value: float) -> Expr:
    """Returns a number as a node."""
    return Expr("constant", (float(value),))


def _value(expr: Expr) -> float | None:
    return expr.args[0] if expr.op == "constant" else None


def node(op: str, *args: Any) -> Expr:
    """Builds a node, folding the zeros and ones that symbolic derivatives are full of."""
    nodes = tuple(a if isinstance(a, Expr) else constant(a) for a in args)
    values = [_value(n) for n in nodes]
    if op in _ARITHMETIC and all(v is not None for v in values):
        return constant(_ARITHMETIC[op](*values))
    if op in ("add", "sub") and values[1] == 0.0:
        return nodes[0]
    if op == "add" and values[0] == 0.0:
        return nodes[1]
    if op == "mul" and 0.0 in values:
        return constant(0.0)
    if op in ("mul", "div") and values[1] == 1.0:
        return nodes[0]
    if op == "mul" and values[0] == 1.0:
        return nodes[1]
    if op == "div" and values[0] == 0.0:
        return constant(0.0)
    if op == "power" and values[1] in (1.0, 2.0):
        return nodes[0] if values[1] == 1.0 else nodes[0] * nodes[0]
    if op in VOCABULARY and op != "where" and all(v is not None for v in values):
        return constant(VOCABULARY[op].number(*values))
    return Expr(op, nodes)


_ARITHMETIC: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
}


@dataclass(frozen=True)
class Function:
    """One word of the vocabulary.

    Attributes:
        torch: How tensors compute it.
        number: How plain numbers compute it.
        cpp: The C++ form, with ``{0}``, ``{1}``, ... for the arguments and ``T`` for the scalar type; functions
            whose names begin with v are those of ``attention/native/maths.h``.
        triton: The Triton form; functions whose names begin with v are those of ``attention/triton/maths.py``.
        slopes: The partial derivative by each argument, as a function of the argument nodes.
    """

    torch: Callable[..., Tensor]
    number: Callable[..., float]
    cpp: str
    triton: str
    slopes: tuple[Callable[..., Any], ...]


def _overflowing(function: Callable[..., float]) -> Callable[..., float]:
    """Makes a function of plain numbers overflow to infinity, as tensors and C++ do."""

    def safe(*args: float) -> float:
        try:
            return function(*args)
        except OverflowError:
            return math.inf

    return safe


def _softplus(x: float) -> float:
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


VOCABULARY: dict[str, Function] = {
    "exp": Function(torch.exp, _overflowing(math.exp), "vexp<T>({0})", "vexp({0})", (lambda x: exp(x),)),
    "log": Function(
        torch.log,
        lambda x: math.log(x) if x > 0 else -math.inf,
        "vlog<T>({0})",
        "tl.log({0})",
        (lambda x: constant(1) / x,),
    ),
    "tanh": Function(torch.tanh, math.tanh, "vtanh<T>({0})", "vtanh({0})", (lambda x: 1 - tanh(x) * tanh(x),)),
    "relu": Function(
        torch.relu,
        lambda x: x if x > 0 else 0.0,
        "vrelu<T>({0})",
        "vrelu({0})",
        (lambda x: where(x > 0, 1.0, 0.0),),
    ),
    "abs": Function(torch.abs, math.fabs, "vabs<T>({0})", "tl.abs({0})", (lambda x: sign(x),)),
    "sign": Function(
        torch.sign, lambda x: float((x > 0) - (x < 0)), "vsign<T>({0})", "vsign({0})", (lambda x: constant(0),)
    ),
    "sigmoid": Function(
        torch.sigmoid, _sigmoid, "vsigmoid<T>({0})", "vsigmoid({0})", (lambda x: sigmoid(x) * sigmoid(-x),)
    ),
    "log1p": Function(
        torch.log1p,
        lambda x: math.log1p(x) if x > -1 else -math.inf,
        "vlog1p<T>({0})",
        "vlog1p({0})",
        (lambda x: constant(1) / (1 + x),),
    ),
    "softplus": Function(
        # Beyond 40 the rest is below the rounding of fp64; torch's default of 20 is not.
        lambda x: torch.nn.functional.softplus(x, threshold=40.0),
        _softplus,
        "vsoftplus<T>({0})",
        "vsoftplus({0})",
        (lambda x: sigmoid(x),),
    ),
    "power": Function(
        torch.pow,
        _overflowing(math.pow),
        "vpow<T>({0}, {1})",
        "vpow({0}, {1})",
        (lambda x, p: p * power(x, p - 1), lambda x, p: where(x > 0, power(x, p) * log(x), 0.0)),
    ),
    "minimum": Function(
        torch.minimum,
        min,
        "vmin<T>({0}, {1})",
        "vmin({0}, {1})",
        (lambda a, b: where(b > a, 1.0, 0.0), lambda a, b: where(b > a, 0.0, 1.0)),
    ),
    "maximum": Function(
        torch.maximum,
        max,
        "vmax<T>({0}, {1})",
        "vmax({0}, {1})",
        (lambda a, b: where(a > b, 1.0, 0.0), lambda a, b: where(a > b, 0.0, 1.0)),
    ),
    "where": Function(
        torch.where,
        lambda c, a, b: a if c else b,
        "({0} ? {1} : {2})",
        "tl.where({0}, {1}, {2})",
        (lambda c, a, b: constant(0), lambda c, a, b: where(c, 1.0, 0.0), lambda c, a, b: where(c, 0.0, 1.0)),
    ),
}


def _apply(name: str, *args: Any) -> Any:
    if any(isinstance(a, Expr) for a in args):
        return node(name, *args)
    function = VOCABULARY[name]
    like = next((a for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
    if like is None:
        return function.number(*args)
    return function.torch(*(a if isinstance(a, Tensor) else like.new_tensor(a) for a in args))


def exp(x: Any) -> Any:
    """The exponential."""
    return _apply("exp", x)


def log(x: Any) -> Any:
    """The natural logarithm (minus infinity at 0)."""
    return _apply("log", x)


def log1p(x: Any) -> Any:
    """``log(1 + x)``, exact near 0 (minus infinity at -1)."""
    return _apply("log1p", x)


def tanh(x: Any) -> Any:
    """The hyperbolic tangent."""
    return _apply("tanh", x)


def relu(x: Any) -> Any:
    """``max(x, 0)``."""
    return _apply("relu", x)


def abs(x: Any) -> Any:
    """The absolute value."""
    return _apply("abs", x)


def sign(x: Any) -> Any:
    """-1, 0 or 1."""
    return _apply("sign", x)


def sigmoid(x: Any) -> Any:
    """``1 / (1 + exp(-x))``."""
    return _apply("sigmoid", x)


def softplus(x: Any) -> Any:
    """``log(1 + exp(x))``, exact at every magnitude."""
    return _apply("softplus", x)


def power(x: Any, p: Any) -> Any:
    """``x ** p`` for non-negative ``x``."""
    return _apply("power", x, p)


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two values."""
    return _apply("minimum", a, b)


def maximum(a: Any, b: Any) -> Any:
    """The larger of two values."""
    return _apply("maximum", a, b)


def clamp(x: Any, low: Any, high: Any) -> Any:
    """``x`` held between ``low`` and ``high``."""
    return minimum(maximum(x, low), high)


def where(condition: Any, a: Any, b: Any) -> Any:
    """``a`` where the condition holds, else ``b``."""
    if isinstance(condition, bool):
        return a if condition else b
    if isinstance(condition, Tensor) and not isinstance(a, Expr) and not isinstance(b, Expr):
        return torch.where(condition, a, b)
    return _apply("where", condition, a, b)


def derivative(expr: Expr, by: str) -> Expr:
    """Returns the symbolic derivative of an expression.

    Args:
        expr: The expression.
        by: The name of the symbol to differentiate by.

    Returns:
        A new expression over the same symbols.
    """
    if expr.op == "symbol":
        return constant(float(expr.args[0] == by))
    if expr.op in ("constant", "gt"):
        return constant(0)
    a = expr.args
    d = [derivative(x, by) for x in a]
    if expr.op in ("add", "sub"):
        return d[0] + d[1] if expr.op == "add" else d[0] - d[1]
    if expr.op == "mul":
        return d[0] * a[1] + a[0] * d[1]
    if expr.op == "div":
        return d[0] / a[1] - expr * d[1] / a[1]
    total = constant(0)
    for slope, inner in zip(VOCABULARY[expr.op].slopes, d, strict=True):
        if _value(inner) != 0.0:
            total = total + slope(*a) * inner
    return total
