"""Context and sequence parallelism, under which a patched layer would attend within its own part of a sequence."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attnswap.attention.lazy import constant
from attnswap.distributed import rank_and_world_size
from attnswap.errors import UnsupportedModelError

WAY_OUT = (
    "A swap needs all keys of a sequence in one process: leave context and sequence parallelism off (cp_size=1, "
    "sp_size=1), and shard the weights (FSDP) or checkpoint activations instead"
)


def refuse_split(module: nn.Module, before: str, *tensors: Tensor) -> None:
    """Refuses a forward in which each process holds a part of every sequence.

    Args:
        module: The attention module, for the message.
        before: The attention implementation the model had.
        *tensors: Query, key and value, shape (batch, heads, tokens, width), where they are known.

    Raises:
        UnsupportedModelError: torch's context parallelism is on, the tensors are sharded along their tokens, or a
            library has replaced the attention functions of transformers in a run of several processes.
    """
    reason = _ring() or _replaced(before)
    for tensor in tensors:
        if isinstance(tensor, DTensor) and any(placement.is_shard(2) for placement in tensor.placements):
            reason = "its tensors are sharded along the tokens"
    if reason:
        raise UnsupportedModelError(
            f"{type(module).__name__} would attend within the part of the sequence that this process holds: {reason}. "
            f"{WAY_OUT}"
        )


@constant
def _ring() -> str | None:
    """Says whether torch's ``context_parallel`` is on, which replaces torch's attention function meanwhile."""
    home = getattr(torch.nn.functional.scaled_dot_product_attention, "__module__", None) or ""
    return "context parallelism is on" if home.startswith("torch.distributed.") else None


@constant
def _replaced(before: str) -> str | None:
    """Says who replaced a function of transformers, as DeepSpeed's Ulysses and ring attention libraries do."""
    if before not in ("sdpa", "flex_attention") and not before.startswith("flash_attention_"):
        return None
    home = getattr(ALL_ATTENTION_FUNCTIONS.get(before), "__module__", None) or ""
    if home.startswith("transformers.") or rank_and_world_size()[1] == 1:
        return None
    return f'"{home}" has replaced the attention function "{before}"'
