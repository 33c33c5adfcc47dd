"""Reading lambda from the buffer of a swap, the one place where it is kept.

Averaged models, checkpoints that are read in place, merged weights and copies of adapters all write buffers directly.
So no number on the host is trusted: the phase of a slot follows from its buffer at each forward.
"""

import functools
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from attnswap.attention.checks import ensure, ensure_later
from attnswap.attention.modes import plain
from attnswap.errors import ConfigError, NumericsError
from attnswap.surgery.spec import Slot
from attnswap.swaps.base import ModelInfo

WAY_OUT = "Move lambda with attnswap.set_ramp(model, value)"


def slot_at(slot: Slot, ramp: Tensor, known: bool = False) -> Slot:
    """Returns a slot at the lambda that its buffer holds.

    Args:
        slot: The slot, at the lambda that was read last.
        ramp: The buffer, shape () or (heads,).
        known: The buffer is on an accelerator and seems not to have been written since. Then it is checked there,
            without waiting for it.

    Returns:
        The slot itself, or a copy with another lambda.

    Raises:
        NumericsError: The buffer holds a number outside [0, 1].
        RuntimeError: Under ``torch.compile`` or on an accelerator, the buffer holds a lambda of another phase.
    """
    if torch.compiler.is_compiling() or known:
        _check_phase(slot, ramp)
        return slot
    values = numbers(ramp)
    if values is None or values == _held(slot.ramp):
        return slot
    if not all(0 <= value <= 1 for value in values):
        raise NumericsError(
            f'the buffer of lambda of the swap "{_name(slot)}" holds {values if len(values) > 1 else values[0]}, '
            f"which is not in [0, 1]. {WAY_OUT}"
        )
    return replace(slot, ramp=values[0] if ramp.ndim == 0 and len(values) == 1 else tuple(values))


def check_form(slot: Slot, ramp: Tensor, info: ModelInfo) -> None:
    """Refuses a buffer that was replaced by one that no checkpoint could hold.

    Args:
        slot: The slot, at the lambda that the buffer holds.
        ramp: The buffer.
        info: The layer's sizes.

    Raises:
        NumericsError: It has another shape than () and (heads,), is not of floating point, or heads that share a
            key/value head have lambdas of their own where the swap cannot have that.
    """
    heads = slot.count(info.heads)
    if plain(ramp) is ramp and (ramp.shape not in ((), (heads,)) or not ramp.is_floating_point()):
        raise NumericsError(
            f'the buffer of lambda of the swap "{_name(slot)}" has shape {tuple(ramp.shape)} and dtype '
            f"{ramp.dtype}; it must be one number, or one for each of {heads} heads. {WAY_OUT}"
        )
    if isinstance(slot.ramp, tuple) and len(slot.ramp) == heads:
        try:
            slot.swap.check_shared(slot.ramp, info.heads // info.kv_heads)
        except ConfigError as error:
            raise NumericsError(f"a buffer of lambda was written without attnswap.set_ramp: {error}") from error


def mark(ramp: Tensor) -> tuple[int, int] | None:
    """Returns what changes when a buffer on an accelerator is written or replaced; None: always read the buffer."""
    if type(ramp) is not Tensor or plain(ramp) is not ramp or ramp.device.type in ("cpu", "meta"):
        return None
    return ramp.data_ptr(), 0 if ramp.is_inference() else ramp._version


def numbers(ramp: Tensor) -> list[float] | None:
    """Returns the numbers that a buffer holds; None where there are none (meta and fake tensors)."""
    ramp = plain(ramp)  # under vmap every model of a batch counts
    if isinstance(ramp, DTensor):
        ramp = ramp.full_tensor()
    if ramp.is_meta or isinstance(ramp, FakeTensor):
        return None
    return ramp.detach().flatten().tolist()


def _name(slot: Slot) -> str:
    return getattr(slot.swap, "name", type(slot.swap).__name__)


@functools.lru_cache(maxsize=4096)
def _held(ramp: float | tuple[float, ...]) -> list[float]:
    """Returns a lambda as a buffer of fp32 holds it."""
    return torch.tensor(ramp, dtype=torch.float32).flatten().tolist()


def _check_phase(slot: Slot, ramp: Tensor) -> None:
    """Checks on the device, or in the graph, that a buffer is of the phase this forward computes."""
    if slot.phase == "ramp":  # the blend is computed from the buffer
        holds = ((ramp >= 0) & (ramp <= 1)).all()
    else:
        holds = (ramp == (1.0 if slot.phase == "swap" else 0.0)).all()
    message = (
        f'the buffer of lambda of the swap "{_name(slot)}" was written without attnswap.set_ramp, and holds another '
        f"value than this forward was made for. {WAY_OUT}, or run a forward without torch.compile first"
    )
    if torch.compiler.is_compiling():
        ensure(holds, message, error=NumericsError)
    else:
        ensure_later(holds, message)
