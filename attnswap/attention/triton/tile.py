"""What the kernels share: loading rows, what a tile of queries and keys sees, and its scores.

A part of the call that is absent is None, which Triton drops when it compiles.
"""

import triton
import triton.language as tl

from attnswap.attention.triton.maths import INTERPRETED, vtanh


@triton.jit
def product(a, b):
    """A matrix product with fp32 sums; fp32 inputs keep all their digits (no TF32)."""
    if INTERPRETED:  # numpy has no bf16: the interpreter would multiply its bits as whole numbers
        found = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        found = tl.dot(a, b, input_precision="ieee")
    return found


@triton.jit
def add_product(a, b, acc):
    """A matrix product added to an fp32 one."""
    if INTERPRETED:
        found = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        found = tl.dot(a, b, acc, input_precision="ieee")
    return found


@triton.jit
def load_rows(base, rows, stride, limit, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Loads whole rows below ``limit`` as (rows, PADDED), zeros elsewhere; without a limit, all rows."""
    column = tl.arange(0, PADDED)
    at = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    if limit is None:
        tile = tl.load(at) if WIDTH == PADDED else tl.load(at, mask=column[None, :] < WIDTH, other=0.0)
    elif WIDTH == PADDED:
        tile = tl.load(at, mask=rows[:, None] < limit, other=0.0)
    else:
        tile = tl.load(at, mask=(rows[:, None] < limit) & (column[None, :] < WIDTH), other=0.0)
    return tile


@triton.jit
def store_rows(base, rows, stride, limit, tile, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Stores the first WIDTH columns of the rows below ``limit``."""
    column = tl.arange(0, PADDED)
    at = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=(rows[:, None] < limit) & (column[None, :] < WIDTH))


@triton.jit
def load_spans(first, last, spans_at, i, inside, keys):
    """The first and one past the last key that each row sees, and the lowest and highest of them over all rows."""
    from_key = tl.load(first + spans_at + i, mask=inside, other=0)
    to_key = tl.load(last + spans_at + i, mask=inside, other=0)
    some = to_key > from_key
    lowest = tl.min(tl.where(some, from_key, keys), 0)
    highest = tl.max(tl.where(some, to_key, 0), 0)
    return from_key, to_key, lowest, highest


@triton.jit
def whole_tiles(from_key, to_key, begin, end, keep, mask, KEYS: tl.constexpr):
    """The first and one past the last of the key tiles from ``begin`` to ``end`` that all rows see all keys of.

    There is none in a block with a row beyond the end, as that row has an empty span; nor where ``keep`` or ``mask``
    may hide a key of any tile.
    """
    if keep is not None or mask is not None:
        whole_begin, whole_end = begin, begin
    else:
        whole_begin = tl.maximum(tl.cdiv(tl.max(from_key, 0), KEYS), begin)
        whole_end = tl.maximum(tl.minimum(tl.min(to_key, 0) // KEYS, end), whole_begin)
    return whole_begin, whole_end


@triton.jit
def tiles_of_part(begin, end, whole_begin, whole_end, WHOLE: tl.constexpr):
    """How many of the tiles from ``begin`` to ``end`` are seen as a whole, or the number of the others."""
    whole = whole_end - whole_begin
    return whole if WHOLE else end - begin - whole


@triton.jit
def tile_of_part(back, end, whole_begin, whole_end, WHOLE: tl.constexpr):
    """A tile of those that are seen as a whole, or of the others, counted from the last one."""
    if WHOLE:
        tile = whole_end - 1 - back
    else:
        tile = end - 1 - back
        tile -= tl.where(tile < whole_end, whole_end - whole_begin, 0)
    return tile


@triton.jit
def visible(i, j, from_key, to_key, keys, keep, keep_at, mask, mask_at, mask_row, mask_key):
    """Which keys ``j`` the queries ``i`` see: the row's span, less what ``keep`` and ``mask`` hide."""
    seen = (j >= from_key) & (j < to_key)
    if keep is not None:
        seen = seen & (tl.load(keep + keep_at + j, mask=j < keys, other=0) != 0)
    if mask is not None:
        at = mask + mask_at + i.to(tl.int64) * mask_row + j.to(tl.int64) * mask_key
        seen = seen & (tl.load(at, mask=seen, other=0) != 0)
    return seen


@triton.jit
def capped(dots, softcap, CAPPED: tl.constexpr):
    """The content score under the model's own cap."""
    return softcap * vtanh(dots * (1.0 / softcap)) if CAPPED else dots


@triton.jit
def split(x):
    """Two fp32 numbers that add up to an fp64 one."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def tile_scores(
    dots, i, j, tile, task, at, inside, from_key, to_key, b, h, keep, keep_batch, mask, mask_batch, mask_head, mask_row,
    mask_key, bias, bias_batch, bias_head, bias_row, bias_key, scale, row_bias, centre, near, far_apart, keys, scaling,
    softcap, CAPPED: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The capped content, the scores ``a_i cap(z) + b_i + c_j + B_ij`` and what is seen of queries ``i``, keys ``j``.

    What belongs to queries is of the shape (rows, 1) and what belongs to keys (1, keys), or both the other way round.
    Sums of log gates grow without bound, and only differences matter. The fp64 value of b_i and of c at the tile's last
    key is split into two fp32 numbers, as is that of c_j less it (``near``): where the two large parts cancel their
    fp32 sum is exact, and the low parts put back what each was rounded by.
    """
    content = capped(dots * scaling, softcap, CAPPED)
    if WHOLE:
        seen = tl.full(content.shape, True, tl.int1)  # a constant, with which the compiler drops every tl.where
    else:
        seen = visible(
            i, j, from_key, to_key, keys, keep, b * keep_batch, mask, b * mask_batch + h * mask_head, mask_row,
            mask_key,
        )  # fmt: skip
    s = content
    if scale is not None:
        s = s * scale
    if near is not None:
        own = tl.load(centre + task * tl.cdiv(keys, KEYS) + tile) + tl.zeros_like(i).to(tl.float64)
        if row_bias is not None:
            own = own + tl.load(row_bias + at, mask=inside, other=0.0)
        row_high, row_low = split(own)
        key_high = tl.load(near + task * keys + j, mask=j < keys, other=0.0)
        key_low = tl.load(near + far_apart + task * keys + j, mask=j < keys, other=0.0)
        s = s + ((row_high + key_high) + (row_low + key_low))
    elif row_bias is not None:
        s = s + tl.load(row_bias + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        place = bias + b * bias_batch + h * bias_head
        place = place + i.to(tl.int64) * bias_row + j.to(tl.int64) * bias_key
        s = s + tl.load(place, mask=seen, other=0.0).to(tl.float32)
    return content, s, seen


@triton.jit
def rows_norm(tile):
    """The largest norm among the rows of a tile."""
    wide = tile.to(tl.float32)
    return tl.sqrt(tl.max(tl.sum(wide * wide, 1), 0))


@triton.jit
def rows_slack(row_bias, at, counted, shift):
    """How far the rows' own bias stands above their shift, at most; fp64, and without a bound for a row without one."""
    own = 0.0 - shift.to(tl.float64)
    if row_bias is not None:
        own = own + tl.load(row_bias + at, mask=counted, other=0.0)
    return tl.max(tl.where(counted, own, float("-inf")), 0)


@triton.jit
def first_needed(begin, end, norms, norms_at, crests, crests_at, reach, slack, limit):
    """The first of some key tiles in which a score may come within ``limit`` of its row's shift; ``end`` if none.

    A score is at most ``reach`` times the norm of its key, plus the tile's largest key bias, plus the row's own part.
    What is left out then adds less than rounding. NaN is below no limit, so it is never left out.
    """
    found = end
    for some in range(begin, end, 128):
        which = some + tl.arange(0, 128)
        norm = tl.load(norms + norms_at + which, mask=which < end, other=0.0)
        crest = tl.load(crests + crests_at + which, mask=which < end, other=0.0)
        bound = (norm * reach).to(tl.float64) + (crest + slack)
        found = tl.minimum(found, tl.min(tl.where((which >= end) | (bound < limit), end, which), 0))
    return found
