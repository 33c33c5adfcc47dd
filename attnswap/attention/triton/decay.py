"""What the kernels need to know of a key bias: a form that fp32 holds, and bounds by which decayed tiles are left out.

A tile is left out where no score in it can come near the row's shift: |q| |k| and the biases bound it. Weights of
softmax alone are that small far below their shift, so nothing else is left out.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def centred(key_bias: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Splits a key bias into each tile's last value and what is left, which fp32 can hold.

    Args:
        key_bias: fp64 (batch, heads, keys).
        keys: Keys in a tile.

    Returns:
        The last values, fp64 (batch, heads, tiles); and the rest as two fp32 numbers that add up to it,
        (2, batch, heads, keys).
    """
    length = key_bias.shape[2]
    index = torch.arange(length, device=key_bias.device)
    centre = key_bias[..., (index[::keys] + keys - 1).clamp(max=length - 1)]
    rest = key_bias - centre[..., index // keys]
    high = rest.float()
    return centre.contiguous(), torch.stack([high, (rest - high).float()])


def key_bounds(call: Mapping[str, Any], keys: int) -> dict[str, Any]:
    """Returns what bounds the scores of key tiles, as kernel arguments.

    Args:
        call: The operator's arguments by name.
        keys: Keys in a tile.

    Returns:
        ``norms``, the largest norm of a key, fp32 (batch, kv heads, tiles); ``crests``, the largest key bias, fp64
        (batch, heads, tiles); ``limit``, how far below its row's shift a score counts for nothing: all keys together
        then add less than the tolerance to a row's largest term. ``norms`` is None where no tile may be left out.
    """
    key, key_bias, tolerance = call["key"], call["key_bias"], call["tolerance"]
    other = call["row_scale"] is not None or call["bias"] is not None or call["softcap"] > 0
    if key_bias is None or tolerance <= 0 or other:
        return {"norms": None, "crests": None, "limit": 0.0}
    return {
        "norms": _largest(_norms(key), keys, 0.0),
        "crests": _largest(key_bias, keys, -math.inf),
        "limit": math.log(tolerance / max(key.shape[2], 1)),
    }


def query_bounds(call: Mapping[str, Any], rows: int, shifts: Tensor, inverses: Tensor) -> dict[str, Tensor]:
    """Returns what bounds the scores of query blocks, as kernel arguments.

    Args:
        call: The operator's arguments by name.
        rows: Queries in a block.
        shifts: fp32 (batch, heads, queries).
        inverses: 1 / Z, the same shape; rows where it is 0 see nothing.

    Returns:
        ``reaches``, the scaled norm of a query, fp32 (batch, heads, blocks); ``slacks``, the row's own bias less its
        shift, fp64, same shape: the largest of each.
    """
    own = -shifts.double() if call["row_bias"] is None else call["row_bias"] - shifts
    return {
        "reaches": _largest(_norms(call["query"]) * abs(call["scaling"]), rows, 0.0),
        "slacks": _largest(own.masked_fill(inverses == 0, -math.inf), rows, -math.inf),
    }


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


def _largest(x: Tensor, size: int, padding: float) -> Tensor:
    """The largest of each ``size`` entries of the last dimension; NaN where one is."""
    return pad(x, (0, -x.shape[2] % size), value=padding).unflatten(2, (-1, size)).amax(3).contiguous()
