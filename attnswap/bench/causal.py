"""The causal call of a benchmark, as backends receive it."""

from collections.abc import Mapping

from torch import Tensor

from attnswap.attention.problem import Problem, complete_features
from attnswap.attention.visibility import Visibility
from attnswap.swaps import Swap


def causal_problem(swap: Swap, query: Tensor, key: Tensor, value: Tensor, features: Mapping[str, Tensor]) -> Problem:
    """Returns the call in which each query sees its own key and all keys before it."""
    length = query.shape[2]
    return Problem(
        swap=swap,
        query=query,
        key=key,
        value=value,
        visibility=Visibility(length, length, query.device),
        features=complete_features(swap, features, query, key, value),
        scaling=query.shape[-1] ** -0.5,
    )
