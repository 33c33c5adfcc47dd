"""Choose how a call is computed, and blend it with what was there before."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnswap.attention import chunked, dense, folded, native, tiled, triton
from attnswap.attention.checks import ensure
from attnswap.attention.problem import Problem
from attnswap.attention.statistics import sinks_refused
from attnswap.errors import ConfigError, UnsupportedModelError, nearest

AROUND = frozenset({"window", "prepare", "finish"})
"""The stages around the scores, which are computed in one place for every backend: :meth:`Backend.attend`."""


@dataclass(frozen=True)
class Backend:
    """One way to compute a call.

    Attributes:
        kernel: Computes the output of shape (batch, heads, queries, value_dim) of a staged call.
        stages: The stages of a swap that it computes, those of :data:`AROUND` not counted.
        kernel_refusal: Says why the kernel cannot compute a staged call of these stages, or None where it can.
        fast: Whether a staged call that it does not refuse runs at full speed.
    """

    kernel: Callable[[Problem], Tensor]
    stages: frozenset[str]
    kernel_refusal: Callable[[Problem], str | None] = lambda problem: None
    fast: Callable[[Problem], bool] = lambda problem: False

    def attend(self, problem: Problem) -> Tensor:
        """Computes a call that it does not refuse, with the stages around the scores.

        Raises:
            ConfigError: The swap has a stage that the kernel does not know.
        """
        if self.unknown(problem):
            raise ConfigError(f"this backend cannot compute the call: {self.unknown(problem)}")
        staged = problem.staged
        return staged.finished(self.kernel(staged))

    def refusal(self, problem: Problem) -> str | None:
        """Says why this backend cannot compute a call, or None where it can."""
        return self.unknown(problem) or self.kernel_refusal(problem.staged)

    def unknown(self, problem: Problem) -> str | None:
        """Names a stage of the swap that the kernel does not know, if there is one."""
        stages = sorted(problem.swap.stages - self.stages - AROUND)
        return f'it does not compute the stage "{stages[0]}" of "{problem.swap.name}"' if stages else None


SCORES = frozenset({"terms", "weights", "statistics"})
BACKENDS: dict[str, Backend] = {
    "folded": Backend(folded.attend, frozenset({"terms"}), folded.refusal, folded.is_stock),
    "native": Backend(native.attend, SCORES, native.refusal, lambda problem: True),
    "triton": Backend(triton.attend, SCORES, triton.refusal, triton.is_fast),
    "tiled": Backend(tiled.attend, frozenset({"terms", "weights"}), tiled.refusal, lambda problem: True),
    "chunked": Backend(chunked.attend, SCORES | {"pair"}),
    "dense": Backend(lambda problem: dense.attend(problem)[0], SCORES | {"pair"}),
}
"""In order of preference: ``backend="auto"`` takes the first that is fast for a call, else the first that serves."""


def _left_out() -> set[str]:
    """Returns what cannot be exported: ONNX has no form for kernels of our own."""
    exporting = torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    return {"native", "triton", "tiled"} if exporting else set()


def choose(problem: Problem, backend: str = "auto") -> Backend:
    """Returns the backend for a call.

    Raises:
        ConfigError: The backend is unknown, or was asked for by name and cannot compute the call (the reason is given).
    """
    if backend == "auto":
        left_out = _left_out()
        backends = [backend for name, backend in BACKENDS.items() if name not in left_out]
        fast = (b for b in backends if b.fast(problem.staged) and b.refusal(problem) is None)
        return next(fast, None) or next(b for b in backends if b.refusal(problem) is None)
    if backend not in BACKENDS:
        raise ConfigError(
            f'unknown backend "{backend}".{nearest(backend, list(BACKENDS))} Backends: auto, {", ".join(BACKENDS)}'
        )
    reason = BACKENDS[backend].refusal(problem)
    if reason:
        raise ConfigError(f'backend "{backend}" cannot compute this call: {reason}; use backend="auto"')
    return BACKENDS[backend]


def refuse_misfit(problem: Problem) -> None:
    """Refuses calls in which a swap has no meaning, whatever computes it.

    Raises:
        UnsupportedModelError: The swap works over time and a query sees later keys, or one of its statistics has no
            place for the model's sinks.
    """
    if problem.sinks is not None and sinks_refused(problem.swap):
        raise UnsupportedModelError(
            f'"{problem.swap.name}" cannot be computed in a model with sinks: its statistic '
            f'"{sinks_refused(problem.swap)}" is one of keys alone; take another swap'
        )
    if problem.swap.causal_only:
        future = problem.visibility.sees_future
        ensure(
            ~future if isinstance(future, Tensor) else not future,
            f'"{problem.swap.name}" works over time, but here queries see later keys; use it in causal attention only',
            error=UnsupportedModelError,
        )


def compute(problem: Problem, before: Callable[[], Tensor], backend: str = "auto") -> Tensor:
    """Computes a call at its point of the ramp.

    Args:
        problem: The call. A ramp of 0.0 or 1.0 given as a number is a phase: the other branch is not evaluated.
        before: Computes what the model did before, shape (batch, heads, queries, value_dim).
        backend: ``"auto"`` or a name of :data:`BACKENDS`.

    Returns:
        Output (batch, heads, queries, value_dim) in the dtype of the values.

    Raises:
        UnsupportedModelError: The swap has no meaning in this call (:func:`refuse_misfit`).
    """
    refuse_misfit(problem)
    ramp = problem.ramp
    if isinstance(ramp, float) and ramp == 0.0:
        return before()
    if problem.swap.native_ramp or problem.whole:
        return choose(problem, backend).attend(problem)
    full = replace(problem, ramp=1.0)
    swapped, was = choose(full, backend).attend(full), before()
    share = problem.per_head(ramp, 2)
    return ((1 - share) * was.to(problem.dtype) + share * swapped.to(problem.dtype)).to(swapped.dtype)


def with_weights(problem: Problem) -> tuple[Tensor, Tensor]:
    """Computes a call by the dense reference.

    Returns:
        Output (batch, heads, queries, value_dim) in the dtype of the values, and the weights that the values got,
        (batch, heads, queries, keys).
    """
    staged = problem.staged
    out, weights = dense.attend(staged, need_weights=True)
    assert weights is not None
    return staged.finished(out), weights
