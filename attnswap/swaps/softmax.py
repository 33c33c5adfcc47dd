"""Softmax itself, as a swap: what every other one is compared with.

    w_j = e^z_j / sum_k e^z_k

It overrides no stage of the pipeline. Patched into a model it changes nothing but the code that computes attention,
which makes it the control of measurements. What the model adds of its own, such as sinks, is kept.
"""

from dataclasses import dataclass
from typing import ClassVar

from attnswap.swaps.base import Swap


@dataclass(frozen=True)
class Softmax(Swap):
    """Softmax attention (Vaswani et al., arXiv 1706.03762)."""

    name: ClassVar[str] = "softmax"
    paper: ClassVar[str] = "Attention Is All You Need (arXiv 1706.03762)"
    summary: ClassVar[str] = "no change: the control of other swaps"
    native_ramp: ClassVar[bool] = True

    @property
    def exact_identity(self) -> bool:
        return True


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(Softmax())
