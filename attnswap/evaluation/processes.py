"""The windows of one evaluation over several processes, as ``accelerate launch`` starts them."""

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


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
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """Returns the index of this process and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(mine: dict[Any, T]) -> dict[Any, T]:
    """Returns the entries of all processes, to each of them."""
    _, count = place()
    if count == 1:
        return mine
    parts: list[dict[Any, T]] = [{}] * count
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}
