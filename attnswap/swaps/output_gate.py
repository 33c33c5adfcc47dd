"""Output gate: every head's output times a sigmoid that is predicted from the query's hidden state.

    o'_i = o_i * (1 + (sigmoid(g_i + c) - sigmoid(c)) / sigmoid(c)),   g_i = W x_i,   sigmoid(c) = ``start``

With W = 0 this is the identity. At the default start it is 2 sigmoid(g_i), and at a start near 1 a gate that can close
but hardly open. With ``start=None`` it is sigmoid(g_i) itself, as published, which halves every output at first. There
is one gate per head, or one for each number of a head's output. The attention weights stay softmax's; the gate lets a
head say nothing, so that it needs no attention sink.

Caveat: gates added to a pretrained model at W = 0 have been reported to stay near 1. Give them a learning rate of their
own, and some noise (``std``), which is then no exact identity.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from attnswap.errors import require
from attnswap.swaps.base import Call, Feature, Parameter, Swap


@dataclass(frozen=True)
class OutputGate(Swap):
    """Gated attention (Qiu et al., arXiv 2505.06708; in fine-tuning: Bondarenko et al., arXiv 2306.12929).

    Attributes:
        per: ``"head"``: one gate for each head; ``"element"``: one for each number of its output.
        start: What the sigmoid is at first, in (0, 1); outputs are divided by it. None: not divided, as published.
        std: Deviation of the initial weights.
    """

    per: Literal["head", "element"] = "head"
    start: float | None = 0.5
    std: float = 0.0

    name: ClassVar[str] = "output-gate"
    paper: ClassVar[str] = "Gated Attention for Large Language Models (arXiv 2505.06708)"
    summary: ClassVar[str] = "the head's output times a sigmoid of the query's hidden state"
    native_ramp: ClassVar[bool] = True
    built_in: ClassVar[str] = r"output\b.*\*.*(gate|g_proj)|(gate|g_proj).*\* *(attn_)?output\b"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.start is None or 0 < self.start < 1, f"output-gate: start must be in (0, 1), not {self.start}")
        require(self.std >= 0, f"output-gate: std must not be negative, not {self.std}")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (cls(), cls(per="element", start=0.9), cls(start=None, std=0.02))

    @property
    def exact_identity(self) -> bool:
        return self.start is not None and self.std == 0

    def features(self) -> dict[str, Feature]:
        width: Literal["value_dim"] | None = "value_dim" if self.per == "element" else None
        return {"gate": Feature("query", what="g, before the sigmoid", width=width)}

    def gate_parameters(self) -> dict[str, Parameter]:
        each: Any = ("heads", "hidden") if self.per == "head" else ("heads", "value_dim", "hidden")
        return {"weight": Parameter(each, std=self.std)}

    def gates(self, hidden: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight = parameters["weight"]
        gate = torch.nn.functional.linear(hidden, weight.flatten(0, -2)).unflatten(-1, weight.shape[:-1])
        return {"gate": gate.transpose(1, 2)}

    def finish(self, out: Tensor, call: Call) -> Tensor:
        gate, ramp = call.features["gate"], call.ramp
        if self.per == "head":
            gate = gate[..., None]
        if isinstance(ramp, Tensor) and ramp.ndim:
            ramp = ramp[..., None]
        return out * (1 + ramp * self._change(gate))

    def _change(self, gate: Tensor) -> Tensor:
        """Returns the factor less 1; with a start it is exactly 0 where the gate is."""
        if self.start is None:
            return gate.sigmoid() - 1
        offset = gate.new_tensor(math.log(self.start / (1 - self.start)))
        return ((gate + offset).sigmoid() - offset.sigmoid()) / self.start


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(OutputGate())
