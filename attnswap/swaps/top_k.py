"""Top-k softmax: softmax over the k keys of a row with the largest scores; all others get weight 0.

Keys with the same score as the k-th are all kept. A row with at most k keys is softmax's. Nothing is learned, and no
gradient reaches the keys that are left out.

Caveat: which keys are kept jumps as scores cross, so that outputs are not continuous. Zero-shot it does little harm
while k is large: with 64 keys of 512, a small pretrained model lost 0.023 nats per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from attnswap.errors import require
from attnswap.swaps import expression as fn
from attnswap.swaps.base import Numbers, Swap
from attnswap.swaps.statistics import Rank, Statistic


@dataclass(frozen=True)
class TopK(Swap):
    """Top-k attention (Zhao et al., Explicit Sparse Transformer, arXiv 1912.11637).

    Attributes:
        k: How many keys a row keeps, at least 1.
    """

    k: int = 64

    name: ClassVar[str] = "top-k"
    paper: ClassVar[str] = "Explicit Sparse Transformer (arXiv 1912.11637)"
    summary: ClassVar[str] = "softmax over the k largest scores of a row"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.k >= 1, f"top-k: k must be at least 1, not {self.k}")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (cls(k=3),)

    def statistics(self) -> dict[str, Statistic]:
        return {"last": Rank(self.k)}

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        return fn.where(p.last > s, 0.0, fn.exp(s - shift))


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(TopK(k=8))
