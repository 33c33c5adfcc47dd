"""What is loaded is whole: no weight of a patched checkpoint is missing, and no swap of it is left over."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from attnswap.loading import refuse_incomplete, refuse_orphans
from attnswap.surgery.attach import carrier_of, enters, patched_modules
from attnswap.surgery.seam import check_loaded
from attnswap.surgery.spec import KEY


def check_whole(model: PreTrainedModel, found: Mapping[str, Any], path: Any) -> None:
    """Checks what ``from_pretrained`` loaded; called for every model, patched or not.

    Args:
        model: The model.
        found: transformers' account of the tensors: ``missing_keys``, ``unexpected_keys``, ``mismatched_keys``.
        path: Where it was loaded from, for the message.

    Raises:
        CheckpointError: A tensor of a patched checkpoint is missing or left over, or lambda is not what config.json
            says.
    """
    refuse_orphans(found.get("unexpected_keys", ()), path)
    if carrier_of(model.config) is None:
        return
    swaps = [entry for entry in found.get("mismatched_keys", ()) if KEY in entry[0].split(".")]
    refuse_incomplete({"missing_keys": _lost(model, found.get("missing_keys", ())), "mismatched_keys": swaps}, path)
    for _, module in patched_modules(model).values():
        if KEY in module._modules:
            check_loaded(module._modules[KEY])  # type: ignore[arg-type]
    for enter in enters(model):
        enter.unchecked = False


def _lost(model: PreTrainedModel, missing: Iterable[str]) -> list[str]:
    """Returns the missing tensors that the saved model had: what a head of another task needs starts anew."""
    names = sorted(missing)
    saved = next(iter(model.config.architectures or ()), type(model).__name__)
    kind = getattr(transformers, saved, None)
    if not names or saved == type(model).__name__ or kind is None:
        return names
    with torch.device("meta"):
        had = {_bare(kind, name) for name in kind(copy.deepcopy(model.config)).state_dict()}
    return [name for name in names if _bare(type(model), name) in had]


def _bare(kind: type[PreTrainedModel], name: str) -> str:
    """Returns a tensor's name in the model without a head."""
    return name.removeprefix(f"{kind.base_model_prefix}.")
