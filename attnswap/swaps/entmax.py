"""Entmax: softmax's sparse relatives, which give most keys a weight of exactly 0.

    w_j = (1 + (alpha - 1) (z_j - t))_+ ^ (1 / (alpha - 1)),   t such that sum_j w_j = 1

alpha = 1 is softmax, alpha = 2 is sparsemax (the projection onto the simplex), 1.5 lies between. In the papers'
letters the threshold is tau = (alpha - 1) t - 1; written with t the formula has a limit at alpha = 1, so the ramp runs
along alpha: alpha(lambda) = 1 + lambda (alpha - 1). A learned alpha stays in (1, 2) and does not learn before lambda is
1, because its gradient is noise near alpha = 1.

At equal scores entmax is much sharper than softmax: with n keys of equal weight a change of score moves its weights
n^(alpha - 1) times as far. ``scale="predicted"`` multiplies a query's scores by e^t_i, where t is predicted from the
hidden state and ln n (``attnswap.swaps.predicted``). After patching the factor is 1. ``attnswap.training.fit`` fits t
by a regression whose first targets are

    e^t_i = sum_j p_ij^alpha / alpha,   p being softmax's weights,

and which ends as close to softmax as a scale can come, with most weights still 0. ASEntmax scales scores by
delta + beta (ln n)^gamma to the same end.

Caveats: a pretrained model's scores spread over tens of units, where few keys survive; predict a scale, or start at
lambda 0 and raise it. A model's own sinks take part in the sum, unscaled.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from attnswap.errors import require
from attnswap.swaps import expression as fn
from attnswap.swaps import predicted
from attnswap.swaps.base import Call, Feature, Numbers, Observed, Parameter, Swap, Terms
from attnswap.swaps.statistics import Root, Statistic

LARGEST = 2.0
"""Upper bound of the logarithm of a predicted scale; those that are fitted lie below 0."""


@dataclass(frozen=True)
class Entmax(Swap):
    """Entmax (Peters et al., arXiv 1905.05702; learned alpha: Correia et al., arXiv 1909.00015).

    Adaptive scales: Vasylenko et al., arXiv 2506.16640.

    Attributes:
        alpha: In (1, 2], or ``"learned"``: one per head, 1 + sigmoid(a).
        start: Initial value of a learned alpha, in (1, 2).
        scale: ``"predicted"``: multiplies each query's scores by a factor that is predicted from its hidden state,
            initially 1; recommended for pretrained models. None: no factor.
        units: Hidden units of the MLP that the predictor adds to a linear map of the hidden state; 0: the linear map
            only.
    """

    alpha: float | Literal["learned"] = 1.5
    start: float = 1.5
    scale: Literal["predicted"] | None = None
    units: int = 128

    name: ClassVar[str] = "entmax"
    paper: ClassVar[str] = "Sparse Sequence-to-Sequence Models (arXiv 1905.05702)"
    summary: ClassVar[str] = "sparse softmax: keys below a threshold get weight 0 (alpha 2 is sparsemax)"
    native_ramp: ClassVar[bool] = True
    fixed_in_ramp: ClassVar[tuple[str, ...]] = ("alpha_logit",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha == "learned" or 1 < self.alpha <= 2, f"entmax: alpha must be in (1, 2], not {self.alpha}")
        require(1 < self.start < 2, f"entmax: start must be in (1, 2), not {self.start}")
        require(0 <= self.units <= predicted.WIDEST, f"entmax: units must be 0 to {predicted.WIDEST}")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (
            cls(),
            cls(alpha=2.0),
            cls(alpha=1.2),
            cls(alpha="learned"),
            cls(scale="predicted"),
        )

    @property
    def needs_n(self) -> bool:  # type: ignore[override]
        return self.scale is not None

    def features(self) -> dict[str, Feature]:
        found = predicted.features("the logarithm of the scale") if self.scale else {}
        if self.alpha == "learned":
            initial = math.log((self.start - 1) / (2 - self.start))
            found["alpha_logit"] = Feature("head", initial=initial, what="a; alpha is 1 + sigmoid(a)")
        return found

    def gate_parameters(self) -> dict[str, Parameter]:
        return predicted.gate_parameters(self.units) if self.scale else {}

    def gates(self, hidden: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return predicted.gates(hidden, parameters) if self.scale else {}

    @property
    def fit_powers(self) -> tuple[float, ...]:
        return (1.0, self._first_alpha) if self.scale else ()

    @property
    def _first_alpha(self) -> float:
        return self.start if self.alpha == "learned" else self.alpha

    def fit(self, seen: Observed) -> tuple[dict[str, Tensor], float]:
        alpha = self._first_alpha
        share = seen.log_sums[alpha] - alpha * seen.log_sums[1.0]  # ln sum_j p_j^alpha
        return predicted.fit(seen, share - math.log(alpha), self.units)

    def terms(self, call: Call) -> Terms:
        if not self.scale:
            return Terms()
        scale = predicted.predicted(call).clamp(max=LARGEST).exp()
        return Terms(query_scale=1 + call.ramp * (scale - 1))

    def statistics(self) -> dict[str, Statistic]:
        return {"threshold": Root(self._curve, self._bracket, power=self._order)}

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        return self._curve(s, p.threshold, p)

    def _curve(self, s: Any, threshold: Any, p: Numbers) -> Any:
        """Returns the weight of a score, which is 0 where it is below the threshold by 1 / (alpha - 1) or more."""
        order = self._order(p)
        above = order * (s - threshold)
        if isinstance(order, float) and isinstance(p.ramp, float) and p.ramp == 1.0 and order in (0.5, 1.0):
            return fn.power(fn.relu(1 + above), 1 / order)
        # At lambda 0 what is left is e^(s - t); keys below the threshold are held at it, out of the logarithm's way.
        order = fn.maximum(order, 1e-30)
        # Written so that NaN passes both the comparison and the maximum.
        return fn.where(above < -1.0, 0.0, fn.exp(fn.log1p(fn.maximum(-0.9999999, order * (s - threshold))) / order))

    def _bracket(self, top: Any, n: Any, p: Numbers) -> tuple[Any, Any]:
        """Bounds of the threshold: where the largest score alone has weight 1, and where n such keys share it."""
        return top, top + fn.log(n)

    def _order(self, p: Numbers) -> Any:
        """Returns alpha less 1, which is also the power under which the mass is nearly linear."""
        own = fn.sigmoid(p.alpha_logit) if self.alpha == "learned" else self.alpha - 1
        return p.ramp * own


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(Entmax())
