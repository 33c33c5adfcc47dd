"""Sigmoid attention: every key is weighed on its own, without a row normalizer.

    w_ij = sigmoid(z_ij + b_i) [/ n_i],   b_i = bias + bias_log_n * ln n_i

The published bias is the constant -ln n of the training length, which keeps a row's total near softmax's at the
start of training. Put into a pretrained softmax model that start is far off (perplexity explodes). What a pretrained
model lacks is its normalizer, the logsumexp L_i of a row. Most of it can be told without looking at the keys, so
``bias="predicted"`` learns it from the query's token:

    b_i = -(w . x_i + u . gelu(V x_i + c) + offset + slope ln n_i),

the start being a regression to L_i (``attnswap.training.fit``). The linear part knows of keys that are always there,
such as the first; what the spread of all the others adds is closer to a square of the query, hence the network, which
the heads of a layer share. The ramp leads from softmax to sigmoid without a jump: with
l_i = (1 - lambda) L_i + lambda (-b_i),

    w_ij = e^(z_ij - l_i) / (1 + lambda e^(z_ij - l_i)),   L_i detached.

Rows are free to sum to anything; a model's own sinks mean nothing here, since there is no denominator for them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from attnswap.errors import ConfigError
from attnswap.swaps import expression as fn
from attnswap.swaps.base import Call, Feature, ModelInfo, Numbers, Observed, Parameter, Swap, Terms, require

RIDGE = 1e-3
"""Penalty of the linear regression, over the mean square of what it reads."""
STEPS, BATCH, RATE = 600, 4096, 3e-3
"""Of the fit of the network to what the linear regression leaves."""


@dataclass(frozen=True)
class Sigmoid(Swap):
    """Sigmoid self-attention (Ramapuram et al., arXiv 2409.04431).

    Attributes:
        bias: A constant, ``"learned"`` (one per head, starting at the paper's value), ``"predicted"`` (from each
            query's hidden state; the one for pretrained models) or None: minus the logarithm of the model's
            ``max_position_embeddings``, the paper's choice.
        bias_log_n: Coefficient of ln n in the bias; -1 with ``bias=0`` makes it per-row.
        divide_by_n: Divide each row by its number of visible keys.
        units: Width of the network that predicts a bias beside a linear map of the hidden state; 0: the map alone.
        max_positions: Training length behind the default bias; filled in from the model.
    """

    bias: float | Literal["learned", "predicted"] | None = None
    bias_log_n: float = 0.0
    divide_by_n: bool = False
    units: int = 128
    max_positions: int | None = None

    name: ClassVar[str] = "sigmoid"
    paper: ClassVar[str] = "Theory, Analysis, and Best Practices for Sigmoid Self-Attention (arXiv 2409.04431)"
    summary: ClassVar[str] = "sigmoid(z + bias) for every key on its own, no row normalizer"
    row_sum: ClassVar = "free"
    needs_n: ClassVar[bool] = True
    shifted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.bias != "predicted" or (self.bias_log_n == 0 and not self.divide_by_n),
            'sigmoid: bias="predicted" learns how it depends on n: leave out bias_log_n and divide_by_n',
        )
        require(self.units >= 0, "sigmoid: units must not be negative")
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
            return {
                "level": Feature("query", what="the part of the logsumexp that the token tells"),
                "offset": Feature("head", initial=0.0, what="its constant part"),
                "slope": Feature("head", initial=1.0, what="its growth with ln n"),
            }
        return {}

    def gate_parameters(self) -> dict[str, Parameter]:
        if self.bias != "predicted":
            return {}
        network = {
            "inner": Parameter((self.units, "hidden"), std=0.02),
            "inner_bias": Parameter((self.units,)),
            "outer": Parameter(("heads", self.units)),
        }
        return {"weight": Parameter(("heads", "hidden"))} | (network if self.units else {})

    def gates(self, hidden: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.bias != "predicted":
            return {}
        level = linear(hidden, parameters["weight"])
        if self.units:
            level = level + linear(
                gelu(linear(hidden, parameters["inner"], parameters["inner_bias"])), parameters["outer"]
            )
        return {"level": level.transpose(1, 2)}

    def fit(self, seen: Observed) -> dict[str, Tensor]:
        if self.bias != "predicted":
            return {}
        x = torch.cat([seen.hidden, seen.n.log()[:, None], torch.ones_like(seen.n)[:, None]], dim=1).double()
        penalty = RIDGE * x[:, :-2].square().mean(0).sum() / (x.shape[1] - 2) * len(x)
        ridge = torch.full((x.shape[1],), float(penalty), dtype=x.dtype, device=x.device)
        ridge[-2:] = 1e-6 * len(x)
        found = torch.linalg.solve(x.T @ x + ridge.diag(), x.T @ seen.logsumexp.T.double()).T.float()
        straight = {"weight": found[:, :-2].contiguous(), "slope": found[:, -2], "offset": found[:, -1]}
        left = seen.logsumexp.T - x.float() @ found.T
        return straight | (_fit_network(seen.hidden, left, self.units) if self.units else {})

    def regression(self, call: Call) -> Tensor | None:
        if self.bias != "predicted" or call.logsumexp is None:
            return None
        return (self._predicted(call) - call.logsumexp).square()

    def _predicted(self, call: Call) -> Tensor:
        features = call.features
        return features["level"] + features["offset"] + features["slope"] * call.n.clamp(min=1).log()

    def terms(self, call: Call) -> Terms:
        if self.bias == "predicted":
            level = self._predicted(call)
            if call.logsumexp is not None:
                level = torch.lerp(
                    call.logsumexp, level, torch.as_tensor(call.ramp, dtype=level.dtype).expand_as(level)
                )
            return Terms(query_bias=-level)
        bias = call.features["bias"] if self.bias == "learned" else self._start if self.bias is None else self.bias
        if bias is None:
            raise ConfigError(
                "sigmoid: bias=None takes the model's trained length; outside a model give a number, for example "
                "bias=-math.log(2048)"
            )
        return Terms(query_bias=bias + self.bias_log_n * call.n.clamp(min=1).log())

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        if not self.native_ramp or (isinstance(p.ramp, float) and p.ramp == 1.0):
            return fn.sigmoid(s)
        share = fn.maximum(p.ramp, 1e-15)  # at 0 what is left is e^s
        return fn.sigmoid(s + fn.log(share)) / share

    def norm(self, s: Any, shift: Any, p: Numbers) -> Any:
        return 0.0 * s

    def null(self, shift: Any, n: Any, p: Numbers) -> Any:
        return n if self.divide_by_n else 1.0


@torch.enable_grad()
def _fit_network(hidden: Tensor, target: Tensor, units: int) -> dict[str, Tensor]:
    """Returns the network's tensors after some steps of Adam towards a target of shape (tokens, heads)."""
    generator = torch.Generator(hidden.device).manual_seed(0)
    size = float(hidden.square().mean().sqrt())
    noise = torch.randn(units, hidden.shape[1], generator=generator, device=hidden.device)
    inner = (noise / (size * hidden.shape[1] ** 0.5)).requires_grad_()
    inner_bias = torch.zeros(units, device=hidden.device, requires_grad=True)
    outer = torch.zeros(target.shape[1], units, device=hidden.device, requires_grad=True)
    groups: list[dict[str, Any]] = [{"params": [inner], "lr": RATE / size}, {"params": [inner_bias, outer]}]
    optimizer = torch.optim.Adam(groups, lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [RATE / size, RATE], total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(hidden), (BATCH,), generator=generator, device=hidden.device)
        found = linear(gelu(linear(hidden[rows], inner, inner_bias)), outer)
        optimizer.zero_grad()
        (found - target[rows]).square().mean().backward()
        optimizer.step()
        schedule.step()
    return {name: x.detach() for name, x in (("inner", inner), ("inner_bias", inner_bias), ("outer", outer))}


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(Sigmoid(bias=-math.log(64)))
