"""The forward kernel of row swaps, whose weights depend on the threshold of a whole row.

    O_i = sum_j w(s_ij; t_i) v_j,    t_i such that sum_j w(s_ij; t_i) = 1

No tile sees a whole row, so the scores are computed again for every step of the solver: a sweep over the key blocks for
the largest score, one for each Newton step, one for the output. With dS_ij = w'(s_ij) [dO_i . v_j - dO_i . U_i], where
U_i is the mean of the values under the slopes dw/dt, the backward kernels serve as they are: they read U_i for O_i.
"""

import triton
import triton.language as tl

from attnswap.attention.triton.maths import vexp
from attnswap.attention.triton.tile import add_product, load_rows, load_spans, product, store_rows, tile_scores

STEPS = tl.constexpr(32)
"""Sweeps of the solver at most: halving alone would bring the bounds of any row within fp32's rounding of each other.
Newton takes a block of rows there in 4 to 8, and then it stops."""
EPSILON = tl.constexpr(2.0**-23)


@triton.jit
def newton(t, low, high, mass, slope, power):
    """A step from ``t`` to where the mass is 1, by halving the bounds where Newton's own does not stay within.

    Newton is on (mass^power - 1) / power, which is nearly linear; its limit for a power of 0 is the logarithm.
    """
    sound = (mass > 0.0) & (slope < 0.0)
    mass, slope = tl.where(sound, mass, 1.0), tl.where(sound, slope, -1.0)
    log = tl.log(mass)
    bent = tl.where(power < 1e-2, mass * log, (mass - vexp((1.0 - power) * log)) / power)
    d = mass - 1.0  # near the root the difference of two large terms would be all rounding: take its series
    near = d + (1.0 - power) * (0.5 * d * d) * (1.0 - (1.0 + power) * d * (1.0 / 3.0))
    new = t - tl.where(tl.abs(d) < 0.03, near, bent) / slope
    return tl.where(sound & (new >= low) & (new <= high), new, 0.5 * (low + high))


@triton.jit
def solve(
    top, n, sink, p, q_tile, k_base, k_row, begin, end, i, task, at, inside, from_key, to_key, b, h, keep, keep_batch,
    mask, mask_batch, mask_head, mask_row, mask_key, bias, bias_batch, bias_head, bias_row, bias_key, scale, row_bias,
    centre, near, far_apart, keys, scaling, softcap,
    ROW_BRACKET: tl.constexpr, ROW_POWER: tl.constexpr, TILE_MASS: tl.constexpr, CAPPED: tl.constexpr, WIDTH:
    tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The threshold of each row, from its largest score and its number of keys, and how fast its mass falls there."""
    zeros = tl.zeros_like(top)
    some = top > float("-inf")
    low, high = ROW_BRACKET(tl.where(some, top, 0.0), tl.maximum(n, 1.0), p)
    low, high, power = low + zeros, high + zeros, ROW_POWER(p)
    t, slope = tl.where(some, low, 0.0), zeros - 1.0
    moving = some.to(tl.int32)
    step, open = 0, tl.max(moving, 0)
    while (step < STEPS) & (open > 0):
        mass, fall = zeros, zeros
        for tile in range(begin, end):
            j = tile * KEYS + tl.arange(0, KEYS)
            k_tile = load_rows(k_base, j, k_row, keys, WIDTH, PADDED)
            _, s, seen = tile_scores(
                product(q_tile, tl.trans(k_tile)), i[:, None], j[None, :], tile, task, at[:, None], inside[:, None],
                from_key[:, None], to_key[:, None], b, h, keep, keep_batch, mask, mask_batch, mask_head, mask_row,
                mask_key, bias, bias_batch, bias_head, bias_row, bias_key, scale, row_bias, centre, near, far_apart,
                keys, scaling, softcap, CAPPED, KEYS, False,
            )  # fmt: skip
            w, by = TILE_MASS(tl.where(seen, s, t[:, None]), t[:, None], p)
            mass += tl.sum(tl.where(seen, w, 0.0), 1)
            fall += tl.sum(tl.where(seen, by, 0.0), 1)
        if sink is not None:
            sink_mass, sink_fall = TILE_MASS(sink, t, p)
            mass += sink_mass
            fall += sink_fall
        low, high = tl.where(mass >= 1.0, t, low), tl.where(mass > 1.0, high, t)
        new = newton(t, low, high, mass, fall, power)
        new = tl.where(tl.abs(mass - 1.0) <= 2 * EPSILON, t, new)  # what is left may be rounding of the sum
        far = tl.abs(new - t) > 2 * EPSILON * tl.maximum(tl.abs(t), 1.0)
        # A row takes no step more because of others in its block: its result depends on nothing but itself.
        t, slope = tl.where(moving > 0, new, t), tl.where(moving > 0, fall, slope)
        moving = tl.where(far, moving, 0)
        step, open = step + 1, tl.max(moving, 0)
    return t, slope


@triton.jit(do_not_specialize=["queries", "keys"])
def forward_rows(
    q, k, v, out, mean, shifts, inverses, first, last, keep, mask, bias, row_scale, row_bias, centre, near, sinks,
    numbers, count, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head,
    out_row, span_batch, keep_batch, mask_batch, mask_head, mask_row, mask_key, bias_batch, bias_head, bias_row,
    bias_key, count_batch, count_head, far_apart, heads, groups, queries, keys, scaling, softcap,
    LOAD_NUMBERS: tl.constexpr, ROW_BRACKET: tl.constexpr, ROW_POWER: tl.constexpr, TILE_MASS: tl.constexpr, NUMBERS:
    tl.constexpr, CAPPED: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    VALUE_PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Stores the output of a block of rows, their thresholds and 1 / Z, which is 1 but for rounding; in ``mean`` U."""
    blocks = tl.cdiv(queries, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks  # the last rows of a causal call see most keys: begin with them
    task = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = task // heads, task % heads
    i = block * ROWS + tl.arange(0, ROWS)
    inside = i < queries
    from_key, to_key, lowest, highest = load_spans(first, last, b * span_batch, i, inside, keys)
    begin, end = lowest // KEYS, tl.cdiv(highest, KEYS)
    at = task * queries + i
    q_tile = load_rows(q + b * q_batch + h * q_head, i, q_row, queries, WIDTH, PADDED)
    k_base, v_base = k + b * k_batch + h // groups * k_head, v + b * v_batch + h // groups * v_head
    scale = None if row_scale is None else tl.load(row_scale + at, mask=inside, other=0.0)[:, None]
    p = LOAD_NUMBERS(numbers + h * NUMBERS)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    for tile in range(begin, end):
        j = tile * KEYS + tl.arange(0, KEYS)
        k_tile = load_rows(k_base, j, k_row, keys, WIDTH, PADDED)
        _, s, seen = tile_scores(
            product(q_tile, tl.trans(k_tile)), i[:, None], j[None, :], tile, task, at[:, None], inside[:, None],
            from_key[:, None], to_key[:, None], b, h, keep, keep_batch, mask, mask_batch, mask_head, mask_row, mask_key,
            bias, bias_batch, bias_head, bias_row, bias_key, scale, row_bias, centre, near, far_apart, keys, scaling,
            softcap, CAPPED, KEYS, False,
        )  # fmt: skip
        top = tl.maximum(top, tl.max(tl.where(seen, s, float("-inf")), 1))

    zeros = tl.zeros([ROWS], tl.float32)
    n = tl.load(count + b * count_batch + h * count_head + i, mask=inside, other=1.0)
    sink = None if sinks is None else tl.load(sinks + h) + zeros
    if sinks is not None:
        n += 1.0
        top = tl.maximum(top, sink)
    t, slope = solve(
        top, n, sink, p, q_tile, k_base, k_row, begin, end, i, task, at, inside, from_key, to_key, b, h, keep,
        keep_batch, mask, mask_batch, mask_head, mask_row, mask_key, bias, bias_batch, bias_head, bias_row, bias_key,
        scale, row_bias, centre, near, far_apart, keys, scaling, softcap, ROW_BRACKET, ROW_POWER, TILE_MASS, CAPPED,
        WIDTH, PADDED, KEYS,
    )  # fmt: skip

    shrink = tl.where(slope < 0.0, 1.0 / tl.where(slope < 0.0, slope, -1.0), -1.0)  # keeps slopes in half's range
    # The output, and then the mean: one accumulator at a time, as two would not stay in registers.
    for part in tl.static_range(1 if mean is None else 2):
        total = zeros
        acc = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
        for tile in range(begin, end):
            j = tile * KEYS + tl.arange(0, KEYS)
            k_tile = load_rows(k_base, j, k_row, keys, WIDTH, PADDED)
            _, s, seen = tile_scores(
                product(q_tile, tl.trans(k_tile)), i[:, None], j[None, :], tile, task, at[:, None], inside[:, None],
                from_key[:, None], to_key[:, None], b, h, keep, keep_batch, mask, mask_batch, mask_head, mask_row,
                mask_key, bias, bias_batch, bias_head, bias_row, bias_key, scale, row_bias, centre, near, far_apart,
                keys, scaling, softcap, CAPPED, KEYS, False,
            )  # fmt: skip
            w, by = TILE_MASS(tl.where(seen, s, t[:, None]), t[:, None], p)
            share = tl.where(seen, w if part == 0 else by * shrink[:, None], 0.0)
            total += tl.sum(share, 1)
            v_tile = load_rows(v_base, j, v_row, keys, VALUE_WIDTH, VALUE_PADDED)
            acc = add_product(share.to(v_tile.dtype), v_tile, acc)
        if sinks is not None:
            sink_mass, sink_fall = TILE_MASS(sink, t, p)
            total += sink_mass if part == 0 else sink_fall * shrink
        inverse = tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), total * 0.0)  # NaN stays NaN
        place = b * out_batch + h * out_head
        if part == 0:
            tl.store(shifts + at, t, mask=inside)
            tl.store(inverses + at, inverse, mask=inside)
            store_rows(out + place, i, out_row, queries, acc * inverse[:, None], VALUE_WIDTH, VALUE_PADDED)
        else:
            store_rows(mean + place, i, out_row, queries, acc * inverse[:, None], VALUE_WIDTH, VALUE_PADDED)
