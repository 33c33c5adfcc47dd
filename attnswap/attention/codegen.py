"""Print a swap's maths as C++ from its one definition."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from attnswap.swaps.base import Swap
from attnswap.swaps.expression import VOCABULARY, Expr, constant, derivative, symbol

MATHS = Path(__file__).parent / "native" / "maths.h"
"""The functions that printed code calls."""

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "gt": ">"}


def parameters(swap: Swap) -> list[str]:
    """Returns the per-head numbers the maths reads, in order: lambda, and the per-head features."""
    return ["ramp", *(k for k, f in swap.features().items() if f.per == "head")]


def arguments(swap: Swap) -> list[str]:
    """Returns the names of the printed functions' arguments, in order."""
    return ["s", "shift", "n", *parameters(swap)]


def trace(swap: Swap, whole: bool = False) -> dict[str, Expr]:
    """Returns the swap's maths as expression trees over ``s``, ``shift``, ``n``, ``ramp`` and its per-head features.

    Args:
        swap: The swap.
        whole: lambda is 1, a number that folds away, instead of a symbol.

    Returns:
        ``weight``, ``norm`` and ``null``; their derivatives by the score, ``weight_slope`` and ``norm_slope``; and by
        each per-head number, such as ``weight_by_ramp``; ``floor``, where the swap has a smallest shift; and of row
        swaps ``weight_by_shift``, ``power``, and ``low`` and ``high``, whose ``s`` is the row's largest score.
    """
    p = SimpleNamespace(**{k: symbol(k) for k in parameters(swap)})
    if whole:
        p.ramp = 1.0
    s, shift, n = symbol("s"), symbol("shift"), symbol("n")
    maths = {"weight": swap.weight(s, shift, p), "norm": swap.norm(s, shift, p), "null": swap.null(shift, n, p)}
    trees = {k: as_tree(v) for k, v in maths.items()}
    for name in ("weight", "norm"):
        trees[f"{name}_slope"] = derivative(trees[name], "s")
    for name in maths:
        trees |= {f"{name}_by_{k}": derivative(trees[name], k) for k in parameters(swap)}
    if swap.threshold:
        low, high = swap.bracket(s, n, p)
        own = {
            "low": low,
            "high": high,
            "power": swap.mass_power(p),
            "weight_by_shift": derivative(trees["weight"], "shift"),
        }
        trees |= {k: as_tree(v) for k, v in own.items()}
    floor = swap.shift_floor(p)
    return trees if floor is None else {**trees, "floor": as_tree(floor)}


def as_tree(value: Any) -> Expr:
    """Returns a traced value, which may be a plain number, as a node."""
    return value if isinstance(value, Expr) else constant(value)


def cpp(swap: Swap, whole: bool = False) -> str:
    """Prints the trees of :func:`trace` as C++ function templates; they call the functions of :data:`MATHS`.

    Returns:
        Source with functions such as ``weight``, ``norm``, ``null``, ``weight_slope`` and ``norm_slope`` that take
        ``s``, ``shift``, ``n``, ``ramp`` and the swap's per-head features, in the order of :func:`arguments`.
    """
    return "\n".join(function(name, tree, arguments(swap)) for name, tree in trace(swap, whole).items())


def function(name: str, tree: Expr, names: list[str]) -> str:
    """Prints one tree as a function template of the symbols ``names``."""
    lines: list[str] = []
    result = _emit(tree, lines, {})
    signature = ", ".join(f"T {argument}" for argument in names)
    body = "".join(f"  {line}\n" for line in lines)
    return f"template <typename T>\ninline T {name}({signature}) {{\n{body}  return {result};\n}}\n"


def _emit(expr: Expr, lines: list[str], seen: dict[Expr, str]) -> str:
    """Writes what an expression needs to ``lines``, each shared part once, and returns the name of its value."""
    if expr.op == "symbol":
        return str(expr.args[0])
    if expr.op == "constant":
        return f"number<T>({expr.args[0]!r})"
    if expr not in seen:
        args = [_emit(a, lines, seen) for a in expr.args]
        form = (
            f"({args[0]} {_INFIX[expr.op]} {args[1]})" if expr.op in _INFIX else VOCABULARY[expr.op].cpp.format(*args)
        )
        seen[expr] = f"t{len(seen)}"
        lines.append(f"const {'auto' if expr.op == 'gt' else 'T'} {seen[expr]} = {form};")
    return seen[expr]
