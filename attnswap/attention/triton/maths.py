"""The vocabulary of swaps where Triton's own words do not serve: fp32 tiles, finite and exact at every magnitude.

The polynomials are those of the CPU kernels: least-squares fits within 3e-8 of the function. NaN stays NaN: Triton's
own maximum drops it, and a broken model would look sound.

Exponentials are powers of two, which GPUs have an instruction for. ``tl.exp`` adds four more around it, which keep
results below 1e-38 and multiply by log2(e); ``tl.exp2`` flushes such results to 0.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def number(x: tl.constexpr):
    """A constant as an fp32 scalar, so that every word takes it."""
    return tl.full((), x, tl.float32)


@triton.jit
def vexp(x):
    """The exponential."""
    return tl.exp2(x * LOG2E)


@triton.jit
def power_less(a, b):
    """``exp(a - b)``, one fused multiply-add before the power of two where ``b`` is the same for many ``a``.

    The product b log2(e) is rounded, to the same number wherever ``b`` is the same: a factor that all weights of a row
    share.
    """
    return tl.exp2(tl.fma(a, LOG2E, -(b * LOG2E)))


@triton.jit
def vexp_less(a, b):
    """``exp(a - b)``. On GPUs the exponent is rounded, with ``tl.exp`` too; in the interpreter it need not be."""
    return tl.exp(a - b) if INTERPRETED else power_less(a, b)


@triton.jit
def power_ratio(old, new):
    """``exp(old - new)``, where either product with log2(e) is rounded as :func:`power_less` rounds it.

    Fused multiply-adds alone: the compiler would join a plain product and a difference, and not round.
    """
    rounding = tl.fma(old, LOG2E, -(old * LOG2E))
    return tl.exp2(tl.fma(old, LOG2E, -(new * LOG2E)) - rounding)


@triton.jit
def rescaling(old, new):
    """The factor that turns weights under one shift of a row into those under another; 0 for minus infinity."""
    factor = tl.exp(old - new) if INTERPRETED else power_ratio(old, new)
    return tl.where(old == float("-inf"), 0.0, factor)


@triton.jit
def vdivide(a, b):
    """``a / b`` within two roundings, for ``b`` below 2^126: one instruction for 1 / b and one for the product."""
    return a / b if INTERPRETED else libdevice.fast_dividef(a, b)


@triton.jit
def vmax(a, b):
    """The larger of two; NaN where the second is."""
    return tl.where(a > b, a, b)


@triton.jit
def vmin(a, b):
    """The smaller of two; NaN where the second is."""
    return tl.where(a < b, a, b)


@triton.jit
def vrelu(x):
    """``max(x, 0)``."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def vsign(x):
    """-1, 0 or 1."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))


@triton.jit
def vsigmoid(x):
    """``1 / (1 + e^-x)``, from e^-|x| so that ``x`` and ``-x`` share an exponential and a division."""
    e = vexp(-tl.abs(x))
    r = vdivide(tl.full(e.shape, 1.0, tl.float32), 1.0 + e)
    return tl.where(x < 0.0, e * r, r)


@triton.jit
def vtanh(x):
    """The hyperbolic tangent: a polynomial near 0, where the other form cancels."""
    a = tl.abs(x)
    u = x * x
    e = vexp(a * -2.0)
    far = vdivide(1.0 - e, 1.0 + e)
    p = u * -0.00581000576 + 0.0207311508
    p = p * u - 0.0537672085
    p = p * u + 0.133317605
    p = p * u - 0.333332931
    return tl.where(a < 0.625, (p * u) * x + x, tl.where(x < 0.0, -far, far))


@triton.jit
def vlog1p(u):
    """``log(1 + u)``: a polynomial where 1 + u would round ``u`` away."""
    p = u * -0.0751439766 + 0.126044503
    p = p * u - 0.131325088
    p = p * u + 0.142220335
    p = p * u - 0.166280091
    p = p * u + 0.200004595
    p = p * u - 0.250006826
    p = p * u + 0.333333402
    return tl.where((u < 0.4142) & (u > -0.2928), u + (p * u - 0.5) * (u * u), tl.log(1.0 + u))


@triton.jit
def vsoftplus(x):
    """``log(1 + e^x)``."""
    return vrelu(x) + vlog1p(vexp(-tl.abs(x)))


@triton.jit
def vpow(x, p):
    """``x ** p`` for ``x`` at or above 0; 0 to the power 0 is 1."""
    positive = vexp(p * tl.log(tl.where(x > 0.0, x, 1.0)))
    return tl.where(x > 0.0, positive, tl.where(p != 0.0, x * 0.0, 1.0))
