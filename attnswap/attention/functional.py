"""The pure function: attention with any swap on plain tensors."""

from dataclasses import replace

import torch
from torch import Tensor

from attnswap.attention.checks import ensure
from attnswap.attention.dispatch import choose, compute, refuse_misfit, with_weights
from attnswap.attention.problem import Problem, complete_features
from attnswap.attention.visibility import Visibility, split_mask
from attnswap.errors import ConfigError
from attnswap.swaps import SwapLike, resolve
from attnswap.swaps.base import Swap
from attnswap.swaps.softmax import Softmax


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    swap: SwapLike,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scaling: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    backend: str = "auto",
    ramp: float | Tensor = 1.0,
    seed: int | None = None,
    **features: Tensor,
) -> Tensor:
    """Computes attention with another normalizer than softmax.

    Differs from ``torch.nn.functional.scaled_dot_product_attention`` where the lengths differ: ``is_causal=True``
    aligns the *last* query with the *last* key, as decoding with a cache needs it (torch aligns the first with the
    first). A row without any visible key gives 0. Per-head features that are left out take their
    initial value; those per query or per key, such as ``log_forget``, must be given.

    Args:
        query: Shape (batch, heads, queries, head_dim).
        key: Shape (batch, kv heads, keys, head_dim).
        value: Shape (batch, kv heads, keys, value_dim).
        swap: A swap by name, config or mapping.
        attn_mask: Boolean (True: visible) or additive, broadcastable to (batch, heads, queries, keys); with
            ``is_causal`` both apply. An additive value at or below half of its dtype's smallest number hides the key.
        is_causal: Hide the keys after each query.
        scaling: Multiplies the dot products; default ``head_dim ** -0.5``.
        dropout_p: Probability of dropping a weight.
        enable_gqa: Allow fewer key/value heads than query heads.
        backend: ``"auto"``, ``"folded"``, ``"native"``, ``"triton"``, ``"tiled"``, ``"chunked"`` or ``"dense"`` (the
            reference).
        ramp: lambda between softmax (0) and the swap (1): a number, or a tensor of shape () or (heads,).
        seed: Of the random numbers of swaps that read some, from 0 on; None: they are left out.
        **features: The swap's declared features: per head (heads,), per query (batch, heads, queries), per key
            (batch, heads or kv heads, keys), such as ``log_forget`` of the forgetting gate.

    Returns:
        Shape (batch, heads, queries, value_dim), in the dtype of ``value``; inside an autocast region query, key and
        value are cast first, as torch's function casts them.

    Raises:
        ConfigError: A shape, feature, swap or backend does not fit; the message says which and what would.
    """
    if torch.is_autocast_enabled(query.device.type):
        with torch.autocast(query.device.type, enabled=False):  # the parts of each backend would be cast differently
            return attention(
                _as_autocast_would(query),
                _as_autocast_would(key),
                _as_autocast_would(value),
                swap,
                attn_mask=attn_mask,
                is_causal=is_causal,
                scaling=scaling,
                dropout_p=dropout_p,
                enable_gqa=enable_gqa,
                backend=backend,
                ramp=ramp,
                seed=seed,
                **features,
            )
    config = resolve(swap)
    _check(query, key, value, enable_gqa, dropout_p)
    visibility = _visibility(query, key, attn_mask, is_causal)
    problem = _problem(config, query, key, value, visibility, features, scaling, ramp, dropout_p, seed)

    def softmax() -> Tensor:
        plain = replace(problem, swap=Softmax(), features={}, ramp=1.0)
        return choose(plain).attend(plain)

    choose(problem, backend)  # refuses an unknown or unfit backend at every point of the ramp
    return compute(problem, softmax, backend)


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    swap: SwapLike,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scaling: float | None = None,
    ramp: float | Tensor = 1.0,
    seed: int | None = None,
    **features: Tensor,
) -> Tensor:
    """Returns the weights that values get in :func:`attention`, by the dense reference.

    A swap's scale of the values and what it does to outputs are not in them.

    Args:
        query: See :func:`attention`; likewise all others.
        key: Likewise.
        value: Likewise.
        swap: Likewise.
        attn_mask: Likewise.
        is_causal: Likewise.
        scaling: Likewise.
        ramp: Likewise; between 0 and 1 only for swaps whose maths has a ramp of its own.
        seed: Likewise.
        **features: Likewise.

    Returns:
        Shape (batch, heads, queries, keys).
    """
    config = resolve(swap)
    _check(query, key, value, True, 0.0)
    visibility = _visibility(query, key, attn_mask, is_causal)
    problem = _problem(config, query, key, value, visibility, features, scaling, ramp, 0.0, seed)
    refuse_misfit(problem)
    return with_weights(problem)[1]


def _as_autocast_would(x: Tensor) -> Tensor:
    cast = x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if cast else x


def _check(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, dropout_p: float) -> None:
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ConfigError("query, key and value must have 4 dimensions: (batch, heads, tokens, head_dim)")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ConfigError(f"shapes of query, key and value do not go together: {shapes}")
    if not query.shape[2] or not key.shape[2]:
        raise ConfigError(f"{query.shape[2]} queries and {key.shape[2]} keys: give at least one token of each")
    if not all((query.shape[1], key.shape[1], query.shape[3], value.shape[3])):
        raise ConfigError(
            f"{query.shape[1]} query heads of width {query.shape[3]} and {key.shape[1]} key/value heads with values of "
            f"width {value.shape[3]}: nothing but the batch may be empty"
        )
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise ConfigError(
            f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; give one floating point dtype"
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads != kv_heads and (not enable_gqa or heads % kv_heads):
        way = "" if enable_gqa else "; pass enable_gqa=True to share keys between heads"
        raise ConfigError(f"{heads} query heads and {kv_heads} key/value heads do not go together{way}")
    if not 0 <= dropout_p < 1:
        raise ConfigError(f"dropout_p must be in [0, 1), not {dropout_p}")


def _visibility(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Visibility:
    q_length, k_length = query.shape[2], key.shape[2]
    full = (query.shape[0], query.shape[1], q_length, k_length)
    dense, bias = (None, None) if attn_mask is None else split_mask(attn_mask, full)
    return Visibility(q_length, k_length, query.device, is_causal, q_offset=k_length - q_length, dense=dense, bias=bias)


def _problem(
    swap: Swap,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    features: dict[str, Tensor],
    scaling: float | None,
    ramp: float | Tensor,
    dropout: float,
    seed: int | None,
) -> Problem:
    """Puts checked tensors into the form that backends take, with what was left out at its default."""
    return Problem(
        swap=swap,
        query=query,
        key=key,
        value=value,
        visibility=visibility,
        features=complete_features(swap, features, query, key, value),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        ramp=_ramp(ramp, query, key, swap),
        dropout=dropout,
        seed=None if seed is None else torch.tensor(seed, device=query.device),
    )


def _check_shared(ramp: Tensor, groups: int, swap: Swap) -> None:
    if not torch.compiler.is_compiling():
        swap.check_shared(ramp.tolist(), groups)
    elif swap.traits.per_kv_head:
        by_group = ramp.reshape(-1, groups)
        ensure((by_group == by_group[:, :1]).all(), f'"{swap.name}": heads that share a key/value head need one ramp')


def _ramp(ramp: float | Tensor, query: Tensor, key: Tensor, swap: Swap) -> float | Tensor:
    if isinstance(ramp, Tensor):
        if ramp.ndim and tuple(ramp.shape) != (query.shape[1],):
            raise ConfigError(
                f"ramp has shape {tuple(ramp.shape)}; give a number or a tensor of shape ({query.shape[1]},)"
            )
        ensure(((ramp >= 0) & (ramp <= 1)).all(), "ramp must be in [0, 1]", lambda: f", not {ramp.tolist()}")
        if ramp.ndim:
            _check_shared(ramp, query.shape[1] // key.shape[1], swap)
        return ramp.to(device=query.device, dtype=torch.promote_types(query.dtype, torch.float32))
    if isinstance(ramp, bool) or not isinstance(ramp, int | float) or not 0 <= ramp <= 1:
        raise ConfigError(f"ramp must be in [0, 1], not {ramp!r}")
    return float(ramp)
