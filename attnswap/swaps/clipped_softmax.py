"""Clipped softmax: softmax stretched beyond 0 and 1 and clipped there, so that weights of exactly 0 are easy to reach.

    w_ij = clip((eta - g_i) p_ij + g_i, 0, 1),   g_i = gamma, or gamma / n_i

with gamma <= 0 and eta >= 1; gamma = 0 and eta = 1 is softmax. A head that wants to do nothing need not drive scores
apart, which is what makes activations with outliers. Rows sum to less than 1 where weights are clipped at 0.

Caveat: a gamma that does not depend on the number of keys takes everything from long rows. In a pretrained model
-0.03 costs 4.4 nats per token at 512 tokens, and -0.1 / n costs 0.02.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from attnswap.errors import require
from attnswap.swaps import expression as fn
from attnswap.swaps.base import Numbers, Swap
from attnswap.swaps.statistics import Statistic, Sum


@dataclass(frozen=True)
class ClippedSoftmax(Swap):
    """Clipped softmax (Bondarenko et al., arXiv 2306.12929).

    Attributes:
        gamma: Where the stretched softmax begins, at most 0.
        eta: Where it ends, at least 1.
        over_n: Divide gamma by the number of visible keys; False: as published.
    """

    gamma: float = -0.1
    eta: float = 1.0
    over_n: bool = True

    name: ClassVar[str] = "clipped-softmax"
    paper: ClassVar[str] = "Quantizable Transformers: Removing Outliers by Helping Heads Do Nothing (arXiv 2306.12929)"
    summary: ClassVar[str] = "softmax stretched beyond 0 and 1 and clipped: rows may sum to less than 1"
    row_sum: ClassVar = "free"
    native_ramp: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gamma <= 0, f"clipped-softmax: gamma must be at most 0, not {self.gamma}")
        require(self.eta >= 1, f"clipped-softmax: eta must be at least 1, not {self.eta}")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (cls(gamma=-0.5), cls(gamma=-0.03, eta=1.05, over_n=False))

    @property
    def needs_n(self) -> bool:  # type: ignore[override]
        return self.over_n

    @property
    def exact_identity(self) -> bool:
        return self.gamma == 0 and self.eta == 1

    def statistics(self) -> dict[str, Statistic]:
        return {"total": Sum(lambda s, shift, p: fn.exp(s - shift))}

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        low = p.ramp * self.gamma / (fn.maximum(p.n, 1.0) if self.over_n else 1.0)
        high = 1.0 + p.ramp * (self.eta - 1)
        return fn.clamp((high - low) * fn.exp(s - shift) / p.total + low, 0.0, 1.0)

    def norm(self, s: Any, shift: Any, p: Numbers) -> Any:
        return 0.0 * s

    def null(self, shift: Any, n: Any, p: Numbers) -> Any:
        return 1.0


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(ClippedSoftmax())
