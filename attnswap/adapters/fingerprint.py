"""What tells a base model from others of its kind, so that an adapter does not go onto the wrong one unnoticed."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from attnswap.errors import ConfigError
from attnswap.surgery.spec import KEY

MATRICES, SAMPLES = 6, 8
TOLERANCE = 0.004
"""Relative to a matrix's largest sample: rounding to 16 bits moves a weight by less."""


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Returns a model's kind, sizes, and a few weights from all over it (none where they cannot be read)."""
    config = model.config.get_text_config()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(config, name, None) for name in names}
    return {"model_type": model.config.model_type, **sizes, "weights": _samples(model)}


def check(saved: dict[str, Any] | None, found: dict[str, Any]) -> None:
    """Compares the base an adapter was trained on with the one it is put on.

    Args:
        saved: The fingerprint in the adapter's config; None: nothing is checked.
        found: That of the model at hand.

    Raises:
        ConfigError: They are different models.
    """
    way = (
        "Give the base it was trained on; if you know that the two go together, load the adapter with a config whose "
        "fingerprint is None"
    )
    for name, value in (saved or {}).items():
        if name != "weights" and value != found.get(name):
            raise ConfigError(
                f"this adapter belongs to a base whose {name} is {value}, and here it is {found.get(name)}. {way}"
            )
    theirs = found["weights"]
    for name, ours in (saved or {}).get("weights", {}).items():
        if name not in theirs:
            continue  # quantized, for example
        scale = max(abs(value) for value in ours)
        apart = max(abs(a - b) for a, b in zip(ours, theirs[name], strict=True))
        if apart > TOLERANCE * scale:
            raise ConfigError(
                f"this adapter belongs to other weights: samples of {name} differ by {apart:.3g} (the largest is "
                f"{scale:.3g}). {way}"
            )


def _samples(model: PreTrainedModel) -> dict[str, list[float]]:
    """Returns some numbers of some matrices, by the names these have in the bare model."""
    matrices = {}
    for name, weight in model.named_parameters():
        words = name.replace(".base_layer.", ".").replace(".original_module.", ".").split(".")
        if not {KEY, "modules_to_save"} & set(words) and not any(word.startswith("lora_") for word in words):
            matrices[".".join(words)] = weight
    names = sorted(name for name, weight in matrices.items() if weight.ndim == 2)
    chosen = {names[i * (len(names) - 1) // (MATRICES - 1)] for i in range(MATRICES)} if names else set()
    return {name: _numbers(matrices[name]) for name in sorted(chosen) if _readable(matrices[name])}


def _readable(weight: torch.Tensor) -> bool:
    return not weight.is_meta and weight.is_floating_point() and not isinstance(weight, DTensor)


def _numbers(weight: torch.Tensor) -> list[float]:
    # Early rows: they survive a vocabulary that is resized.
    rows = torch.linspace(1, min(len(weight), 256) - 1, SAMPLES).long()
    columns = torch.linspace(0, weight.shape[1] - 1, SAMPLES).long()
    picked = weight.detach()[rows.to(weight.device), columns.to(weight.device)]
    return [float(f"{value:.5g}") for value in picked.float().tolist()]
