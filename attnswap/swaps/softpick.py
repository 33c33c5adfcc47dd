"""Softpick: rectified softmax, whose rows may sum to less than one, so that no head needs a sink.

    w_j = relu(e^z_j - 1) / (sum_k |e^z_k - 1| + eps)

A key with a negative score gets weight exactly 0 but still adds to the denominator. With the shift
m = max(max_j z_j, 0) nothing overflows, also where every score is far below 0 (the published stable form shifts by
max z alone, and its gradient is NaN there). A row of only negative scores gives output 0 and no gradient: dead heads
are this swap's known weakness. No option makes it equal softmax at first, so pretrained models are healed or use the
ramp:

    w_j = relu(e^z_j - c) / (sum_k |e^z_k - c| + c eps),   c = lambda,

which is softmax at lambda = 0 and softpick at lambda = 1.

Every key below the threshold adds up to 1 to the denominator, which dilutes the weights of the others in proportion to
n: with eight times as many keys, a pretrained model loses most of each head's output. For n_i > ``anchor``, a constant
is added to all scores of the row,

    z_ij + max(0, ln n_i - ln anchor),

which would not change softmax. The dilution then stays at its value for n = anchor.

A query that sees a single key, such as that of a text's first token, gives it weight 1 or 0, by the sign of its score.
The sign has no meaning in softmax, and pretrained models rely on that token: without ``keep_lone``, which gives the key
weight 1, even a tiny lambda does damage.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from attnswap.errors import require
from attnswap.swaps import expression as fn
from attnswap.swaps.base import LONE, Call, Numbers, Swap, Terms
from attnswap.swaps.statistics import Max, Statistic


@dataclass(frozen=True)
class Softpick(Swap):
    """Softpick (Zuhri et al., arXiv 2504.20966).

    Attributes:
        eps: Added to the denominator.
        eps_after_max_shift: Add ``eps`` after dividing numerator and denominator by e^m, as the released kernels do;
            its relative size then depends on the row's largest score.
        anchor: Number of visible keys n above which ln(n / anchor) is added to the scores; None: never, as published.
        keep_lone: If a query sees a single key, give that key weight 1, as softmax does; False: as published.
    """

    eps: float = 1e-6
    eps_after_max_shift: bool = False
    anchor: int | None = None
    keep_lone: bool = False

    name: ClassVar[str] = "softpick"
    paper: ClassVar[str] = (
        "Softpick: No Attention Sink, No Massive Activations with Rectified Softmax (arXiv 2504.20966)"
    )
    summary: ClassVar[str] = "relu(e^z - 1) over sum |e^z - 1|: rows may sum to less than 1, no sinks"
    row_sum: ClassVar = "at most one"
    native_ramp: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.eps >= 0, f"softpick: eps must not be negative, not {self.eps}")
        require(self.anchor is None or self.anchor > 0, "softpick: anchor must be a positive number of keys")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (
            cls(),
            cls(anchor=6),
            cls(keep_lone=True),
            cls(eps=1e-2),
            cls(eps=1e-2, eps_after_max_shift=True),
        )

    def terms(self, call: Call) -> Terms:
        raised = None
        if self.anchor is not None:
            raised = (call.n.clamp(min=1).log() - math.log(self.anchor)).clamp(min=0)
        if self.keep_lone:
            lone = LONE * (call.n == 1).to(call.n.dtype)
            raised = lone if raised is None else raised + lone
        return Terms(query_bias=raised)

    def statistics(self) -> dict[str, Statistic]:
        return {"top": Max()} if self.eps_after_max_shift else {}

    def shift_floor(self, p: Numbers) -> Any:
        return fn.log(p.ramp)

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        return fn.relu(fn.exp(s - shift) - p.ramp * _unit(shift))

    def norm(self, s: Any, shift: Any, p: Numbers) -> Any:
        return fn.abs(fn.exp(s - shift) - p.ramp * _unit(shift))

    def null(self, shift: Any, n: Any, p: Numbers) -> Any:
        if not self.eps_after_max_shift:
            return p.ramp * self.eps * _unit(shift)
        # The shift is this maximum, as a constant; the released code lets gradients through.
        return p.ramp * self.eps * fn.exp(fn.maximum(p.top, self.shift_floor(p)) - shift)


def _unit(shift: Any) -> Any:
    """e^0 relative to the shift. A positive fp32 lambda keeps the shift above -88; at lambda 0 nothing overflows."""
    return fn.exp(fn.minimum(-shift, 88.0))


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(Softpick())
