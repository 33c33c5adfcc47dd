"""Several processes that work together, as ``accelerate launch`` starts them."""

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from attnswap.errors import NumericsError

T = TypeVar("T")


def together() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized()


def wait() -> None:
    """Waits until all processes are here."""
    if together():
        dist.barrier()


def largest(value: int, device: torch.device) -> int:
    """Returns the largest value of all processes."""
    if not together():
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def spread(tensor: Tensor, device: torch.device) -> None:
    """Gives a tensor the values that it has in the first process, in all of them.

    Args:
        tensor: Of the same shape everywhere; where it holds no values it gets none.
        device: Where processes talk.
    """
    if together():
        shared = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
        dist.broadcast(shared, 0)
        if not tensor.is_meta:
            tensor.copy_(shared)


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor that may be sharded over processes as one, gathered by all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(tensor: Tensor) -> Tensor:
    """Returns what this process holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def default_device() -> str:
    """Returns the type of this machine's accelerator, or "cpu"."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"


def multiplies_bf16(device: str | torch.device) -> bool:
    """Whether a device has instructions for bf16; a processor without takes many times as long in it as in fp32."""
    if torch.device(device).type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def warn_of_bf16(device: str | torch.device, way_out: str) -> None:
    """Warns of computing in bf16 where that takes forever, and says what to do instead."""
    if not multiplies_bf16(device):
        warnings.warn(
            "this processor has no instructions for bf16 (AMX, AVX512) and takes many times as long in it as in fp32: "
            + way_out,
            stacklevel=3,
        )


def join(device: str | None) -> str | None:
    """Joins the other processes of an ``accelerate launch``, if there are any.

    Args:
        device: "cpu" to keep off accelerators.

    Returns:
        The device of this process; None in a run of one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate.state import PartialState

    return str(PartialState(cpu=device == "cpu" or not torch.accelerator.is_available()).device)


def leave() -> None:
    """Leaves the other processes: one that ends while threads of its own still talk to them may abort."""
    if together():
        gc.collect()  # a sharded model and its trainer hold on to the group, in cycles
        dist.destroy_process_group()


def place(model: torch.nn.Module | None = None) -> tuple[int, int]:
    """Returns the index of this process and how many share the work.

    Args:
        model: One that is itself split over processes has to see the same windows in all of them: they share nothing.
    """
    if model is not None and any(isinstance(p, DTensor) for p in model.parameters()):
        return 0, 1
    if together():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def one_fate() -> Iterator[None]:
    """Raises a NumericsError of one process in all of them, so that none waits for another that has given up."""
    error: NumericsError | None = None
    try:
        yield
    except NumericsError as found:
        error = found
    rank, count = place()
    errors = gather({} if error is None else {rank: str(error)}, count)
    if errors:
        raise NumericsError(next(iter(errors.values()))) from error


def gather(mine: dict[Any, T], count: int) -> dict[Any, T]:
    """Returns the entries of ``count`` processes, to each of them."""
    if count == 1:
        return mine
    parts: list[dict[Any, T]] = [{}] * count
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}
