"""A number for each query and head, predicted from its hidden state: a property of a row before its keys are read.

    t_i = w . x_i + u . gelu(V x_i + c) + offset + slope ln n_i

x_i is what enters the attention module. The linear part knows of keys that are always there, such as the first; what
the spread of all the others adds is closer to a square of the query, hence the network, which the heads of a layer
share. Until they are fitted (``attnswap.training.fit``) or learned, both parts add nothing.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from attnswap.swaps.base import Call, Feature, Observed, Parameter

RIDGE = 1e-3
"""Penalty of the linear regression, over the mean square of what it reads."""
WIDEST = 1 << 16
"""The most units of the network: more is a mistake, which memory alone would refuse."""
STEPS, BATCH, RATE = 600, 4096, 3e-3
"""Of the descent from the linear regression."""
Rows = Tensor | slice
Missed = Callable[[Tensor, Rows], Tensor]


def features(what: str, slope: float = 0.0) -> dict[str, Feature]:
    """Returns what a swap that predicts declares.

    Args:
        what: Name of the number.
        slope: Where its growth with ln n starts.
    """
    return {
        "level": Feature("query", what=f"the part of {what} that the token tells"),
        "offset": Feature("head", initial=0.0, what="its constant part"),
        "slope": Feature("head", initial=slope, what="its growth with ln n"),
    }


def gate_parameters(units: int) -> dict[str, Parameter]:
    """Returns the learned tensors behind ``level``; with 0 units the linear map alone."""
    network = {
        "inner": Parameter((units, "hidden"), std=0.02),
        "inner_bias": Parameter((units,)),
        "outer": Parameter(("heads", units)),
    }
    return {"weight": Parameter(("heads", "hidden"))} | (network if units else {})


def gates(hidden: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Computes ``level``, (batch, heads, tokens), from hidden states of shape (batch, tokens, hidden)."""
    level = linear(hidden, parameters["weight"])
    if "inner" in parameters:
        inner = gelu(linear(hidden, parameters["inner"], parameters["inner_bias"]))
        level = level + linear(inner, parameters["outer"])
    return {"level": level.transpose(1, 2)}


def predicted(call: Call) -> Tensor:
    """Returns t, (batch, heads, queries)."""
    return _joined(call.features, call.n)


def _joined(told: Mapping[str, Tensor], n: Tensor) -> Tensor:
    return told["level"] + told["offset"] + told["slope"] * n.clamp(min=1).log()


def fit(seen: Observed, target: Tensor, units: int, missed: Missed | None = None) -> tuple[dict[str, Tensor], float]:
    """Fits t to some text.

    Args:
        seen: Text through one layer.
        target: What t should be, shape (heads, tokens).
        units: Width of the network.
        missed: What is wrong with a t, of shape (heads, rows), for the tokens of some rows; None: its distance to the
            target. The linear map begins as the least squares of that distance in any case.

    Returns:
        The learned tensors by name, and the root mean square of what they miss.
    """
    values = _least_squares(seen, target)
    wrong = missed or (lambda t, rows: t - target[:, rows])
    size = float(seen.hidden.square().mean().sqrt())
    network = _network_start(seen.hidden, size, len(target), units) if units else {}
    if missed:
        values = _descend(seen, size, {}, values | network, wrong)
    elif units:  # the map is where it belongs
        values = _descend(seen, size, values, network, wrong)
    everything = slice(None)
    left = wrong(_told(seen, values, everything), everything)
    return values, float(left.square().mean().sqrt())


def _least_squares(seen: Observed, target: Tensor) -> dict[str, Tensor]:
    ones = torch.ones_like(seen.n)[:, None]
    x = torch.cat([seen.hidden, seen.n.log()[:, None], ones], dim=1).double()
    penalty = RIDGE * x[:, :-2].square().mean(0).sum() / (x.shape[1] - 2) * len(x)
    ridge = torch.full((x.shape[1],), float(penalty), dtype=x.dtype, device=x.device)
    ridge[-2:] = 1e-6 * len(x)
    found = torch.linalg.solve(x.T @ x + ridge.diag(), x.T @ target.T.double()).T.float()
    return {"weight": found[:, :-2].contiguous(), "slope": found[:, -2], "offset": found[:, -1]}


def _told(seen: Observed, values: Mapping[str, Tensor], rows: Rows) -> Tensor:
    """Returns t of some tokens, (heads, rows)."""
    level = gates(seen.hidden[rows][None], values)["level"][0]
    numbers = {name: values[name][:, None] for name in ("offset", "slope")}
    return _joined({"level": level} | numbers, seen.n[rows])


def _network_start(hidden: Tensor, size: float, heads: int, units: int) -> dict[str, Tensor]:
    """Returns a network that adds nothing yet."""
    device, width = hidden.device, hidden.shape[1]
    noise = torch.randn(units, width, generator=torch.Generator(device).manual_seed(0), device=device)
    return {
        "inner": noise / (size * width**0.5),
        "inner_bias": torch.zeros(units, device=device),
        "outer": torch.zeros(heads, units, device=device),
    }


@torch.enable_grad()
def _descend(
    seen: Observed, size: float, fixed: dict[str, Tensor], values: dict[str, Tensor], missed: Missed
) -> dict[str, Tensor]:
    """Returns fixed tensors and others after some steps of Adam towards missing nothing."""
    hidden = seen.hidden
    generator = torch.Generator(hidden.device).manual_seed(0)
    values = {name: value.clone().requires_grad_() for name, value in values.items()}
    # What reads the hidden state moves by the size of its entries, in the map by those of all at once.
    slower = {"weight": size * hidden.shape[1] ** 0.5, "inner": size}
    rates = [RATE / slower.get(name, 1.0) for name in values]
    groups = [{"params": [value], "lr": rate} for value, rate in zip(values.values(), rates, strict=True)]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(hidden), (BATCH,), generator=generator, device=hidden.device)
        optimizer.zero_grad()
        missed(_told(seen, fixed | values, rows), rows).square().mean().backward()
        optimizer.step()
        schedule.step()
    return fixed | {name: value.detach() for name, value in values.items()}
