"""Turns a call into kernel launches: buffers, strides, tile sizes and the swap's functions.

The ahead-of-time check compiles exactly these launches for other targets.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attnswap.attention.triton import backward as backward_kernels
from attnswap.attention.triton import program
from attnswap.attention.triton.decay import centred, key_bounds, query_bounds
from attnswap.attention.triton.forward import forward as forward_kernel
from attnswap.attention.triton.forward_rows import forward_rows as rows_kernel
from attnswap.attention.triton.saved import has_mean
from attnswap.attention.triton.tiles import Tiles, padded, tiles_of

Sizes = Callable[[str, str, int, int], Tiles]


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments, options such as ``num_warps`` among them."""

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Any]

    def run(self) -> None:
        """Runs the kernel on the device of its tensors, or in Triton's interpreter."""
        query = self.arguments["q"]
        with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
            self.kernel[self.grid](**self.arguments)


def arch() -> str:
    """Returns the architecture of the current device, such as ``"sm_90"``."""
    if triton.knobs.runtime.interpret:
        return "gfx942"  # its tiles are the largest in fp32, which the interpreter runs fastest
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def forward(call: Mapping[str, Any], sizes: Sizes = tiles_of) -> tuple[Launch, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Prepares the forward kernel, that of row swaps where the call is one.

    Args:
        call: The operator's arguments by name (``ops.ORDER``).
        sizes: Returns the tile sizes, from the arguments of :func:`tiles_of`.

    Returns:
        The launch, and what it fills: output (batch, heads, queries, value_dim), laid out (batch, queries, heads, ...);
        shift and 1 / Z of each row, fp32 (batch, heads, queries); and what the backward reads for the output, see
        :func:`has_mean`.
    """
    query, value = call["query"], call["value"]
    batch, heads, queries, _ = query.shape
    kernel = "forward_rows" if call["threshold"] else "forward"
    tiles, maths = _tiles(kernel, call, sizes), program.load(call["program"])
    # Laid out as the next layer reads it.
    out = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
    mean = torch.empty_like(out, dtype=torch.float32) if has_mean(call) else None
    shifts = query.new_empty((batch, heads, queries), dtype=torch.float32)
    inverses = torch.empty_like(shifts)
    arguments = {
        **_shared(call, tiles),
        **_strides(out=out),
        **_count(call),
        "mean": mean,
        "sinks": call["sinks"],
        "shifts": shifts,
        "inverses": inverses,
    }
    if call["threshold"]:
        arguments |= {name.upper(): getattr(maths, name) for name in ("row_bracket", "row_power", "tile_mass")}
    else:
        arguments |= {
            **key_bounds(call, tiles.keys),
            **{name.upper(): getattr(maths, name) for name in ("row_floor", "row_null", "tile_norm", "tile_weigh")},
            "SHIFTED": call["shifted"],
        }
    grid = triton.cdiv(queries, tiles.rows) * batch * heads
    none = query.new_empty((0, 0, 0, 0), dtype=torch.float32)
    filled = (out, shifts, inverses, none if mean is None else mean)
    return Launch(rows_kernel if call["threshold"] else forward_kernel, (grid,), arguments), filled


def backward(
    call: Mapping[str, Any], grad: Tensor, saved: Sequence[Tensor], wanted: Mapping[str, bool], sizes: Sizes = tiles_of
) -> tuple[Launch, Launch, dict[str, Tensor | None]]:
    """Prepares the backward kernels; the one for queries must run first, as the other reads its dO . O.

    Args:
        call: The operator's arguments by name.
        grad: Gradient of the output, rows in one piece.
        saved: What the forward filled: output or, where there is one, its mean; shifts; 1 / Z.
        wanted: Which of ``row_scale``, ``row_bias``, ``key_bias``, ``sinks`` and ``params`` want a gradient.
        sizes: Returns the tile sizes, from the arguments of :func:`tiles_of`.

    Returns:
        The launches over query blocks and key blocks, and the buffers by name; those of ``sinks`` and ``params`` hold
        one part per block of rows, (batch, heads, blocks) and (batch, heads, blocks, numbers or more).
    """
    query, key, value = call["query"], call["key"], call["value"]
    out, shifts, inverses = saved
    batch, heads, queries, width = query.shape
    rows, columns = (_tiles(f"backward_{part}", call, sizes) for part in ("queries", "keys"))
    maths, numbers = program.load(call["program"]), call["params"].shape[1]
    blocks, numbers_padded = triton.cdiv(queries, rows.rows), 1 << (numbers - 1).bit_length()

    def buffer(name: str, *shape: int) -> Tensor | None:
        return query.new_empty(shape, dtype=torch.float32) if wanted[name] else None

    found = {
        "query": query.new_empty(batch, queries, heads, width).transpose(1, 2),
        "key": key.new_empty(key.shape),
        "value": value.new_empty(value.shape),
        "row_scale": buffer("row_scale", batch, heads, queries),
        "row_bias": buffer("row_bias", batch, heads, queries),
        "key_bias": buffer("key_bias", batch, heads, key.shape[2]),
        "sinks": buffer("sinks", batch, heads, blocks),
        "params": buffer("params", batch, heads, blocks, numbers_padded),
    }
    both = {
        "grad": grad,
        "deltas": torch.empty_like(shifts),
        "shifts": shifts,
        "inverses": inverses,
        "TILE_SLOPES": maths.tile_slopes,
    }
    by_queries = {
        **_shared(call, rows),
        **key_bounds(call, rows.keys),
        **_strides(out=out, grad=grad, dq=found["query"]),
        **_count(call),
        **both,
        "drow_scale": found["row_scale"],
        "drow_bias": found["row_bias"],
        "dsinks": found["sinks"],
        "dnumbers": found["params"],
        "sinks": call["sinks"],
        "TILE_SLOPES_BY": maths.tile_slopes_by,
        "ROW_NULL_BY": maths.row_null_by,
        "READ": maths.READ,
        "NUMBERS_PADDED": numbers_padded,
    }
    spans = _block_spans(call, columns.rows)
    bounds = key_bounds(call, columns.keys)
    decays = bounds["norms"] is not None
    by_keys = {
        **_shared(call, columns),
        **bounds,
        **(query_bounds(call, columns.rows, shifts, inverses) if decays else {"reaches": None, "slacks": None}),
        **_strides(grad=grad, dk=found["key"], dv=found["value"]),
        **both,
        "dkey_bias": found["key_bias"],
        **dict(zip(("block_first", "block_last", "whole_first", "whole_last"), spans, strict=True)),
        "block_batch": _step(spans[0], 0),
    }
    key_blocks = triton.cdiv(key.shape[2], columns.keys) * batch * key.shape[1]
    return (
        Launch(backward_kernels.backward_queries, (blocks * batch * heads,), by_queries),
        Launch(backward_kernels.backward_keys, (key_blocks,), by_keys),
        found,
    )


def _tiles(kernel: str, call: Mapping[str, Any], sizes: Sizes) -> Tiles:
    query, value = call["query"], call["value"]
    return sizes(kernel, arch(), max(query.shape[3], value.shape[3]), query.element_size())


def _shared(call: Mapping[str, Any], tiles: Tiles) -> dict[str, Any]:
    """Returns the arguments that all kernels take."""
    query, key, value, mask, bias = (call[name] for name in ("query", "key", "value", "mask", "bias"))
    first, keep, maths = call["first"], call["keep"], program.load(call["program"])
    centre, near = (None, None) if call["key_bias"] is None else centred(call["key_bias"], tiles.keys)
    return {
        **_strides(q=query, k=key, v=value),
        "first": first,
        "last": call["last"],
        "span_batch": _step(first, 0),
        "keep": None if keep is None else keep.view(torch.uint8),
        "keep_batch": 0 if keep is None else _step(keep, 0),
        "mask": None if mask is None else mask.view(torch.uint8),
        "bias": bias,
        **_mask_strides("mask", mask),
        **_mask_strides("bias", bias),
        "row_scale": call["row_scale"],
        "row_bias": call["row_bias"],
        "centre": centre,
        "near": near,
        "far_apart": 0 if near is None else near[0].numel(),
        "numbers": call["params"],
        "heads": query.shape[1],
        "groups": query.shape[1] // key.shape[1],
        "queries": query.shape[2],
        "keys": key.shape[2],
        "scaling": call["scaling"],
        "softcap": call["softcap"],
        "LOAD_NUMBERS": maths.load_numbers,
        "NUMBERS": call["params"].shape[1],
        "CAPPED": call["softcap"] > 0,
        "WIDTH": query.shape[3],
        "PADDED": padded(query.shape[3]),
        "VALUE_WIDTH": value.shape[3],
        "VALUE_PADDED": padded(value.shape[3]),
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "enable_fp_fusion": True,  # products may keep more digits than asked for; sums of two parts hold none
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _strides(**tensors: Any) -> dict[str, Any]:
    """Returns tensors with their strides as ``NAME_batch``, ``NAME_head`` and ``NAME_row``."""
    found = dict(tensors)
    for name, x in tensors.items():
        found |= zip((f"{name}_batch", f"{name}_head", f"{name}_row"), x.stride()[:3], strict=True)
    return found


def _mask_strides(name: str, x: Tensor | None) -> dict[str, int]:
    steps = (0, 0, 0, 0) if x is None else tuple(_step(x, dim) for dim in range(4))
    return dict(zip((f"{name}_batch", f"{name}_head", f"{name}_row", f"{name}_key"), steps, strict=True))


def _count(call: Mapping[str, Any]) -> dict[str, Any]:
    count = call["count"]
    return {"count": count, "count_batch": _step(count, 0), "count_head": _step(count, 1)}


def _step(x: Tensor, dim: int) -> int:
    """Returns a stride, 0 where one entry serves all."""
    return 0 if x.shape[dim] == 1 else x.stride(dim)


def _block_spans(call: Mapping[str, Any], rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the keys that some row of a block of queries sees, then those that all rows see.

    Each as the first key and one past the last, int32 (batch or 1, blocks). A block with a row beyond the end sees no
    key as a whole.
    """
    first, last, keys = call["first"], call["last"], call["key"].shape[2]
    blind, missing = last <= first, (0, -first.shape[1] % rows)

    def blocks(spans: Tensor, other: int) -> Tensor:
        return torch.nn.functional.pad(spans, missing, value=other).unflatten(1, (-1, rows))

    return (
        blocks(first.masked_fill(blind, keys), keys).amin(2),
        blocks(last.masked_fill(blind, 0), 0).amax(2),
        blocks(first, keys).amax(2),
        blocks(last, 0).amin(2),
    )
