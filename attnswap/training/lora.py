"""LoRA adapters for training, which are merged into the weights at the end.

The swap's parameters are trained beside them. The saved checkpoint is that of an ordinary patched model, and loads
without PEFT.
"""

import re

from peft import LoraConfig, LoraModel
from transformers import PreTrainedModel

import attnswap
from attnswap.errors import ConfigError, first_line
from attnswap.training.config import LoraSection


def add_lora(model: PreTrainedModel, section: LoraSection) -> LoraModel:
    """Adds adapters to a model, in place, and freezes all other parameters except the swap's.

    Args:
        model: The model, already patched.
        section: The ``lora`` section of the recipe.

    Returns:
        A PEFT tuner, whose ``merge_and_unload()`` merges the adapters into the model, in place.

    Raises:
        ConfigError: No module has one of the names, or a module of that name cannot have an adapter.
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
        raise ConfigError(f"lora.target_modules: the model has no module of the name {', '.join(unused)}")
    # PEFT marks the model as one with adapters, which save_pretrained would save as such. Ours will be merged.
    model.__dict__.pop("peft_config", None)
    for parameter in attnswap.swap_parameters(model).values():
        parameter.requires_grad_(True)
    return tuner
