"""Stick-breaking attention: every key, from the newest to the oldest, takes its share of what is left of the row.

    w_ij = sigmoid(z_ij + b_i) * prod_{j < l < i} (1 - sigmoid(z_il + b_i)),   b_i = bias + bias_log_n ln n_i

A key's weight depends on the keys after it, so that the model needs no position embeddings. As published a query does
not see its own key (``own="hidden"``), and what is left of the row, 1 - sum_j w_ij, is dropped. With ``own="key"`` the
product begins with its own key; with ``own="remainder"`` its own value gets what is left.

Caveats: no start equals softmax. Scores that suit softmax give nearly everything to the last few keys: a bias of
-ln n (``bias_log_n=-1``) lets rows reach far back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from attnswap.swaps import expression as fn
from attnswap.swaps.base import Call, Numbers, Pair, Swap, Terms
from attnswap.swaps.statistics import Scan, Statistic, Sum

UNSEEN = -1e30
"""A score whose sigmoid and softplus are exactly 0."""


@dataclass(frozen=True)
class StickBreaking(Swap):
    """Stick-breaking attention (Tan et al., arXiv 2410.17980).

    Attributes:
        own: What becomes of a query's own key.
        bias: Added to all scores.
        bias_log_n: Coefficient of ln n in what is added.
    """

    own: Literal["hidden", "key", "remainder"] = "hidden"
    bias: float = 0.0
    bias_log_n: float = 0.0

    name: ClassVar[str] = "stick-breaking"
    paper: ClassVar[str] = "Scaling Stick-Breaking Attention (arXiv 2410.17980)"
    summary: ClassVar[str] = "sigmoid shares of what later keys leave over"
    row_sum: ClassVar = "at most one"
    causal_only: ClassVar[bool] = True
    shifted: ClassVar[bool] = False

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (cls(), cls(own="key"), cls(own="remainder", bias_log_n=-1.0))

    @property
    def needs_n(self) -> bool:  # type: ignore[override]
        return self.bias_log_n != 0

    def terms(self, call: Call) -> Terms:
        return Terms(query_bias=self.bias + self.bias_log_n * call.n.clamp(min=1).log())

    def pair_bias(self, pair: Pair, p: Numbers) -> Any:
        return None if self.own == "key" else fn.where(pair.distance > 0.5, 0.0, UNSEEN)

    def statistics(self) -> dict[str, Statistic]:
        found: dict[str, Statistic] = {"later": Scan(lambda s, shift, p: fn.softplus(s))}
        if self.own == "remainder":
            found["total"] = Sum(lambda s, shift, p: fn.softplus(s))
        return found

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        share = fn.sigmoid(s) * fn.exp(-p.later)
        return share if self.own != "remainder" else fn.where(s > UNSEEN / 2, share, fn.exp(-p.total))

    def norm(self, s: Any, shift: Any, p: Numbers) -> Any:
        return 0.0 * s

    def null(self, shift: Any, n: Any, p: Numbers) -> Any:
        return 1.0


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(StickBreaking())
