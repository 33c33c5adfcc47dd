"""Gumbel softmax: noise on the scores in training, and a temperature.

    w_ij = softmax_j((z_ij + g_ij) / T),   g = -ln(-ln u), u uniform in (0, 1)

Each row samples which keys it attends to, softly; the lower the temperature, the closer to a single one. Without a
seed, as in evaluation, there is no noise, and what is left is softmax at temperature T. In a model the noise is drawn
anew for every layer and training step. The ramp brings in noise and temperature together.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from attnswap.errors import require
from attnswap.swaps import expression as fn
from attnswap.swaps.base import Call, Numbers, Pair, Swap, Terms


@dataclass(frozen=True)
class GumbelSoftmax(Swap):
    """Attention by Gumbel softmax (Jang et al., arXiv 1611.01144; Maddison et al., arXiv 1611.00712).

    Attributes:
        temperature: T, positive.
    """

    temperature: float = 0.7

    name: ClassVar[str] = "gumbel-softmax"
    paper: ClassVar[str] = "Categorical Reparameterization with Gumbel-Softmax (arXiv 1611.01144)"
    summary: ClassVar[str] = "Gumbel noise on the scores in training, and a temperature"
    native_ramp: ClassVar[bool] = True
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, f"gumbel-softmax: temperature must be positive, not {self.temperature}")

    def terms(self, call: Call) -> Terms:
        return Terms(query_scale=(1 + call.ramp * (1 / self.temperature - 1)) * (call.n * 0 + 1))

    def pair_bias(self, pair: Pair, p: Numbers) -> Any:
        return -p.ramp / self.temperature * fn.log(-fn.log(pair.uniform))


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(GumbelSoftmax())
