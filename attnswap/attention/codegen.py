"""Print a swap's maths as C++ from its one definition."""

from types import SimpleNamespace

from attnswap.swaps.base import Swap
from attnswap.swaps.expression import VOCABULARY, Expr, constant, derivative, symbol

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "gt": ">"}


def trace(swap: Swap) -> dict[str, Expr]:
    """Returns the swap's maths as expression trees over ``s``, ``shift``, ``n``, ``ramp`` and its per-head features.

    Returns:
        ``weight``, ``norm``, their derivatives by the score ``weight_slope`` and ``norm_slope``, and ``null``.
    """
    heads = {k: symbol(k) for k, f in swap.features().items() if f.per == "head"}
    p = SimpleNamespace(ramp=symbol("ramp"), **heads)
    s, shift, n = symbol("s"), symbol("shift"), symbol("n")
    maths = {"weight": swap.weight(s, shift, p), "norm": swap.norm(s, shift, p), "null": swap.null(shift, n, p)}
    trees = {k: v if isinstance(v, Expr) else constant(v) for k, v in maths.items()}
    for name in ("weight", "norm"):
        trees[f"{name}_slope"] = derivative(trees[name], "s")
    return trees


def cpp(swap: Swap) -> str:
    """Prints one C++ function template for each of the trees of :func:`trace`.

    Returns:
        Source with functions ``weight``, ``norm``, ``null``, ``weight_slope`` and ``norm_slope`` that take ``s``,
        ``shift``, ``n``, ``ramp`` and the swap's per-head features, in the order of :func:`arguments`.
    """
    signature = ", ".join(f"T {name}" for name in arguments(swap))
    functions = []
    for name, tree in trace(swap).items():
        lines: list[str] = []
        result = _emit(tree, lines, {})
        body = "".join(f"  {line}\n" for line in lines)
        functions.append(f"template <typename T>\ninline T {name}({signature}) {{\n{body}  return {result};\n}}\n")
    return "#include <algorithm>\n#include <cmath>\n\n" + "\n".join(functions)


def arguments(swap: Swap) -> list[str]:
    """Returns the names of the printed functions' arguments, in order."""
    return ["s", "shift", "n", "ramp", *(k for k, f in swap.features().items() if f.per == "head")]


def _emit(expr: Expr, lines: list[str], seen: dict[Expr, str]) -> str:
    """Writes what an expression needs to ``lines``, each shared part once, and returns the name of its value."""
    if expr.op == "symbol":
        return str(expr.args[0])
    if expr.op == "constant":
        return f"T({expr.args[0]!r})"
    if expr not in seen:
        args = [_emit(a, lines, seen) for a in expr.args]
        form = (
            f"({args[0]} {_INFIX[expr.op]} {args[1]})" if expr.op in _INFIX else VOCABULARY[expr.op].cpp.format(*args)
        )
        seen[expr] = f"t{len(seen)}"
        lines.append(f"const {'bool' if expr.op == 'gt' else 'T'} {seen[expr]} = {form};")
    return seen[expr]
