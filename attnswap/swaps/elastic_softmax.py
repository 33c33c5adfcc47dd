"""Elastic softmax: softmax's weights less a learned offset over the number of keys, and nothing below 0.

    w_ij = relu(p_ij + tau_h / n_i),   p = softmax(z + b_h(i - j))

With a negative tau, keys that get less than |tau| times the mean get a weight of exactly 0, and rows sum to less than
1, so that no head needs a sink. tau = 0 is softmax. "Lazy attention" adds b, a learned bias for each head and distance.

Caveats: at the published tau of -1 a row of equal weights is 0, and so is the first row of a text, whose only key then
writes nothing: ``keep_single`` exempts rows of one key. Pretrained models start at 0, or near it and below.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from attnswap.errors import require
from attnswap.swaps import expression as fn
from attnswap.swaps.base import Call, Feature, Numbers, Swap
from attnswap.swaps.statistics import Statistic, Sum


@dataclass(frozen=True)
class ElasticSoftmax(Swap):
    """Elastic softmax, and lazy attention (Fu et al., arXiv 2601.00919).

    Attributes:
        start: Initial value of tau, one for each head; 0: softmax, -1: as published.
        distances: Number of distances, from 0 on, that have a learned bias, initially 0; 0: no bias.
        keep_single: Leave rows with a single visible key as they are; False: as published.
    """

    start: float = 0.0
    distances: int = 0
    keep_single: bool = True

    name: ClassVar[str] = "elastic-softmax"
    paper: ClassVar[str] = "Attention Needs to Focus: Lazy Attention with Elastic-Softmax (arXiv 2601.00919)"
    summary: ClassVar[str] = "softmax less a learned offset over n, nothing below 0: rows may sum to less than 1"
    row_sum: ClassVar = "free"
    needs_n: ClassVar[bool] = True
    native_ramp: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.distances >= 0, f"elastic-softmax: distances must not be negative, not {self.distances}")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (cls(), cls(start=-0.5, distances=4, keep_single=False))

    @property
    def exact_identity(self) -> bool:
        return self.start == 0

    def features(self) -> dict[str, Feature]:
        found = {"tau": Feature("head", initial=self.start, what="tau, the offset times n")}
        if self.distances:
            found["bias"] = Feature("head", initial=0.0, what="bias by distance", width=self.distances)
        return found

    def distance_bias(self, call: Call) -> Tensor | None:
        return _scaled(call.features["bias"], call.ramp) if self.distances else None

    def statistics(self) -> dict[str, Statistic]:
        return {"total": Sum(lambda s, shift, p: fn.exp(s - shift))}

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        offset = p.ramp * p.tau / fn.maximum(p.n, 1.0)
        if self.keep_single:
            offset = fn.where(p.n > 1.5, offset, 0.0 * offset)
        return fn.relu(fn.exp(s - shift) / p.total + offset)

    def norm(self, s: Any, shift: Any, p: Numbers) -> Any:
        return 0.0 * s

    def null(self, shift: Any, n: Any, p: Numbers) -> Any:
        return 1.0


def _scaled(bias: Tensor, ramp: Any) -> Tensor:
    """Returns a bias of shape (heads, distances) times lambda, which may be one for each head, (heads, 1)."""
    return bias * ramp


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(ElasticSoftmax())
