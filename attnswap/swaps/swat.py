"""SWAT: sigmoid attention over a sliding window, with a slope over the distance.

    w_ij = sigmoid(z_ij - m_h (i - j)),   0 <= i - j < window

Without a denominator no head needs a sink, and the window bounds the cost. The slopes m_h start at ALiBi's,
2^(-8 h / H) for head h of H, and are learned. Positive slopes favour recent keys (``slope="recent"``), negative ones
old keys; with ``"balanced"`` the first half of the heads has positive and the second half negative ones.

Caveat: no start equals softmax, and the keys outside the window are lost at once: pretrained models are healed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from attnswap.errors import require
from attnswap.swaps import expression as fn
from attnswap.swaps.base import Feature, ModelInfo, Numbers, Pair, Swap


@dataclass(frozen=True)
class Swat(Swap):
    """Sliding window attention training (Fu et al., arXiv 2502.18845).

    Attributes:
        window: How many keys a query sees, its own included.
        slope: Which keys the slopes favour at first; None: there are none.
        heads: Heads of the layer; filled in from the model.
    """

    window: int = 512
    slope: Literal["recent", "old", "balanced"] | None = "balanced"
    heads: int = 1

    name: ClassVar[str] = "swat"
    paper: ClassVar[str] = "Sliding Window Attention Training for Efficient Large Language Models (arXiv 2502.18845)"
    summary: ClassVar[str] = "sigmoid over a sliding window, with a slope over the distance"
    row_sum: ClassVar = "free"
    causal_only: ClassVar[bool] = True
    shifted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window >= 1, f"swat: window must be at least 1, not {self.window}")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (cls(window=4), cls(window=3, slope=None))

    def bind(self, info: ModelInfo) -> Self:
        return replace(self, heads=info.heads)

    def features(self) -> dict[str, Feature]:
        if self.slope is None:
            return {}
        slopes = [2.0 ** (-8.0 * (head + 1) / self.heads) for head in range(self.heads)]
        signs = [
            -1.0 if self.slope == "old" or (self.slope == "balanced" and 2 * head >= self.heads) else 1.0
            for head in range(self.heads)
        ]
        starts = tuple(sign * slope for sign, slope in zip(signs, slopes, strict=True))
        return {"slope": Feature("head", initial=starts, what="m, what each token of distance takes off the score")}

    def pair_bias(self, pair: Pair, p: Numbers) -> Any:
        return None if self.slope is None else -p.slope * pair.distance

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        return fn.sigmoid(s)

    def norm(self, s: Any, shift: Any, p: Numbers) -> Any:
        return 0.0 * s

    def null(self, shift: Any, n: Any, p: Numbers) -> Any:
        return 1.0


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(Swat())
