"""Low-rank adapters that leave an ordinary checkpoint behind.

The adapters sit inside the model only while it trains; the swap's parameters stay trainable beside them. At the end
they are merged into the weights, so what is saved loads like any patched model, without peft.
"""

from peft import LoraConfig, LoraModel
from transformers import PreTrainedModel

import attnswap
from attnswap.errors import ConfigError
from attnswap.training.config import LoraSection


def add_lora(model: PreTrainedModel, section: LoraSection) -> LoraModel:
    """Puts adapters into ``model`` in place and freezes all else but the swap's parameters.

    Args:
        model: The model, already patched.
        section: The recipe's section.

    Returns:
        The handle whose ``merge_and_unload()`` merges the adapters into ``model``, in place.

    Raises:
        ConfigError: No module has such a name, or one of that name cannot be adapted.
    """
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        tuner = LoraModel(model, config, "default")
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {error}") from None
    for parameter in attnswap.swap_parameters(model).values():
        parameter.requires_grad_(True)
    return tuner
