"""Helpers for ``torch.distributed``, as ``accelerate launch`` sets it up. In a single process they do nothing."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from attnswap.errors import NumericsError

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def init_process_group(device: str | None) -> str | None:
    """Joins the process group of an ``accelerate launch``, if this process was started by one.

    Args:
        device: "cpu" to stay on the CPU although there is an accelerator.

    Returns:
        The device of this process; None for a run of one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate.state import PartialState

    return str(PartialState(cpu=device == "cpu" or not torch.accelerator.is_available()).device)


def destroy_process_group() -> None:
    """Leaves the process group. A process that exits while its communication threads still run may abort."""
    if is_distributed():
        gc.collect()  # a sharded model and its trainer refer to each other and keep the group alive
        dist.destroy_process_group()


def rank_and_world_size(model: torch.nn.Module | None = None) -> tuple[int, int]:
    """Returns the rank of this process and the number of processes that divide the data among them.

    Args:
        model: A model whose weights are sharded needs every process for every window, so that the data is not divided:
            the answer is then (0, 1).
    """
    if model is not None and any(isinstance(p, DTensor) for p in model.parameters()):
        return 0, 1
    if is_distributed():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier() -> None:
    """Waits until all processes have called this function."""
    if is_distributed():
        dist.barrier()


def all_reduce_max(value: int, device: torch.device) -> int:
    """Returns the largest of the values that the processes pass."""
    if not is_distributed():
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def broadcast(tensor: Tensor, device: torch.device) -> None:
    """Overwrites a tensor, in place, with the values that it has in the process of rank 0.

    Args:
        tensor: A tensor of the same shape in all processes. A meta tensor takes part and stays without values.
        device: The device on which the processes communicate.
    """
    if is_distributed():
        shared = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
        dist.broadcast(shared, 0)
        if not tensor.is_meta:
            tensor.copy_(shared)


def all_gather_dicts(mine: dict[Any, T], world_size: int) -> dict[Any, T]:
    """Returns the entries of the dicts of all processes, merged, to each of the processes."""
    if world_size == 1:
        return mine
    parts: list[dict[Any, T]] = [{}] * world_size
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the full tensor of a DTensor, gathered from all processes; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_local(tensor: Tensor) -> Tensor:
    """Returns the shard of a DTensor that this process holds; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raises a NumericsError of one process in all processes.

    Without it the other processes would wait forever, in their next collective call, for the one that has failed.
    """
    error: NumericsError | None = None
    try:
        yield
    except NumericsError as found:
        error = found
    rank, world_size = rank_and_world_size()
    messages = all_gather_dicts({} if error is None else {rank: str(error)}, world_size)
    if messages:
        raise NumericsError(next(iter(messages.values()))) from error
