"""The Triton functions of one swap, in the form the kernels call: printed as source and loaded from memory."""

import functools
import hashlib
import linecache
from types import SimpleNamespace
from typing import Any

from attnswap.attention.codegen import TRITON, functions, parameters, solved, trace
from attnswap.swaps.base import Swap
from attnswap.swaps.expression import constant

HEAD = """
import triton
import triton.language as tl

from attnswap.attention.triton.maths import (
    number, vexp, vexp_less, vlog1p, vmax, vmin, vpow, vrelu, vsigmoid, vsign, vsoftplus, vtanh
)


"""

GLUE = """
@triton.jit
def load_numbers(pointer):
    return ({loads},)


@triton.jit
def row_floor(p):
    return {floor}


@triton.jit
def row_null(shift, n, p):
    return null(shift, shift, n{p})


@triton.jit
def tile_norm(s, shift, p):
    return norm(s, shift, shift{p})


@triton.jit
def tile_weigh(s, shift, p):
    return weight(s, shift, shift{p}), norm(s, shift, shift{p})


@triton.jit
def tile_slopes(s, shift, p):
    return weight(s, shift, shift{p}), weight_slope(s, shift, shift{p}), norm_slope(s, shift, shift{p})


@triton.jit
def tile_slopes_by(s, shift, p, which: tl.constexpr):
{by}
    return weight_by, norm_by


@triton.jit
def row_null_by(shift, n, p, which: tl.constexpr):
{null_by}
    return null_by
"""

THRESHOLD = """

@triton.jit
def row_bracket(top, n, p):
    return low(top, top, n{p}), high(top, top, n{p})


@triton.jit
def row_power(p):
    return power(p[0], p[0], p[0]{p})


@triton.jit
def tile_mass(s, shift, p):
    return weight(s, shift, shift{p}), weight_by_shift(s, shift, shift{p})
"""

NAMES = (
    *("load_numbers", "row_floor", "row_null", "row_null_by"),
    *("tile_norm", "tile_weigh", "tile_slopes", "tile_slopes_by"),
    *("row_bracket", "row_power", "tile_mass", "READ"),
)
"""What the kernels take as arguments, under the same names in capitals: functions, the last three of row swaps alone;
and ``READ``, with a bit for each number that the maths reads."""


@functools.cache
def source(swap: Swap, whole: bool) -> str:
    """Returns the printed source of a swap: its maths over tiles, and what hands the per-head numbers over.

    Weights and norms do not read ``n`` (the dense reference gives it to ``null`` alone), so the shift stands there.

    Args:
        swap: The swap.
        whole: Print it for lambda 1 alone.
    """
    names = parameters(swap)
    p = "".join(f", p[{i}]" for i in range(len(names)))

    def cases(form: str) -> str:
        """Picks one number's lines while the kernel is compiled."""
        lines = []
        for i, name in enumerate(names):
            last = i == len(names) - 1
            lines.append("    else:" if last and i else f"    {'elif' if i else 'if'} which == {i}:")
            lines += ["        " + line for line in form.format(name=name, p=p).splitlines()]
        return "\n".join(lines)

    glue = GLUE.format(
        loads=", ".join(f"tl.load(pointer + {i})" for i in range(len(names))),
        floor=f"floor(p[0], p[0], p[0]{p})" if "floor" in trace(swap, whole) else "number(-1e999)",
        p=p,
        by=cases("weight_by = weight_by_{name}(s, shift, shift{p})\nnorm_by = norm_by_{name}(s, shift, shift{p})"),
        null_by=cases("null_by = null_by_{name}(shift, shift, n{p})"),
    )
    glue += THRESHOLD.format(p=p) if solved(swap) else ""
    read = sum(reads(swap, name, whole) << i for i, name in enumerate(names))
    return f"{HEAD}{functions(swap, TRITON, whole)}{glue}\n\nREAD = {read}\n"


@functools.cache
def reads(swap: Swap, name: str, whole: bool) -> bool:
    """Whether the maths depends on a number of :func:`codegen.parameters`, rather than the score's terms alone."""
    trees = trace(swap, whole)
    return any(trees[f"{part}_by_{name}"] != constant(0) for part in ("weight", "norm", "null"))


@functools.cache
def load(text: str) -> SimpleNamespace:
    """Makes functions of printed source. Triton reads a function's source again, so it is left with ``linecache``."""
    name = f"attnswap.attention.triton.printed_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    linecache.cache[f"<{name}>"] = (len(text), None, text.splitlines(keepends=True), f"<{name}>")
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(text, f"<{name}>", "exec"), namespace)
    return SimpleNamespace(**{k: namespace.get(k) for k in NAMES})
