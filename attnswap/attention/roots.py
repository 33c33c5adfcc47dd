"""Solve for the roots that row swaps name as statistics, in plain torch, and let gradients through."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop

from attnswap.attention.modes import plain, transformed
from attnswap.swaps.base import Numbers
from attnswap.swaps.statistics import Root

STEPS = 60
"""More than any row takes: safeguarded Newton steps, each of which at worst halves the bracket."""
ORDERS = 3
"""How many times in a row a root can be differentiated."""


def with_sinks(s: Tensor, visible: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Adds the null keys, if there are any, to the keys.

    Args:
        s: Scores, shape (batch, heads, rows, keys).
        visible: Which keys count, broadcastable to the scores.
        sinks: Scores of the null keys, (heads, 1, 1) or (batch, heads, rows, 1), or None.

    Returns:
        Scores, and which count, of one shape.
    """
    if sinks is not None:
        s = torch.cat([s, sinks.expand(*s.shape[:-1], 1)], -1)
        visible = torch.cat(
            [visible.expand(*visible.shape[:-1], s.shape[-1] - 1), torch.ones_like(visible[..., :1])], -1
        )
    return s, visible.expand(s.shape)


Found = tuple[Tensor, Tensor]
"""The root of each row, and the derivative of the sum there over its target, as constants."""


@torch.no_grad()
def find_root(root: Root, s: Tensor, visible: Tensor, p: Numbers) -> Found:
    """Solves for roots; the arguments are those of :func:`roots`."""
    s, p = s.detach(), Numbers(**{k: v.detach() if isinstance(v, Tensor) else v for k, v in vars(p).items()})
    found = torch.where(visible.any(-1, keepdim=True), _solve(root, s, visible, p), 0.0)
    return found, _mass(root, s, visible, found, p)[1]


def roots(root: Root, s: Tensor, visible: Tensor, p: Numbers, known: Found | None = None) -> Tensor:
    """Returns the number of each row at which a sum over its keys is the root's target.

    Differentiable by the scores, sinks and parameters, :data:`ORDERS` times: at the root one more Newton step is the
    identity, and its derivative is that of the implicit function; each further step makes the next derivative right.

    Args:
        root: The statistic.
        s: Scores, shape (batch, heads, rows, keys), sinks among them.
        visible: Which keys count, of the same shape.
        p: The numbers that its functions read.
        known: What :func:`find_root` found, if it was asked before.

    Returns:
        Shape (batch, heads, rows, 1); 0 for rows without a key or sink.
    """
    found, slope = find_root(root, s, visible, p) if known is None else known
    slope = torch.where(slope < 0, slope, -1.0)
    for _ in range(ORDERS):
        found = found - (_sum(root, s, visible, found, p) - 1) / slope
    return torch.where(visible.any(-1, keepdim=True), found, 0.0)


def _solve(root: Root, s: Tensor, visible: Tensor, p: Numbers) -> Tensor:
    top = s.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    top = torch.where(top > -torch.inf, top, 0.0)
    low, high = root.bracket(top, visible.sum(-1, keepdim=True).clamp(min=1).to(s.dtype), p)
    low, high = torch.broadcast_tensors(low, high)
    power = torch.as_tensor(root.power(p), dtype=s.dtype, device=s.device)

    def advance(t: Tensor, low: Tensor, high: Tensor, settled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mass, slope = _mass(root, s, visible, t, p)
        low, high = torch.where(mass >= 1, t, low), torch.where(mass > 1, high, t)
        # Newton on (mass^power - 1) / power, whose limit for a power of 0 is the logarithm.
        bent = torch.where(power < 1e-2, mass.log() * mass, (mass**power - 1) / power * mass ** (1 - power))
        step = t - bent / slope
        inside = (step >= low) & (step <= high)
        new = torch.where(mass == 1, t, torch.where(inside, step, (low + high) / 2))
        near = (new - t).abs() <= 2 * torch.finfo(s.dtype).eps * t.abs().clamp(min=1)
        # A row takes no step more because of others.
        return torch.where(settled, t, new), low, high, settled | near

    state = (low, low, high, torch.zeros_like(low, dtype=torch.bool))
    compiling = torch.compiler.is_compiling()
    if compiling and not transformed():  # which a loop of a graph is not
        return _loop_in_graph(advance, state)
    for _ in range(STEPS):
        state = advance(*state)
        if not compiling and bool(plain(state[-1]).all()):
            break
    return state[0]


def _loop_in_graph(advance: Callable[..., tuple[Tensor, ...]], state: tuple[Tensor, ...]) -> Tensor:
    """The loop of :func:`_solve` as one operation of a compiled graph, with the same steps."""

    def unsettled(count: Tensor, *state: Tensor) -> Tensor:
        return (count < STEPS) & ~state[-1].all()

    def one_more(count: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        return count + 1, *advance(*state)

    count = torch.zeros((), dtype=torch.int64, device=state[0].device)
    return while_loop(unsettled, one_more, (count, *(x.clone() for x in state)))[1]


def _mass(root: Root, s: Tensor, visible: Tensor, t: Tensor, p: Numbers) -> tuple[Tensor, Tensor]:
    """Returns the sum at a number over its target, and its derivative."""

    def mass_at(at: Any) -> tuple[Tensor, Tensor]:
        mass = _sum(root, s, visible, at, p)
        return mass.sum(), mass

    slope, mass = torch.func.grad(mass_at, has_aux=True)(t)  # which also works under torch.inference_mode
    return mass, slope


def _sum(root: Root, s: Tensor, visible: Tensor, t: Tensor, p: Numbers) -> Tensor:
    total = torch.where(visible, root.of(torch.where(visible, s, t), t, p), 0.0).sum(-1, keepdim=True)
    return total if root.target == 1 else total / root.target
