"""What a forward stores for its backward."""

from collections.abc import Mapping
from typing import Any

import torch


def has_mean(call: Mapping[str, Any]) -> bool:
    """Whether the forward stores an fp32 tensor of the output's shape for the backward.

    Row swaps need the mean under the slopes there. Others need the output as it was before it was rounded to half
    precision: dO . O is the sum of many weights' shares, and the rounding of O would weigh on each of them. To keep O
    in fp32 while training costs four bytes a number; to sum O again from the weights would cost a pass over all keys.
    """
    return bool(call["training"] and (call["threshold"] or call["query"].dtype != torch.float32))
