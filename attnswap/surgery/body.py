"""The parts of a model: the model inside a peft wrapper, and the base that a language model's head stands on."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from attnswap.errors import UnsupportedModelError


def base_of(model: nn.Module) -> Any:
    """Returns the model inside a peft model, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def body_name(model: nn.Module) -> str:
    """Returns the name of the child that a language model's head stands on.

    Raises:
        UnsupportedModelError: The model is no base with a head on it.
    """
    # Llama 4's text model has, as its base's name, the one it bears itself inside the larger model.
    for name in (getattr(model, "base_model_prefix", ""), "model"):
        if isinstance(model, PreTrainedModel) and name in model._modules:
            return name
    raise UnsupportedModelError(
        f"{type(model).__name__} is not a transformers model with a language model head: "
        "load it with AutoModelForCausalLM"
    )


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the child that a language model's head stands on."""
    return getattr(model, body_name(model))
