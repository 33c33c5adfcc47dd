"""What tells a base model from others of its kind, so that an adapter does not go onto the wrong one unnoticed."""

from typing import Any

import torch
from transformers import PreTrainedModel

from attnswap.errors import ConfigError

SAMPLES = 16
TOLERANCE = 0.02
"""Relative to the largest sample: weights read in 16 bits differ by less, those of another checkpoint by more."""


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Returns a model's kind, sizes, and a few of its input embeddings (None where they cannot be read)."""
    config = model.config.get_text_config()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(config, name, None) for name in names}
    return {"model_type": model.config.model_type, **sizes, "embeddings": _samples(model)}


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
        if name != "embeddings" and value != found.get(name):
            raise ConfigError(
                f"this adapter belongs to a base whose {name} is {value}, and here it is {found.get(name)}. {way}"
            )
    ours, theirs = (saved or {}).get("embeddings"), found["embeddings"]
    if ours and theirs:
        scale = max(abs(value) for value in ours)
        apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        if apart > TOLERANCE * scale:
            raise ConfigError(
                f"this adapter belongs to other weights: samples of the input embeddings differ by {apart:.3g} (the "
                f"largest is {scale:.3g}). {way}"
            )


def _samples(model: PreTrainedModel) -> list[float] | None:
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        return None
    weight = getattr(getattr(embeddings, "original_module", embeddings), "weight", None)
    if weight is None or weight.is_meta or weight.ndim != 2 or not weight.is_floating_point():
        return None
    # Small token ids and early columns: both survive a vocabulary that is resized.
    rows = torch.linspace(1, min(len(weight), 256) - 1, SAMPLES).long()
    columns = torch.linspace(0, weight.shape[1] - 1, SAMPLES).long()
    picked = weight.detach()[rows.to(weight.device), columns.to(weight.device)]
    return [float(f"{value:.5g}") for value in picked.float().tolist()]
