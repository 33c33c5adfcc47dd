"""The forward kernel: one block of queries of one head, over the key blocks that its rows see."""

import triton
import triton.language as tl

from attnswap.attention.triton.maths import rescaling
from attnswap.attention.triton.tile import (
    add_product,
    first_needed,
    load_rows,
    load_spans,
    product,
    rows_norm,
    rows_slack,
    store_rows,
    tile_of_part,
    tile_scores,
    tiles_of_part,
    whole_tiles,
)


@triton.jit
def first_shift(p, sinks, h, ROW_FLOOR: tl.constexpr, SHIFTED: tl.constexpr, ROWS: tl.constexpr):
    """The shift of rows that have seen no key yet: the swap's floor and the head's sink, or 0 where it has no shift."""
    shift = tl.zeros([ROWS], tl.float32)
    if SHIFTED:
        shift += ROW_FLOOR(p)
        if sinks is not None:
            shift = tl.maximum(shift, tl.load(sinks + h))
    return shift


@triton.jit
def inverse_norm(total, reference, n, sinks, h, p, ROW_NULL: tl.constexpr, TILE_NORM: tl.constexpr):
    """1 / Z of rows: the sum over their keys, the null term and the sink; 0 where that is not positive."""
    total += ROW_NULL(reference, n, p)
    if sinks is not None:
        total += TILE_NORM(tl.load(sinks + h), reference, p)
    return tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), total * 0.0)  # NaN stays NaN


@triton.jit(do_not_specialize=["queries", "keys"])
def forward(
    q, k, v, out, mean, shifts, inverses, first, last, keep, mask, bias, row_scale, row_bias, centre, near, norms,
    crests, sinks, numbers, count, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch,
    out_head, out_row, span_batch, keep_batch, mask_batch, mask_head, mask_row, mask_key, bias_batch, bias_head,
    bias_row, bias_key, count_batch, count_head, far_apart, heads, groups, queries, keys, scaling, softcap, limit,
    LOAD_NUMBERS: tl.constexpr, ROW_FLOOR: tl.constexpr, ROW_NULL: tl.constexpr, TILE_NORM: tl.constexpr, TILE_WEIGH:
    tl.constexpr, NUMBERS: tl.constexpr, SHIFTED: tl.constexpr, CAPPED: tl.constexpr, WIDTH: tl.constexpr, PADDED:
    tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Stores the output of a block of rows, their shifts and 1 / Z; in ``mean`` the output once more, in fp32.

    With ``norms``, tiles of keys that have decayed below rounding are left out.
    """
    blocks = tl.cdiv(queries, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks  # the last rows of a causal call see most keys: begin with them
    task = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = task // heads, task % heads
    i = block * ROWS + tl.arange(0, ROWS)
    inside = i < queries
    from_key, to_key, lowest, highest = load_spans(first, last, b * span_batch, i, inside, keys)
    some = to_key > from_key
    at = task * queries + i
    q_tile = load_rows(q + b * q_batch + h * q_head, i, q_row, queries, WIDTH, PADDED)
    k_base, v_base = k + b * k_batch + h // groups * k_head, v + b * v_batch + h // groups * v_head
    scale = None if row_scale is None else tl.load(row_scale + at, mask=inside, other=0.0)[:, None]
    p = LOAD_NUMBERS(numbers + h * NUMBERS)

    shift = first_shift(p, sinks, h, ROW_FLOOR, SHIFTED, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    begin, end = lowest // KEYS, tl.cdiv(highest, KEYS)
    start = begin
    if norms is not None:  # at first the tiles of the rows' last keys, which decayed least: then the shift is known
        start = tl.maximum(begin, tl.min(tl.where(some, to_key - 1, keys), 0) // KEYS)
    for _part in range(1 if norms is None else 2):
        whole_begin, whole_end = whole_tiles(from_key, to_key, start, end, keep, mask, KEYS)
        # First the tiles of which some row does not see some key, then those that need no mask.
        for whole in tl.static_range(1 if keep is not None or mask is not None else 2):
            for back in range(0, tiles_of_part(start, end, whole_begin, whole_end, whole)):
                tile = tile_of_part(back, end, whole_begin, whole_end, whole)
                j = tile * KEYS + tl.arange(0, KEYS)
                limit_key = None if whole else keys
                k_tile = load_rows(k_base, j, k_row, limit_key, WIDTH, PADDED)
                _, s, seen = tile_scores(
                    product(q_tile, tl.trans(k_tile)), i[:, None], j[None, :], tile, task, at[:, None], inside[:, None],
                    from_key[:, None], to_key[:, None], b, h, keep, keep_batch, mask, mask_batch, mask_head, mask_row,
                    mask_key, bias, bias_batch, bias_head, bias_row, bias_key, scale, row_bias, centre, near, far_apart,
                    keys, scaling, softcap, CAPPED, KEYS, whole,
                )  # fmt: skip
                if SHIFTED:
                    higher = tl.maximum(shift, tl.max(tl.where(seen, s, float("-inf")), 1))
                    # A row that has seen nothing has no shift yet; any finite one serves, as all of it is dropped.
                    reference = tl.where(higher == float("-inf"), 0.0, higher)
                    factor = rescaling(shift, reference)  # 0 for the first keys of a row
                    total, acc = total * factor, acc * factor[:, None]
                    shift = higher
                else:
                    reference = shift
                w, d = TILE_WEIGH(tl.where(seen, s, reference[:, None]), reference[:, None], p)
                total += tl.sum(tl.where(seen, d, 0.0), 1)
                v_tile = load_rows(v_base, j, v_row, limit_key, VALUE_WIDTH, VALUE_PADDED)
                acc = add_product(tl.where(seen, w, 0.0).to(v_tile.dtype), v_tile, acc)
        if norms is not None:
            end = start
            start = first_needed(
                begin, end, norms, (b * (heads // groups) + h // groups) * tl.cdiv(keys, KEYS), crests,
                task * tl.cdiv(keys, KEYS), rows_norm(q_tile) * tl.abs(scaling),
                rows_slack(row_bias, at, inside & some, shift), limit,
            )  # fmt: skip

    reference = tl.where(shift == float("-inf"), 0.0, shift)
    n = tl.load(count + b * count_batch + h * count_head + i, mask=inside, other=1.0)
    inverse = inverse_norm(total, reference, n, sinks, h, p, ROW_NULL, TILE_NORM)
    tl.store(shifts + at, reference, mask=inside)
    tl.store(inverses + at, inverse, mask=inside)
    acc = acc * inverse[:, None]
    place = b * out_batch + h * out_head
    store_rows(out + place, i, out_row, queries, acc, VALUE_WIDTH, VALUE_PADDED)
    if mean is not None:
        store_rows(mean + place, i, out_row, queries, acc, VALUE_WIDTH, VALUE_PADDED)
