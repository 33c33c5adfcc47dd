"""Which keyword arguments reach attention functions, and what each means there.

transformers passes a forward's extra arguments down to its attention functions. Arguments that cannot change attention
are ignored, those that can are honoured, and every other name is refused, even if transformers documents it.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils.generic import TransformersKwargs

from attnswap.errors import UnsupportedModelError

HONOURED = {
    "is_causal",
    "softcap",
    "s_aux",
    "sinks",
    "position_bias",
    "output_attentions",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",  # follows from cu_seq_lens_q
    "max_length_k",
}
"""Arguments that change attention, and that attnswap honours."""

IN_THE_MASK = {"position_ids", "sliding_window"}
"""Arguments that change attention only through the mask, which already accounts for them."""

HARMLESS = {
    "cache_position",
    "deterministic",  # of the flash function's backward pass
    "encoder_hidden_states",
    "key_value_states",
    "logits_to_keep",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "return_dict",
    "seq_idx",  # of layers that are no attention: documents reach attention by position_ids or cu_seq_lens_q
    "use_cache",
}
"""Arguments that stock attention functions receive and do not read."""

OF_THE_LOSS = {"ignore_index", "labels", "num_items_in_batch", "shift_labels"}
"""Arguments of a model's loss."""

KNOWN = HONOURED | IN_THE_MASK | HARMLESS | OF_THE_LOSS


def documented() -> set[str]:
    """Returns the names that the installed transformers documents for every model's forward."""
    return {*TransformersKwargs.__annotations__, *FlashAttentionKwargs.__annotations__}


def refuse_unknown(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Refuses an argument of an attention function that might change what it computes.

    Args:
        module: The attention module, for the message.
        kwargs: The arguments beside query, key, value, mask, scaling and dropout.

    Raises:
        UnsupportedModelError: An argument with an unknown name is not None.
    """
    for name, value in kwargs.items():
        if value is not None and name not in KNOWN:
            newer = " (transformers documents it: a newer attnswap may know it)" if name in documented() else ""
            raise UnsupportedModelError(
                f'{type(module).__name__} passes "{name}" to its attention function{newer}; attnswap does not know '
                "what it changes and will not guess. Leave the argument out, unpatch the layer, or report the "
                "architecture"
            )
