"""The backward kernels: both compute the scores again, one for the gradients of queries, one for keys and values.

    dS_ij = [w'(s_ij) (dO_i . v_j) - d'(s_ij) (dO_i . O_i)] / Z_i

Every sum has one program that adds it up in a fixed order, so the result is the same in every run. ``out`` is O in
fp32, or for row swaps the mean U that stands in for it.
"""

import triton
import triton.language as tl

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
def content_gradient(ds, content, scale, softcap, CAPPED: tl.constexpr):
    """The gradients of the scaled dot products from those of the scores: through the row scale and the cap."""
    if scale is not None:
        ds = ds * scale
    if CAPPED:
        part = content * (1.0 / softcap)
        ds = ds * (1.0 - part * part)
    return ds


@triton.jit
def add_number_gradients(
    sums, which, s, seen, dots, reference, delta, inverse, p, TILE_SLOPES_BY: tl.constexpr, READ: tl.constexpr,
    NUMBERS: tl.constexpr,
):  # fmt: skip
    """Adds to the rows' gradients of the head's numbers what comes through the scores of a tile."""
    for number in tl.static_range(NUMBERS):
        if READ >> number & 1:
            w_by, d_by = TILE_SLOPES_BY(s, reference[:, None], p, number)
            part = tl.sum(tl.where(seen, w_by * dots - d_by * delta[:, None], 0.0), 1) * inverse
            sums += tl.where(which == number, part[:, None], 0.0)
    return sums


@triton.jit
def store_sums(base, at, sums, inside):
    """Stores the gradients of rows or keys, where they are wanted."""
    if base is not None:
        tl.store(base + at, sums, mask=inside)


@triton.jit
def store_head_gradients(
    dsinks, dnumbers, part, number_sums, which, sinks, h, count, i, inside, reference, delta, inverse, p,
    TILE_SLOPES: tl.constexpr, TILE_SLOPES_BY: tl.constexpr, ROW_NULL_BY: tl.constexpr, NUMBERS: tl.constexpr,
    NUMBERS_PADDED: tl.constexpr,
):  # fmt: skip
    """Stores the part of a block of rows in the gradients of the head's sink and numbers.

    To what the numbers got through scores it adds what they get through the null term and the sink of Z.
    """
    if dsinks is not None:
        _, _, slope = TILE_SLOPES(tl.load(sinks + h), reference, p)
        tl.store(dsinks + part, tl.sum(tl.where(inside, -slope * delta * inverse, 0.0), 0))
    if dnumbers is not None:
        n = tl.load(count + i, mask=inside, other=1.0)
        for number in tl.static_range(NUMBERS):
            rest = ROW_NULL_BY(reference, n, p, number)
            if sinks is not None:
                _, d_by = TILE_SLOPES_BY(tl.load(sinks + h), reference, p, number)
                rest = rest + d_by
            got = tl.where(inside, -rest * delta * inverse, 0.0)
            number_sums += tl.where(which == number, got[:, None], 0.0)
        place = dnumbers + part * NUMBERS_PADDED + tl.arange(0, NUMBERS_PADDED)
        tl.store(place, tl.sum(number_sums, 0))


@triton.jit(do_not_specialize=["queries", "keys"])
def backward_queries(
    q, k, v, out, grad, deltas, dq, drow_scale, drow_bias, dsinks, dnumbers, shifts, inverses, first, last, keep, mask,
    bias, row_scale, row_bias, centre, near, norms, crests, sinks, numbers, count, q_batch, q_head, q_row, k_batch,
    k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row, grad_batch, grad_head, grad_row, dq_batch,
    dq_head, dq_row, span_batch, keep_batch, mask_batch, mask_head, mask_row, mask_key, bias_batch, bias_head, bias_row,
    bias_key, count_batch, count_head, far_apart, heads, groups, queries, keys, scaling, softcap, limit,
    LOAD_NUMBERS: tl.constexpr, TILE_SLOPES: tl.constexpr, TILE_SLOPES_BY: tl.constexpr, ROW_NULL_BY: tl.constexpr,
    READ: tl.constexpr, NUMBERS: tl.constexpr, CAPPED: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, NUMBERS_PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS:
    tl.constexpr,
):  # fmt: skip
    """Stores dO . O of a block of rows, their gradients, and the block's part of what sinks and numbers get."""
    blocks = tl.cdiv(queries, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks
    task = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = task // heads, task % heads
    i = block * ROWS + tl.arange(0, ROWS)
    inside = i < queries
    from_key, to_key, lowest, highest = load_spans(first, last, b * span_batch, i, inside, keys)
    at = task * queries + i
    q_tile = load_rows(q + b * q_batch + h * q_head, i, q_row, queries, WIDTH, PADDED)
    grad_tile = load_rows(grad + b * grad_batch + h * grad_head, i, grad_row, queries, VALUE_WIDTH, VALUE_PADDED)
    out_tile = load_rows(out + b * out_batch + h * out_head, i, out_row, queries, VALUE_WIDTH, VALUE_PADDED)
    delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(deltas + at, delta, mask=inside)
    reference, inverse = tl.load(shifts + at, mask=inside, other=0.0), tl.load(inverses + at, mask=inside, other=0.0)
    k_base, v_base = k + b * k_batch + h // groups * k_head, v + b * v_batch + h // groups * v_head
    scale = None if row_scale is None else tl.load(row_scale + at, mask=inside, other=0.0)[:, None]
    p = LOAD_NUMBERS(numbers + h * NUMBERS)

    acc = tl.zeros([ROWS, PADDED], tl.float32)
    scale_sum, bias_sum = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    which = tl.arange(0, NUMBERS_PADDED)[None, :]
    number_sums = tl.zeros([ROWS, NUMBERS_PADDED], tl.float32)
    begin, end = lowest // KEYS, tl.cdiv(highest, KEYS)
    if norms is not None:
        begin = first_needed(
            begin, end, norms, (b * (heads // groups) + h // groups) * tl.cdiv(keys, KEYS), crests,
            task * tl.cdiv(keys, KEYS), rows_norm(q_tile) * tl.abs(scaling),
            rows_slack(row_bias, at, inside & (inverse != 0.0), reference), limit,
        )  # fmt: skip
    whole_begin, whole_end = whole_tiles(from_key, to_key, begin, end, keep, mask, KEYS)
    for whole in tl.static_range(1 if keep is not None or mask is not None else 2):
        for back in range(0, tiles_of_part(begin, end, whole_begin, whole_end, whole)):
            tile = tile_of_part(back, end, whole_begin, whole_end, whole)
            limit_key = None if whole else keys
            j = tile * KEYS + tl.arange(0, KEYS)
            k_tile = load_rows(k_base, j, k_row, limit_key, WIDTH, PADDED)
            v_tile = load_rows(v_base, j, v_row, limit_key, VALUE_WIDTH, VALUE_PADDED)
            content, s, seen = tile_scores(
                product(q_tile, tl.trans(k_tile)), i[:, None], j[None, :], tile, task, at[:, None], inside[:, None],
                from_key[:, None], to_key[:, None], b, h, keep, keep_batch, mask, mask_batch, mask_head, mask_row,
                mask_key, bias, bias_batch, bias_head, bias_row, bias_key, scale, row_bias, centre, near, far_apart,
                keys, scaling, softcap, CAPPED, KEYS, whole,
            )  # fmt: skip
            if not whole:
                seen = seen & (inverse != 0.0)[:, None]
            s = tl.where(seen, s, reference[:, None])
            dots = product(grad_tile, tl.trans(v_tile))
            if dnumbers is not None:
                number_sums = add_number_gradients(
                    number_sums, which, s, seen, dots, reference, delta, inverse, p, TILE_SLOPES_BY, READ, NUMBERS
                )
            _, w_slope, d_slope = TILE_SLOPES(s, reference[:, None], p)
            ds = tl.where(seen, (w_slope * dots - d_slope * delta[:, None]) * inverse[:, None], 0.0)
            if drow_bias is not None:
                bias_sum += tl.sum(ds, 1)
            if drow_scale is not None:
                scale_sum += tl.sum(ds * content, 1)
            ds = content_gradient(ds, content, scale, softcap, CAPPED)
            acc = add_product(ds.to(k_tile.dtype), k_tile, acc)

    store_rows(dq + b * dq_batch + h * dq_head, i, dq_row, queries, acc * scaling, WIDTH, PADDED)
    store_sums(drow_scale, at, scale_sum, inside)
    store_sums(drow_bias, at, bias_sum, inside)
    store_head_gradients(
        dsinks, dnumbers, task * blocks + block, number_sums, which, sinks, h,
        count + b * count_batch + h * count_head, i, inside, reference, delta, inverse, p, TILE_SLOPES,
        TILE_SLOPES_BY, ROW_NULL_BY, NUMBERS, NUMBERS_PADDED,
    )  # fmt: skip


@triton.jit
def query_blocks(
    tile, tiles, b, kv_task, task, block_first, block_last, whole_first, whole_last, block_batch, blocks, norms, crests,
    reaches, slacks, limit, keys, keep, mask, KEYS: tl.constexpr,
):  # fmt: skip
    """The first and one past the last block of queries that sees a tile of keys, where it has not decayed.

    Then the same of a run of blocks between them that see the tile as a whole; a block with a row beyond the end is
    never among them.
    """
    begin, end, whole_begin, whole_end = blocks, 0, blocks, blocks
    for some in range(0, blocks, 128):
        which = some + tl.arange(0, 128)
        lowest = tl.load(block_first + b * block_batch + which, mask=which < blocks, other=keys)
        highest = tl.load(block_last + b * block_batch + which, mask=which < blocks, other=0)
        meets = (lowest < (tile + 1) * KEYS) & (highest > tile * KEYS)
        if norms is not None:  # see first_needed: the same bound, from the other side
            reach = tl.load(reaches + task * blocks + which, mask=which < blocks, other=0.0)
            slack = tl.load(slacks + task * blocks + which, mask=which < blocks, other=0.0)
            crest = tl.load(crests + task * tiles + tile)
            bound = (tl.load(norms + kv_task * tiles + tile) * reach).to(tl.float64) + (crest + slack)
            meets = meets & ((bound < limit) == 0)
        begin = tl.minimum(begin, tl.min(tl.where(meets, which, blocks), 0))
        end = tl.maximum(end, tl.max(tl.where(meets, which + 1, 0), 0))
        if keep is None and mask is None:
            latest = tl.load(whole_first + b * block_batch + which, mask=which < blocks, other=keys)
            earliest = tl.load(whole_last + b * block_batch + which, mask=which < blocks, other=0)
            whole = (latest <= tile * KEYS) & (earliest >= (tile + 1) * KEYS)
            whole_begin = tl.minimum(whole_begin, tl.min(tl.where(whole, which, blocks), 0))
            whole_end = tl.minimum(whole_end, tl.min(tl.where(whole | (which < whole_begin), blocks, which), 0))
    whole_begin = tl.maximum(whole_begin, begin)
    return begin, end, whole_begin, tl.maximum(tl.minimum(whole_end, end), whole_begin)


@triton.jit(do_not_specialize=["queries", "keys"])
def backward_keys(
    q, k, v, grad, deltas, dk, dv, dkey_bias, shifts, inverses, first, last, block_first, block_last, whole_first,
    whole_last, keep, mask, bias, row_scale, row_bias, centre, near, norms, crests, reaches, slacks, numbers, q_batch,
    q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row, dk_batch, dk_head,
    dk_row, dv_batch, dv_head, dv_row, span_batch, block_batch, keep_batch, mask_batch, mask_head, mask_row, mask_key,
    bias_batch, bias_head, bias_row, bias_key, far_apart, heads, groups, queries, keys, scaling, softcap, limit,
    LOAD_NUMBERS: tl.constexpr, TILE_SLOPES: tl.constexpr, NUMBERS: tl.constexpr, CAPPED: tl.constexpr, WIDTH:
    tl.constexpr, PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS:
    tl.constexpr,
):  # fmt: skip
    """Stores the gradients of a block of keys and values of one key/value head, and of the keys' bias.

    The query heads that share the keys come one after the other. Tiles of scores are (keys, queries) here, as the
    products that add to the gradients of keys and values take them: the compiler would compute others twice.
    """
    tiles = tl.cdiv(keys, KEYS)
    tile = tl.program_id(0) % tiles  # the first keys of a causal call are seen most: begin with them
    kv_task = (tl.program_id(0) // tiles).to(tl.int64)
    kv_heads = heads // groups
    b, kv = kv_task // kv_heads, kv_task % kv_heads
    j = tile * KEYS + tl.arange(0, KEYS)
    k_tile = load_rows(k + b * k_batch + kv * k_head, j, k_row, keys, WIDTH, PADDED)
    v_tile = load_rows(v + b * v_batch + kv * v_head, j, v_row, keys, VALUE_WIDTH, VALUE_PADDED)
    dk_sum = tl.zeros([KEYS, PADDED], tl.float32)
    dv_sum = tl.zeros([KEYS, VALUE_PADDED], tl.float32)
    for g in range(groups):
        h = kv * groups + g
        task = b * heads + h
        p = LOAD_NUMBERS(numbers + h * NUMBERS)
        q_base, grad_base = q + b * q_batch + h * q_head, grad + b * grad_batch + h * grad_head
        begin, end, whole_begin, whole_end = query_blocks(
            tile, tiles, b, kv_task, task, block_first, block_last, whole_first, whole_last, block_batch,
            tl.cdiv(queries, ROWS), norms, crests, reaches, slacks, limit, keys, keep, mask, KEYS,
        )  # fmt: skip
        bias_sum = tl.zeros([KEYS], tl.float32)
        for whole in tl.static_range(1 if keep is not None or mask is not None else 2):
            # Hoisted out of the loop, keys and values would stand in registers as both sides of products.
            for back in tl.range(0, tiles_of_part(begin, end, whole_begin, whole_end, whole), disable_licm=True):
                block = tile_of_part(back, end, whole_begin, whole_end, whole)
                limit_row = None if whole else queries
                i = block * ROWS + tl.arange(0, ROWS)
                inside = i < queries
                at = task * queries + i
                from_key = tl.load(first + b * span_batch + i, mask=inside, other=0)
                to_key = tl.load(last + b * span_batch + i, mask=inside, other=0)
                reference = tl.load(shifts + at, mask=inside, other=0.0)[None, :]
                inverse = tl.load(inverses + at, mask=inside, other=0.0)[None, :]
                delta = tl.load(deltas + at, mask=inside, other=0.0)[None, :]
                scale = None if row_scale is None else tl.load(row_scale + at, mask=inside, other=0.0)[None, :]
                q_tile = load_rows(q_base, i, q_row, limit_row, WIDTH, PADDED)
                grad_tile = load_rows(grad_base, i, grad_row, limit_row, VALUE_WIDTH, VALUE_PADDED)
                content, s, seen = tile_scores(
                    product(k_tile, tl.trans(q_tile)), i[None, :], j[:, None], tile, task, at[None, :], inside[None, :],
                    from_key[None, :], to_key[None, :], b, h, keep, keep_batch, mask, mask_batch, mask_head, mask_row,
                    mask_key, bias, bias_batch, bias_head, bias_row, bias_key, scale, row_bias, centre, near, far_apart,
                    keys, scaling, softcap, CAPPED, KEYS, whole,
                )  # fmt: skip
                if not whole:
                    seen = seen & (inverse != 0.0)
                # Both products come before the maths, so that few whole tiles are held at once.
                dots = product(v_tile, tl.trans(grad_tile))
                w, w_slope, d_slope = TILE_SLOPES(tl.where(seen, s, reference), reference, p)
                weights = tl.where(seen, w * inverse, 0.0).to(grad_tile.dtype)
                dv_sum = add_product(weights, grad_tile, dv_sum)
                ds = tl.where(seen, (w_slope * dots - d_slope * delta) * inverse, 0.0)
                if dkey_bias is not None:
                    bias_sum += tl.sum(ds, 1)
                ds = content_gradient(ds, content, scale, softcap, CAPPED)
                dk_sum = add_product(ds.to(q_tile.dtype), q_tile, dk_sum)
        store_sums(dkey_bias, task * keys + j, bias_sum, j < keys)
    store_rows(dk + b * dk_batch + kv * dk_head, j, dk_row, keys, dk_sum * scaling, WIDTH, PADDED)
    store_rows(dv + b * dv_batch + kv * dv_head, j, dv_row, keys, dv_sum, VALUE_WIDTH, VALUE_PADDED)
