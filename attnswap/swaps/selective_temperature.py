"""Selective Self-Attention: each token sets the temperature of its query and the scale of its value.

    w_ij = softmax_j(t_i z_ij),   v_j' = u_j v_j
    t_i = 1 + tanh(f(x_i)) + p_i,   u_j = 1 + tanh(g(x_j))

``f`` and ``g`` are linear maps of the hidden state that enters the attention module; ``p_i`` grows with the number
of keys the query sees: ``gain * ln n_i`` per head (``position="log_n"``), or ``exp(-exp(beta)) ln n_i``, the form
of the released code (``"released"``). With f = g = 0 and gain = 0 the model is left as it was.

Caveats: the value temperature belongs to the key's token and is kept beside the KV cache, one number per
key/value head and token; a selection of heads that splits a key/value group is therefore refused. The released code
has the position part alone: ``SelectiveTemperature(position="released", query=False, value=False)``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from attnswap.swaps.base import Call, Feature, Parameter, Swap, Terms, resolve_init


@dataclass(frozen=True)
class SelectiveTemperature(Swap):
    """Selective Self-Attention (Zhang et al., arXiv 2411.12892).

    Attributes:
        position: The position term of the temperature: ``"log_n"``: gain * ln n with one unconstrained gain per head
            (0 is the identity); ``"released"``: exp(-exp(beta)) * ln n with one beta per head, initially 2.
        query: Whether the temperature of a query depends on its token's hidden state.
        value: Whether values are scaled by a factor from their token's hidden state.
        init: ``"identity"`` (default; not with ``"released"``) or ``"paper"`` (small random gate weights, and a gain of
            0.5).
    """

    position: Literal["log_n", "released"] = "log_n"
    query: bool = True
    value: bool = True
    init: Literal["identity", "paper"] | None = None

    name: ClassVar[str] = "selective-temperature"
    paper: ClassVar[str] = (
        "Selective Attention: Enhancing Transformer through Principled Context Control (arXiv 2411.12892)"
    )
    summary: ClassVar[str] = (
        "softmax with a temperature per query, from its token and ln n; values scaled by a factor from their token"
    )
    needs_n: ClassVar[bool] = True
    native_ramp: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "init", resolve_init(self.init, self.position == "log_n", self.name))

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (
            cls(),
            cls(init="paper"),
            cls(query=False),
            cls(value=False),
            cls(position="released", query=False, value=False),
        )

    @property
    def exact_identity(self) -> bool:
        return self.init == "identity"

    def features(self) -> dict[str, Feature]:
        # The paper's sigmoid(alpha) starts at one half; released beta starts at 2, a factor 6e-4.
        gain = 0.0 if self.init == "identity" else 0.5
        position = Feature("head", initial=gain, what="gain of ln n")
        if self.position == "released":
            what = "beta; the gain of ln n is exp(-exp(beta))"
            position = Feature("head", initial=2.0, what=what, drawn=(-0.9, 0.9), rounded=True)
        found = {"position_gain": position}
        if self.query:
            found["query_temperature"] = Feature("query", what="change of the query's temperature, in (-1, 1)")
        if self.value:
            found["value_temperature"] = Feature("key", "kv", what="change of the value's scale, in (-1, 1)")
        return found

    def gate_parameters(self) -> dict[str, Parameter]:
        std = 0.0 if self.init == "identity" else 0.02
        found: dict[str, Parameter] = {}
        if self.query:
            found |= {"query_weight": Parameter(("heads", "hidden"), std=std), "query_bias": Parameter(("heads",))}
        if self.value:
            found |= {
                "value_weight": Parameter(("kv_heads", "hidden"), std=std),
                "value_bias": Parameter(("kv_heads",)),
            }
        return found

    def gates(self, hidden: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for side in [s for s, on in (("query", self.query), ("value", self.value)) if on]:
            score = torch.nn.functional.linear(hidden, parameters[f"{side}_weight"], parameters[f"{side}_bias"])
            found[f"{side}_temperature"] = torch.tanh(score).transpose(1, 2)
        return found

    def terms(self, call: Call) -> Terms:
        gain = call.features["position_gain"]
        if self.position == "released":
            gain = torch.exp(-torch.exp(gain))
        change = gain * call.n.clamp(min=1).log()
        if self.position == "released":
            # The released code keeps its table of ln n, and so the whole factor, in fp32 also in an fp64 run.
            change = (1 + change).float().to(change.dtype) - 1
        if self.query:
            change = change + call.features["query_temperature"]
        value_scale = 1 + self._value_ramp(call) * call.features["value_temperature"] if self.value else None
        return Terms(query_scale=1 + call.ramp * change, value_scale=value_scale)

    def _value_ramp(self, call: Call) -> Tensor | float:
        """The ramp per key/value head: heads of one group share it, so the first of each group speaks for it."""
        if not isinstance(call.ramp, Tensor) or call.ramp.ndim == 0:
            return call.ramp
        groups = call.features["value_temperature"].shape[1]
        return call.ramp.reshape(groups, -1, 1)[:, 0]


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(SelectiveTemperature(position="log_n", query=False, value=False, init="paper"))
