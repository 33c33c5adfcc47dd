"""Print a swap's maths as C++ or Triton from its one definition."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnswap.attention.lazy import constant, once
from attnswap.swaps.base import Numbers, Swap
from attnswap.swaps.expression import VOCABULARY, Expr, Function, derivative, symbol
from attnswap.swaps.expression import constant as number_node
from attnswap.swaps.statistics import Root

MATHS = Path(__file__).parent / "native" / "maths.h"
"""The functions that printed code calls."""

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "gt": ">"}


def parameters(swap: Swap) -> list[str]:
    """Returns the per-head numbers the maths reads, in order: lambda, and the per-head features."""
    return ["ramp", *(k for k, f in swap.features().items() if f.per == "head" and f.width is None)]


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
        each per-head number, such as ``weight_by_ramp``; ``floor``, where the swap has a smallest shift; and of swaps
        with a root (:func:`solved`), which is then what ``shift`` stands for, ``weight_by_shift``, ``power``, and
        ``low`` and ``high``, whose ``s`` is the row's largest score.
    """
    p, root = _numbers(swap, whole), solved(swap)
    s, shift, n = symbol("s"), symbol("shift"), symbol("n")
    maths = {"weight": swap.weight(s, shift, p), "norm": swap.norm(s, shift, p), "null": swap.null(shift, n, p)}
    trees = {k: as_tree(v) for k, v in maths.items()}
    for name in ("weight", "norm"):
        trees[f"{name}_slope"] = derivative(trees[name], "s")
    for name in maths:
        trees |= {f"{name}_by_{k}": derivative(trees[name], k) for k in parameters(swap)}
    if root:
        low, high = root.bracket(s, n, p)
        own = {
            "low": low,
            "high": high,
            "power": root.power(p),
            "weight_by_shift": derivative(trees["weight"], "shift"),
        }
        trees |= {k: as_tree(v) for k, v in own.items()}
    floor = swap.shift_floor(p)
    return trees if floor is None else {**trees, "floor": as_tree(floor)}


def _numbers(swap: Swap, whole: bool) -> Numbers:
    """Returns the numbers of the maths as symbols; a root is the shift of the row."""
    named: dict[str, Any] = {k: symbol(k) for k in parameters(swap)}
    roots = {k: symbol("shift") for k, kind in swap.statistics().items() if isinstance(kind, Root)}
    return Numbers(**named | roots | {"n": symbol("n")} | ({"ramp": 1.0} if whole else {}))


def solved(swap: Swap) -> Root | None:
    """Returns the statistic for which kernels solve: the only one of a swap, a root, in place of the row's shift."""
    kinds = list(swap.statistics().values())
    return kinds[0] if len(kinds) == 1 and isinstance(kinds[0], Root) else None


@constant
@once
def maths_refusal(swap: Swap) -> str | None:
    """Says what keeps kernels from computing the weights of a swap, or None.

    They know two kinds: weights of a score alone, and of a score and a root at which these weights sum to one.
    """
    if swap.softmax_weighted:
        return None
    if "statistics" in swap.stages and solved(swap) is None:
        return f'it does not compute the statistics of "{swap.name}"'
    try:
        trees = trace(swap)
        p, s = _numbers(swap, False), symbol("s")
        weight = as_tree(swap.weight(s, symbol("unknown"), p))
    except Exception as error:  # a swap's maths may be any Python
        return f'the maths of "{swap.name}" is not written in the words of attnswap.swaps.expression ({error})'
    if any("n" in symbols(trees[name]) for name in ("weight", "norm", "floor", "power") if name in trees):
        return f'the weights of "{swap.name}" depend on n, which it has for the null term alone'
    root = solved(swap)
    if root is None:
        relative = not swap.shifted or _relative(swap)
        return None if relative else f'the weights of "{swap.name}" are not relative to the shift: set shifted = False'
    kind = type(swap)
    if kind.norm is not Swap.norm or kind.null is not Swap.null or kind.shift_floor is not Swap.shift_floor:
        return f'"{swap.name}" divides by more than the weights, which it takes to sum to one at the root'
    same = weight == as_tree(root.of(s, symbol("shift"), p)) and root.target == 1
    return None if same else f'the weights of "{swap.name}" do not sum to one at its root'


@torch.no_grad()
def _relative(swap: Swap) -> bool:
    """Whether weight, norm and null become e^-x times as large when the shift is raised by x, as kernels take it."""
    generator = torch.Generator().manual_seed(0)
    s, shift, n = (torch.randn(64, dtype=torch.float64, generator=generator) + x for x in (0.0, 2.0, 0.0))
    numbers = {k: torch.rand(64, dtype=torch.float64, generator=generator) for k in parameters(swap)}
    p, n = Numbers(**numbers), n.abs() + 1

    def maths(shift: torch.Tensor) -> list[torch.Tensor]:
        found = (swap.weight(s, shift, p), swap.norm(s, shift, p), swap.null(shift, n, p))
        return [torch.as_tensor(x, dtype=s.dtype) for x in found]

    return all(torch.allclose(a, b * math.e, rtol=1e-9) for a, b in zip(maths(shift), maths(shift + 1), strict=True))


def symbols(tree: Expr) -> set[str]:
    """Returns the names of the symbols in a tree."""
    if tree.op == "symbol":
        return {str(tree.args[0])}
    return set() if tree.op == "constant" else set().union(*(symbols(x) for x in tree.args))


def as_tree(value: Any) -> Expr:
    """Returns a traced value, which may be a plain number, as a node."""
    return value if isinstance(value, Expr) else number_node(value)


@dataclass(frozen=True)
class Language:
    """How printed code looks.

    Attributes:
        form: Picks a word's form, with ``{0}``, ``{1}``, ... for its arguments.
        number: Writes a number.
        define: Gives a value a name: from the operation, the name and the form.
        function: Writes a function: from its name, its arguments, its lines and its result.
        exp_less: The form of ``exp(a - b)``, where it has one of its own.
    """

    form: Callable[[Function], str]
    number: Callable[[float], str]
    define: Callable[[str, str, str], str]
    function: Callable[[str, list[str], list[str], str], str]
    exp_less: str | None = None


def _cpp_function(name: str, names: list[str], lines: list[str], result: str) -> str:
    signature = ", ".join(f"T {argument}" for argument in names)
    body = "".join(f"  {line}\n" for line in lines)
    return f"template <typename T>\ninline T {name}({signature}) {{\n{body}  return {result};\n}}\n"


def _triton_function(name: str, names: list[str], lines: list[str], result: str) -> str:
    body = "".join(f"    {line}\n" for line in lines)
    return f"@triton.jit\ndef {name}({', '.join(names)}):\n{body}    return {result}\n\n"


CPP = Language(
    form=lambda word: word.cpp,
    number=lambda x: f"number<T>({x!r})",
    define=lambda op, name, form: f"const {'auto' if op == 'gt' else 'T'} {name} = {form};",
    function=_cpp_function,
)
"""Function templates of a scalar type ``T``; they call the functions of :data:`MATHS`."""

TRITON = Language(
    form=lambda word: word.triton,
    number=lambda x: f"number({str(x).replace('inf', '1e999')})",
    define=lambda op, name, form: f"{name} = {form}",
    function=_triton_function,
    exp_less="vexp_less({0}, {1})",
)
"""Device functions of fp32 tiles; they call the functions of ``attention/triton/maths.py``."""


def cpp(swap: Swap, whole: bool = False) -> str:
    """Prints the trees of :func:`trace` as C++, for lambda 1 alone where it is ``whole``.

    Returns:
        Source with functions such as ``weight``, ``norm``, ``null``, ``weight_slope`` and ``norm_slope`` that take
        ``s``, ``shift``, ``n``, ``ramp`` and the swap's per-head features, in the order of :func:`arguments`.
    """
    return functions(swap, CPP, whole)


def functions(swap: Swap, language: Language, whole: bool = False) -> str:
    """Prints every tree of :func:`trace` as a function of :func:`arguments`."""
    return "\n".join(function(name, tree, arguments(swap), language) for name, tree in trace(swap, whole).items())


def function(name: str, tree: Expr, names: list[str], language: Language) -> str:
    """Prints one tree as a function of the symbols ``names``."""
    lines: list[str] = []
    result = _emit(tree, lines, {}, language)
    return language.function(name, names, lines, result)


def _emit(expr: Expr, lines: list[str], seen: dict[Expr, str], language: Language) -> str:
    """Writes what an expression needs to ``lines``, each shared part once, and returns the name of its value."""
    if expr.op == "symbol":
        return str(expr.args[0])
    if expr.op == "constant":
        return language.number(expr.args[0])
    if expr not in seen:
        less = language.exp_less if expr.op == "exp" and expr.args[0].op == "sub" else None
        args = [_emit(a, lines, seen, language) for a in (expr.args[0].args if less else expr.args)]
        infix = f"({{0}} {_INFIX[expr.op]} {{1}})" if expr.op in _INFIX else None
        form = (less or infix or language.form(VOCABULARY[expr.op])).format(*args)
        seen[expr] = f"t{len(seen)}"
        lines.append(language.define(expr.op, seen[expr], form))
    return seen[expr]
