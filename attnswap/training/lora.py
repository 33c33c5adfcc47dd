"""Low-rank adapters that leave an ordinary checkpoint behind.

The adapters sit inside the model only while it trains; the swap's parameters stay trainable beside them. At the end
they are merged into the weights, so what is saved loads like any patched model, without peft.
"""

import re

from peft import LoraConfig, LoraModel
from transformers import PreTrainedModel

import attnswap
from attnswap.errors import ConfigError, first_line
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
    except (ValueError, re.error) as error:
        raise ConfigError(f"lora.target_modules: {first_line(error)}") from None
    names = [section.target_modules] if isinstance(section.target_modules, str) else section.target_modules
    adapted = [f".{name}" for name in tuner.targeted_module_names]
    unused = [name for name in names if len(names) > 1 and not any(one.endswith(f".{name}") for one in adapted)]
    if unused:
        raise ConfigError(f"lora.target_modules: no module is called {', '.join(unused)}")
    # peft notes on the model that it carries adapters, which would have to be saved as such; ours are merged instead.
    model.__dict__.pop("peft_config", None)
    for parameter in attnswap.swap_parameters(model).values():
        parameter.requires_grad_(True)
    return tuner
