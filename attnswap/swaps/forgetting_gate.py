"""The forgetting gate: each token sets, for each head, a decay of the keys before it.

    w_ij = softmax_j(z_ij + D_ij),   D_ij = sum over l in (j, i] of log f_l,   log f_l <= 0

The gate of the key's own token is left out, that of the query's token counts, so D_ii = 0. The published gate is
log f = logsigmoid(w.x + b); at its initial values each token halves the weight of all keys before it. Here

    log f = -g softplus(-(w.x + b)),   used with max(g, 0),

so that g = 0 leaves a pretrained model (its RoPE included) exactly as it was and g = 1 is the published gate. The
gradient passes straight through the maximum: g can leave 0 upwards, and comes back if it was pushed below.

Caveats: log f is summed in fp64, since a score only sees differences of large sums; padded tokens do not forget; the
gates of past tokens live beside the KV cache. No published work puts this gate into a pretrained softmax model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from attnswap.swaps.base import Call, Feature, Parameter, Swap, Terms, resolve_init


@dataclass(frozen=True)
class ForgettingGate(Swap):
    """The gate of the Forgetting Transformer (Lin et al., arXiv 2503.02130).

    Attributes:
        init: ``"identity"`` (default, g = 0) or ``"paper"`` (g = 1 with small random weights, f near one half).
    """

    init: Literal["identity", "paper"] | None = None

    name: ClassVar[str] = "forgetting-gate"
    paper: ClassVar[str] = "Forgetting Transformer: Softmax Attention with a Forget Gate (arXiv 2503.02130)"
    summary: ClassVar[str] = "a data-dependent decay of older keys, added to the scores"
    native_ramp: ClassVar[bool] = True
    causal_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "init", resolve_init(self.init, True, self.name))

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (cls(), cls(init="paper"))

    @property
    def exact_identity(self) -> bool:
        return self.init == "identity"

    def features(self) -> dict[str, Feature]:
        what = "log f of each key's token, not positive"
        # A row's oldest keys lose one half to seven eighths of their weight.
        return {"log_forget": Feature("key", "query", what=what, drawn=(-2.0, -0.7), summed=True)}

    def gate_parameters(self) -> dict[str, Parameter]:
        gain = 0.0 if self.init == "identity" else 1.0
        return {
            "gain": Parameter(("heads",), initial=gain),
            "weight": Parameter(("heads", "hidden"), std=0.02),
            "bias": Parameter(("heads",)),
        }

    def gates(self, hidden: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        gain = parameters["gain"]
        held = gain.clamp(min=0)
        if torch.is_grad_enabled():
            held = gain + (held - gain).detach()
        score = torch.nn.functional.linear(hidden, parameters["weight"], parameters["bias"])
        log_forget = held * torch.nn.functional.logsigmoid(score)
        return {"log_forget": log_forget.transpose(1, 2)}

    def terms(self, call: Call) -> Terms:
        total = (call.ramp * call.features["log_forget"]).cumsum(-1, dtype=torch.float64)
        return Terms(query_bias=total[..., call.key_index], key_bias=-total)


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(ForgettingGate())
