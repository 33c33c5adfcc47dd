"""Registration of the adapter type with peft: entries in three tables."""

from attnswap.adapters.kind import installed, peft_type


def register() -> None:
    """Enters :class:`AttnSwapConfig` and :class:`AttnSwapModel` into peft's tables, if peft is recent enough.

    Not by ``register_peft_method``, which needs a prefix of tensor names that no other method has: the low-rank weights
    of these adapters are LoRA's and have LoRA's names.
    """
    if not installed():
        return
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )

    from attnswap.adapters.config import AttnSwapConfig
    from attnswap.adapters.model import AttnSwapModel

    kind = peft_type()
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = AttnSwapConfig
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = AttnSwapModel
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = AttnSwapModel.prefix
