"""Fingerprints of base models, so that an adapter is not loaded onto the wrong one unnoticed."""

from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel

from attnswap.errors import CheckpointError, ConfigError
from attnswap.surgery.spec import KEY

MATRICES, SAMPLES = 6, 8
TOLERANCE = 0.004
"""Relative to a matrix's largest sample: rounding to 16 bits moves a weight by less."""


def fingerprint(model: PreTrainedModel, carried: Collection[str] = ()) -> dict[str, Any]:
    """Returns a model's type, its sizes, and samples of a few weights (none where they cannot be read).

    Args:
        model: The base.
        carried: Names of modules that are saved with the adapter, whose weights in the base do not matter.
    """
    weights = _comparable(model, carried)
    names = sorted(name for name, weight in weights.items() if weight.ndim == 2)
    if len(names) < MATRICES:  # quantized: embeddings and norms are left
        names += sorted(name for name, weight in weights.items() if weight.ndim == 1)
    chosen = {names[i * (len(names) - 1) // (MATRICES - 1)] for i in range(MATRICES)} if names else set()
    return {**_sizes(model), "weights": {name: _numbers(weights[name]) for name in sorted(chosen)}}


def check(saved: dict[str, Any] | None, model: PreTrainedModel, carried: Collection[str] = ()) -> None:
    """Compares the base that an adapter was trained on with the one it is loaded onto.

    Args:
        saved: The fingerprint in the adapter's config; None: nothing is checked.
        model: The base that it is loaded onto.
        carried: Names of modules that are saved with the adapter.

    Raises:
        ConfigError: They are different models.
        CheckpointError: The fingerprint is damaged.
    """
    if saved is None:
        return
    if not _is_whole(saved):
        raise CheckpointError("the fingerprint in the adapter's config is damaged: was adapter_config.json edited?")
    way = (
        "Load the base that it was trained on. If you know that the two fit, load the adapter with a config whose "
        "fingerprint is None"
    )
    sizes = _sizes(model)
    for name, value in saved.items():
        if name != "weights" and value != sizes.get(name):
            raise ConfigError(
                f"this adapter belongs to a base whose {name} is {value}; that of this base is {sizes.get(name)}. {way}"
            )
    weights = _comparable(model, carried)
    for name, ours in saved.get("weights", {}).items():
        if name not in weights:
            continue
        theirs = _numbers(weights[name])
        scale = max(abs(value) for value in ours)
        apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        if not apart <= TOLERANCE * scale:
            raise ConfigError(
                f"this adapter belongs to other weights: samples of {name} differ by {apart:.3g} (the largest is "
                f"{scale:.3g}). {way}"
            )


def _is_whole(saved: Any) -> bool:
    """Whether a fingerprint that was read from a file can be compared."""
    samples = saved.get("weights", {}) if isinstance(saved, dict) else None
    return isinstance(samples, dict) and all(
        isinstance(numbers, list) and len(numbers) == SAMPLES and all(isinstance(x, int | float) for x in numbers)
        for numbers in samples.values()
    )


def _sizes(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.get_text_config()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    return {"model_type": model.config.model_type, **{name: getattr(config, name, None) for name in names}}


def _comparable(model: PreTrainedModel, carried: Collection[str]) -> dict[str, torch.Tensor]:
    """Returns the weights that are equal whenever the base is loaded, by their names in the base without adapters."""
    weights = {}
    for name, weight in model.named_parameters():
        words = name.replace(".base_layer.", ".").replace(".original_module.", ".").split(".")
        if not {KEY, "modules_to_save"} & set(words) and not any(word.startswith("lora_") for word in words):
            weights[".".join(words)] = weight
    if any(_was_read(weight) for weight in weights.values()):  # else the model was made in memory, or is a copy
        weights = {name: weight for name, weight in weights.items() if _was_read(weight)}
    brought = tuple(f".{module}." for module in carried)
    return {n: w for n, w in weights.items() if _exact(w) and not any(module in f".{n}" for module in brought)}


def _was_read(weight: torch.Tensor) -> bool:
    """Whether transformers read a weight from a checkpoint; a new head, which it initializes at random, is not."""
    return bool(getattr(weight, "_is_hf_initialized", False))


def _exact(weight: torch.Tensor) -> bool:
    """Whether a weight can be read here and is not quantized, which rounds it by more than the tolerance."""
    # Quantizers keep whole numbers, or tensors of a class of their own that stand for what they round.
    plain = type(weight.data) is torch.Tensor and weight.is_floating_point() and weight.element_size() > 1
    return plain and not weight.is_meta and weight.numel() > 0


def _numbers(weight: torch.Tensor) -> list[float]:
    matrix = weight.detach() if weight.ndim == 2 else weight.detach().view(1, -1)
    # Early rows: they survive a vocabulary that is resized.
    last = min(len(matrix), 256) - 1
    rows = torch.linspace(min(1, last), last, SAMPLES).long()
    columns = torch.linspace(0, matrix.shape[1] - 1, SAMPLES).long()
    picked = matrix[rows.to(weight.device), columns.to(weight.device)]
    return [float(f"{value:.5g}") for value in picked.float().tolist()]
