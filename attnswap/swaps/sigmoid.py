"""Sigmoid attention: every key is weighed on its own, without a row normalizer.

    w_ij = sigmoid(z_ij + b_i) [/ n_i or / sqrt(n_i)],   b_i = bias + bias_log_n * ln n_i

The published bias is the constant -ln n of the training length, which keeps a row's total near softmax's at the
start of training. In a pretrained model this constant is far from -L_i, where L_i is the logsumexp of the row's scores,
by which softmax divides: perplexity explodes. Most of L_i can be predicted without the keys, so ``bias="predicted"``
predicts it from the query's hidden state and ln n (``attnswap.swaps.predicted``):

    b_i = -t_i,   t_i near L_i after the fit (``attnswap.training.fit``)

The ramp leads from softmax to sigmoid without a jump: with l_i = (1 - lambda) L_i + lambda t_i,

    w_ij = e^(z_ij - l_i) / (1 + lambda e^(z_ij - l_i)),   L_i detached.

Rows are free to sum to anything; a model's own sinks mean nothing here, since there is no denominator for them.

The hidden state of a token says little about how often the token occurred before, and equal keys add up: in the first
layers of a pretrained model, the row of a repeated word sums to many times softmax's 1, and later layers fail. With
``row_limit`` R there is a denominator again, though one that needs no maximum,

    w_ij = sigmoid(z_ij + b_i) / (1 + (S_i - 1) / R),   S_i = sum_k sigmoid(z_ik + b_i):

a row that sums to 1 stays as it is, and no row sums to more than R. Sink logits then add sigmoid(sink) to S.

For a query that sees one key, sigmoid's weight is below 1 for every bias. In some texts the first token then loses its
massive activation, which later heads need. ``keep_lone`` gives that key weight 1, at every lambda (there
l_i = L_i + ln(1 - lambda)).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from attnswap.errors import ConfigError, require
from attnswap.swaps import expression as fn
from attnswap.swaps import predicted
from attnswap.swaps.base import LONE, Call, Feature, ModelInfo, Numbers, Observed, Parameter, Swap, Terms


@dataclass(frozen=True)
class Sigmoid(Swap):
    """Sigmoid self-attention (Ramapuram et al., arXiv 2409.04431).

    Attributes:
        bias: A constant, ``"learned"`` (one per head, starting at the paper's value), ``"predicted"`` (from each
            query's hidden state; recommended for pretrained models) or None: minus the logarithm of the model's
            ``max_position_embeddings``, the paper's choice.
        bias_log_n: Coefficient of ln n in the bias; -1 with ``bias=0`` makes it per-row.
        divide_by_n: Divide each row by its number of visible keys, or with ``"sqrt"`` by the square root of it; the
            released code has both.
        keep_lone: If a query sees a single key, give that key weight 1, as softmax does; False: as published.
        row_limit: Upper bound of the sum of a row's weights, greater than 1; None: no bound, as published.
        units: Hidden units of the MLP that the predictor of the bias adds to a linear map of the hidden state; 0: the
            linear map only.
        max_positions: Training length behind the default bias; filled in from the model.
    """

    bias: float | Literal["learned", "predicted"] | None = None
    bias_log_n: float = 0.0
    divide_by_n: bool | Literal["sqrt"] = False
    keep_lone: bool = False
    row_limit: float | None = None
    units: int = 128
    max_positions: int | None = None

    name: ClassVar[str] = "sigmoid"
    paper: ClassVar[str] = "Theory, Analysis, and Best Practices for Sigmoid Self-Attention (arXiv 2409.04431)"
    summary: ClassVar[str] = "elementwise sigmoid(z + bias), not normalized over the keys (unless row_limit is set)"
    row_sum: ClassVar = "free"
    needs_n: ClassVar[bool] = True
    shifted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.bias != "predicted" or (self.bias_log_n == 0 and not self.divide_by_n),
            'sigmoid: bias="predicted" learns how it depends on n: leave out bias_log_n and divide_by_n',
        )
        require(
            self.row_limit is None or (self.row_limit > 1 and not self.divide_by_n),
            "sigmoid: row_limit must be above 1, and goes without divide_by_n",
        )
        require(0 <= self.units <= predicted.WIDEST, f"sigmoid: units must be 0 to {predicted.WIDEST}")
        require(self.max_positions is None or self.max_positions > 0, "sigmoid: max_positions must be positive")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (
            cls(),
            cls(bias=-1.5),
            cls(bias="learned"),
            cls(bias="predicted"),
            cls(bias="predicted", keep_lone=True),
            cls(bias=-1.5, keep_lone=True),
            cls(bias=0.5, row_limit=1.5),
            cls(bias="predicted", keep_lone=True, row_limit=2.0),
            cls(bias=0.0, bias_log_n=-1.0),
            cls(bias=0.5, divide_by_n=True),
            cls(bias=0.5, divide_by_n="sqrt"),
        )

    def bind(self, info: ModelInfo) -> Self:
        if self.bias not in (None, "learned") or self.max_positions is not None:
            return self
        require(
            info.max_positions is not None,
            "sigmoid: the model's config names no max_position_embeddings; give bias as a number",
        )
        return replace(self, max_positions=info.max_positions)

    @property
    def native_ramp(self) -> bool:  # type: ignore[override]
        return self.bias == "predicted"

    @property
    def needs_logsumexp(self) -> bool:
        return self.bias == "predicted"

    @property
    def _start(self) -> float | None:
        return None if self.max_positions is None else -math.log(self.max_positions)

    def features(self) -> dict[str, Feature]:
        if self.bias == "learned":
            return {"bias": Feature("head", initial=self._start, what="constant part of the bias")}
        if self.bias == "predicted":
            return predicted.features("the logsumexp", slope=1.0)
        return {}

    def gate_parameters(self) -> dict[str, Parameter]:
        return predicted.gate_parameters(self.units) if self.bias == "predicted" else {}

    def gates(self, hidden: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return predicted.gates(hidden, parameters) if self.bias == "predicted" else {}

    @property
    def fit_powers(self) -> tuple[float, ...]:
        return (1.0, 2.0) if self.bias == "predicted" else ()

    def fit(self, seen: Observed) -> tuple[dict[str, Tensor], float]:
        """Makes rows sum to 1, as far as the token tells: see ``missed``, which knows of a row how many keys share it.

        The squared distance to the logsumexp L knows less. With t = L a key that has the row for itself gets half of
        it, and what is wrong by a factor of e either way is not equally bad: one row sums to 2.7, the other to 0.4.
        """
        if self.keep_lone:
            told = seen.n > 1
            sums = {power: x[:, told] for power, x in seen.log_sums.items()}
            seen = Observed(seen.hidden[told], sums, seen.n[told])
        logsumexp, most = seen.log_sums[1.0], seen.n.log()[None]
        sharing = (2 * logsumexp - seen.log_sums[2.0]).clamp(min=0).minimum(most)  # ln of 1 over sum_j p_j^2

        def missed(t: Tensor, rows: predicted.Rows) -> Tensor:
            """Returns what a row's sum is too much, if so many equal keys share it."""
            keys = sharing[:, rows]
            total = (keys + logsigmoid(logsumexp[:, rows] - keys - t)).exp()
            return total / (1 + (total - 1) * self._damping) - 1

        return predicted.fit(seen, logsumexp, self.units, missed)

    @property
    def _damping(self) -> float:
        return 0.0 if self.row_limit is None else 1 / self.row_limit

    def regression(self, call: Call) -> Tensor | None:
        if self.bias != "predicted" or call.logsumexp is None:
            return None
        error = (predicted.predicted(call) - call.logsumexp).square()
        return error * (call.n != 1) if self.keep_lone else error

    def terms(self, call: Call) -> Terms:
        if self.bias == "predicted":
            level = self._kept(call, predicted.predicted(call), -LONE)
            if call.logsumexp is not None:
                ramp = torch.as_tensor(call.ramp, dtype=level.dtype, device=level.device).expand_as(level)
                mixed = torch.lerp(call.logsumexp, level, ramp)
                level = self._kept(call, mixed, call.logsumexp + (1 - ramp).clamp(min=1e-30).log())
            return Terms(query_bias=-level)
        bias = call.features["bias"] if self.bias == "learned" else self._start if self.bias is None else self.bias
        if bias is None:
            raise ConfigError(
                "sigmoid: bias=None takes the model's trained length; outside a model give a number, for example "
                "bias=-math.log(2048)"
            )
        return Terms(query_bias=self._kept(call, bias + self.bias_log_n * call.n.clamp(min=1).log(), LONE))

    def _kept(self, call: Call, value: Tensor, lone: Tensor | float) -> Tensor:
        return torch.where(call.n == 1, lone, value) if self.keep_lone else value

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        if not self.native_ramp or (isinstance(p.ramp, float) and p.ramp == 1.0):
            return fn.sigmoid(s)
        share = fn.maximum(p.ramp, 1e-15)  # at 0 what is left is e^s
        return fn.sigmoid(s + fn.log(share)) / share

    def norm(self, s: Any, shift: Any, p: Numbers) -> Any:
        return 0.0 * s if self.row_limit is None else self._damped(p) * self.weight(s, shift, p)

    def null(self, shift: Any, n: Any, p: Numbers) -> Any:
        if self.row_limit is not None:
            return 1.0 - self._damped(p)
        if self.divide_by_n == "sqrt":
            return fn.power(n, 0.5)
        return n if self.divide_by_n else 1.0

    def _damped(self, p: Numbers) -> Any:
        return self._damping * p.ramp if self.native_ramp else self._damping


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(Sigmoid(bias=-math.log(64)))
