"""LSSA and LSSAR: softplus of length-scaled cosine scores, normalised by its sum, and optionally sharpened.

    a_ij = softplus(ln d * ln n_i * q_i.k_j / (|q_i| |k_j|)),   A_ij = a_ij / sum_k a_ik      (LSSA)
    b_ij = relu(n_i A_ij - o_i) ^ power,                        w_ij = b_ij / sum_k b_ik      (LSSAR)

d is head_dim, and o_i is 1 but for the first three rows of a text, where it is 0: the mean of n A is 1, so that LSSAR
keeps the keys above the mean and sharpens what they have more. Powers of 3 are best at the trained length, 15 beyond
it. The power is taken of the ratio to the row's largest term, without which 15 overflows from some 370 keys on.

Caveats: nothing is learned and no start equals softmax, so that pretrained models are healed or use the ramp. A row
whose keys all fit equally well has no key above the mean, and gives output 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from attnswap.errors import require
from attnswap.swaps import expression as fn
from attnswap.swaps.base import Call, Numbers, Prepared, Swap, Terms
from attnswap.swaps.statistics import Statistic, Sum

WITHOUT_MEAN = 3
"""Rows with at most so many keys keep all of them."""


@dataclass(frozen=True)
class LSSA(Swap):
    """Length-scaled softplus attention, and its re-weighting (Gao et al., arXiv 2501.13428).

    Attributes:
        power: Power of the re-weighting (LSSAR), at least 1; None: without it (LSSA).
        eps: Added to both sums.
    """

    power: float | None = None
    eps: float = 0.0

    name: ClassVar[str] = "lssa"
    paper: ClassVar[str] = "Softplus Attention with Re-weighting Boosts Length Extrapolation (arXiv 2501.13428)"
    summary: ClassVar[str] = "softplus of length-scaled cosine scores; power sharpens what is above the mean (LSSAR)"
    row_sum: ClassVar = "at most one"
    needs_n: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.power is None or self.power >= 1, f"lssa: power must be at least 1, not {self.power}")
        require(self.eps >= 0, f"lssa: eps must not be negative, not {self.eps}")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (cls(), cls(power=2.0, eps=1e-8))

    @property
    def shifted(self) -> bool:  # type: ignore[override]
        return self.power is not None  # softplus itself is relative to nothing

    def prepare(self, call: Call) -> Prepared:
        # Not rounded to 16 bits again: a high power makes much of a small error.
        query, key, value = (x.to(call.n.dtype) for x in (call.query, call.key, call.value))
        unit_query, unit_key = (torch.nn.functional.normalize(x, dim=-1) for x in (query, key))
        return Prepared(unit_query, unit_key, value, math.log(query.shape[-1]))

    def terms(self, call: Call) -> Terms:
        return Terms(query_scale=call.n.clamp(min=1).log())

    def statistics(self) -> dict[str, Statistic]:
        return {} if self.power is None else {"total": Sum(lambda s, shift, p: fn.softplus(s))}

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        if self.power is None:
            return fn.softplus(s)
        return fn.power(fn.relu(self._above(s, p) / self._largest(shift, p)), self.power)

    def null(self, shift: Any, n: Any, p: Numbers) -> Any:
        return (
            self.eps if self.power is None or not self.eps else self.eps / fn.power(self._largest(shift, p), self.power)
        )

    def _above(self, s: Any, p: Numbers) -> Any:
        """Returns how far n A is above the mean of a row, or above 0 in the first rows."""
        return p.n * fn.softplus(s) / (p.total + self.eps) - fn.where(p.n > WITHOUT_MEAN + 0.5, 1.0, 0.0)

    def _largest(self, shift: Any, p: Numbers) -> Any:
        """Returns the row's largest such number; a row of equal keys has none but rounding errors."""
        return fn.maximum(self._above(shift, p), 1e-6)


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(LSSA())
