"""A number for each query and head, told from its token: what a swap cannot know of a row before it sees the keys.

    t_i = w . x_i + u . gelu(V x_i + c) + offset + slope ln n_i

x_i is what enters the attention module. The linear part knows of keys that are always there, such as the first; what
the spread of all the others adds is closer to a square of the query, hence the network, which the heads of a layer
share. Until they are fitted (``attnswap.training.fit``) or learned, both parts add nothing.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from attnswap.swaps.base import Call, Feature, Observed, Parameter

RIDGE = 1e-3
"""Penalty of the linear regression, over the mean square of what it reads."""
STEPS, BATCH, RATE = 600, 4096, 3e-3
"""Of the fit of the network to what the linear regression leaves."""


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
        level = level + _network(hidden, parameters)
    return {"level": level.transpose(1, 2)}


def _network(hidden: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    inner = gelu(linear(hidden, parameters["inner"], parameters["inner_bias"]))
    return linear(inner, parameters["outer"])


def predicted(call: Call) -> Tensor:
    """Returns t, (batch, heads, queries)."""
    told = call.features
    return told["level"] + told["offset"] + told["slope"] * call.n.clamp(min=1).log()


def fit(seen: Observed, target: Tensor, units: int) -> tuple[dict[str, Tensor], float]:
    """Fits t to some text.

    Args:
        seen: Text through one layer.
        target: What t should be, shape (heads, tokens).
        units: Width of the network.

    Returns:
        The learned tensors by name, and the root mean square of what they miss.
    """
    ones = torch.ones_like(seen.n)[:, None]
    x = torch.cat([seen.hidden, seen.n.log()[:, None], ones], dim=1).double()
    penalty = RIDGE * x[:, :-2].square().mean(0).sum() / (x.shape[1] - 2) * len(x)
    ridge = torch.full((x.shape[1],), float(penalty), dtype=x.dtype, device=x.device)
    ridge[-2:] = 1e-6 * len(x)
    found = torch.linalg.solve(x.T @ x + ridge.diag(), x.T @ target.T.double())
    left = (target.T.double() - x @ found).float()
    found = found.T.float()
    values = {"weight": found[:, :-2].contiguous(), "slope": found[:, -2], "offset": found[:, -1]}
    if units:
        network = _fit_network(seen.hidden, left, units)
        values, left = values | network, left - _network(seen.hidden, network)
    return values, float(left.square().mean().sqrt())


@torch.enable_grad()
def _fit_network(hidden: Tensor, target: Tensor, units: int) -> dict[str, Tensor]:
    """Returns the network's tensors after some steps of Adam towards a target of shape (tokens, heads)."""
    generator = torch.Generator(hidden.device).manual_seed(0)
    size = float(hidden.square().mean().sqrt())
    noise = torch.randn(units, hidden.shape[1], generator=generator, device=hidden.device)
    inner = (noise / (size * hidden.shape[1] ** 0.5)).requires_grad_()
    inner_bias = torch.zeros(units, device=hidden.device, requires_grad=True)
    outer = torch.zeros(target.shape[1], units, device=hidden.device, requires_grad=True)
    network = {"inner": inner, "inner_bias": inner_bias, "outer": outer}
    groups: list[dict[str, Any]] = [{"params": [inner], "lr": RATE / size}, {"params": [inner_bias, outer]}]
    optimizer = torch.optim.Adam(groups, lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [RATE / size, RATE], total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(hidden), (BATCH,), generator=generator, device=hidden.device)
        optimizer.zero_grad()
        (_network(hidden[rows], network) - target[rows]).square().mean().backward()
        optimizer.step()
        schedule.step()
    return {name: x.detach() for name, x in network.items()}
