"""Softmax-1: softmax with a learned null key, so that a head may attend to nothing at all.

    w_j = e^z_j / (e^sink + sum_k e^z_k)

A sink logit of 0 is the "+1" of softmax-1; -infinity is softmax. The row sums to sigmoid(L - sink), L being the
logsumexp of its scores: it is softmax times a gate that closes where no key fits. Computed as a null key of score
``sink`` and value 0, which costs nothing beside the keys. The ramp raises the null key's weight from 0: lambda e^sink.

Caveat: pretrained models already use the first token as a sink. The learned sink logit therefore has little effect
before training, and may never be needed by a model whose texts all have such a token.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from attnswap.swaps import expression as fn
from attnswap.swaps.base import Feature, Numbers, Swap


@dataclass(frozen=True)
class SoftmaxOne(Swap):
    """Softmax-1 with a learned sink (Miller, "Attention is off by one"; Hu et al., arXiv 2404.03828).

    Attributes:
        start: Where each head's sink logit starts; 0 is the published +1.
    """

    start: float = 0.0

    name: ClassVar[str] = "softmax-1"
    paper: ClassVar[str] = "Outlier-Efficient Hopfield Layers for Large Transformer-Based Models (arXiv 2404.03828)"
    summary: ClassVar[str] = "softmax with a learned null key: rows may sum to less than 1"
    row_sum: ClassVar = "at most one"
    native_ramp: ClassVar[bool] = True

    def features(self) -> dict[str, Feature]:
        return {"sink": Feature("head", initial=self.start, what="the null key's score")}

    def shift_floor(self, p: Numbers) -> Any:
        return fn.log(p.ramp) + p.sink

    def null(self, shift: Any, n: Any, p: Numbers) -> Any:
        return fn.exp(fn.log(p.ramp) + p.sink - shift)


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(SoftmaxOne())
