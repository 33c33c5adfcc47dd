"""Scale-invariant attention: scores scaled and shifted by the logarithm of the distance.

    w_ij = softmax_j(z_ij sqrt(2 l_ij + 1) - 2 l_ij),   l_ij = ln(1 + (i - j) / tau)

For normally distributed scores every range of distances, from 10 to 100 as from 100 to 1000 tokens, then gets a similar
share of the attention, and the attention within it stays as sparse. The ramp divides the distance: l = ln(1 + lambda
(i - j) / tau), which is softmax at lambda = 0.

Caveat: a constant added to a row's scores, which softmax does not see, moves attention towards near or far keys. The
scores of pretrained models carry such constants, so that tau is lowered in steps.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from attnswap.errors import require
from attnswap.swaps import expression as fn
from attnswap.swaps.base import Numbers, Pair, Swap


@dataclass(frozen=True)
class ScaleInvariant(Swap):
    """Scale-invariant attention (Anson et al., arXiv 2505.17083).

    Attributes:
        tau: The distance in tokens from which it acts, positive; 10 in the paper.
    """

    tau: float = 10.0

    name: ClassVar[str] = "scale-invariant"
    paper: ClassVar[str] = "Scale-invariant Attention (arXiv 2505.17083)"
    summary: ClassVar[str] = "scores scaled and shifted by the logarithm of the distance"
    native_ramp: ClassVar[bool] = True
    causal_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tau > 0, f"scale-invariant: tau must be positive, not {self.tau}")

    def pair_scale(self, pair: Pair, p: Numbers) -> Any:
        return fn.power(2.0 * self._log(pair, p) + 1.0, 0.5)

    def pair_bias(self, pair: Pair, p: Numbers) -> Any:
        return -2.0 * self._log(pair, p)

    def _log(self, pair: Pair, p: Numbers) -> Any:
        return fn.log1p(p.ramp * fn.relu(pair.distance) / self.tau)  # later keys are hidden


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(ScaleInvariant())
