"""Sigmoid attention: every key is weighed on its own, without a row normalizer.

    w_ij = sigmoid(z_ij + b_i) [/ n_i],   b_i = bias + bias_log_n * ln n_i

The published bias is the constant -ln n of the training length, which keeps a row's total near softmax's at the
start of training. Put into a pretrained softmax model that start is far off (perplexity explodes), so ramp and heal.
Rows are free to sum to anything; a model's own sinks mean nothing here, since there is no denominator for them.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from attnswap.errors import ConfigError
from attnswap.swaps import expression as fn
from attnswap.swaps.base import Call, Feature, ModelInfo, Numbers, Swap, Terms, require


@dataclass(frozen=True)
class Sigmoid(Swap):
    """Sigmoid self-attention (Ramapuram et al., arXiv 2409.04431).

    Attributes:
        bias: A constant, ``"learned"`` (one per head, starting at the paper's value) or None: minus the logarithm of
            the model's ``max_position_embeddings``, the paper's choice.
        bias_log_n: Coefficient of ln n in the bias; -1 with ``bias=0`` makes it per-row.
        divide_by_n: Divide each row by its number of visible keys.
        max_positions: Training length behind the default bias; filled in from the model.
    """

    bias: float | Literal["learned"] | None = None
    bias_log_n: float = 0.0
    divide_by_n: bool = False
    max_positions: int | None = None

    name: ClassVar[str] = "sigmoid"
    paper: ClassVar[str] = "Theory, Analysis, and Best Practices for Sigmoid Self-Attention (arXiv 2409.04431)"
    summary: ClassVar[str] = "sigmoid(z + bias) for every key on its own, no row normalizer"
    row_sum: ClassVar = "free"
    needs_n: ClassVar[bool] = True
    shifted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_positions is None or self.max_positions > 0, "sigmoid: max_positions must be positive")

    def bind(self, info: ModelInfo) -> Self:
        if self.bias not in (None, "learned") or self.max_positions is not None:
            return self
        require(
            info.max_positions is not None,
            "sigmoid: the model's config names no max_position_embeddings; give bias as a number",
        )
        return replace(self, max_positions=info.max_positions)

    @property
    def _start(self) -> float | None:
        return None if self.max_positions is None else -math.log(self.max_positions)

    def features(self) -> dict[str, Feature]:
        if self.bias == "learned":
            return {"bias": Feature("head", initial=self._start, what="constant part of the bias")}
        return {}

    def terms(self, call: Call) -> Terms:
        bias = call.features["bias"] if self.bias == "learned" else self._start if self.bias is None else self.bias
        if bias is None:
            raise ConfigError(
                "sigmoid: bias=None takes the model's trained length; outside a model give a number, for example "
                "bias=-math.log(2048)"
            )
        return Terms(query_bias=bias + self.bias_log_n * call.n.clamp(min=1).log())

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        return fn.sigmoid(s)

    def norm(self, s: Any, shift: Any, p: Numbers) -> Any:
        return 0.0 * s

    def null(self, shift: Any, n: Any, p: Numbers) -> Any:
        return n if self.divide_by_n else 1.0


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(Sigmoid(bias=-math.log(64)))
