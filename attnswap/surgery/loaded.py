"""Loading: no weight of a patched checkpoint is missing, and no tensor of a swap is left over."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from attnswap.loading import refuse_incomplete, refuse_orphans
from attnswap.surgery.entry import carrier_of
from attnswap.surgery.patched import written_stacks
from attnswap.surgery.rebuild import Unresolved
from attnswap.surgery.seam import check_loaded, gate_hook_of
from attnswap.surgery.spec import KEY

HUB = ("revision", "code_revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
"""Arguments of ``from_pretrained`` that say where a config is and how it may be read."""


def check_whole(model: PreTrainedModel, found: Mapping[str, Any], path: Any, options: Mapping[str, Any]) -> None:
    """Checks what ``from_pretrained`` loaded; called for every model, patched or not.

    Args:
        model: The model.
        found: transformers' account of the tensors: ``missing_keys``, ``unexpected_keys``, ``mismatched_keys``.
        path: Where it was loaded from.
        options: The other arguments it was loaded with.

    Raises:
        CheckpointError: A tensor of a patched checkpoint is missing or left over, or lambda is not what config.json
            says.
    """
    unexpected = list(found.get("unexpected_keys", ()))
    unresolved = next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, Unresolved)), None)
    if unresolved is not None and any(KEY in name.split(".") for name in unexpected):
        unresolved(model)  # says more than that swaps are left over
    refuse_orphans(unexpected, path)
    if carrier_of(model.config) is None:
        return
    swaps = [entry for entry in found.get("mismatched_keys", ()) if KEY in entry[0].split(".")]
    refuse_incomplete(
        {"missing_keys": _lost(model, found.get("missing_keys", ()), path, options), "mismatched_keys": swaps}, path
    )
    modules = [module for stack, _ in written_stacks(model) for _, module in stack.modules.values()]
    for module in modules:
        if KEY in module._modules:
            check_loaded(module._modules[KEY])  # type: ignore[arg-type]
    for module in modules:
        if (hook := gate_hook_of(module)) is not None:
            hook.unchecked = False


def _lost(model: PreTrainedModel, missing: Iterable[str], path: Any, options: Mapping[str, Any]) -> list[str]:
    """Returns the missing tensors that the saved model had: what a head of another task needs starts anew."""
    names = sorted(missing)
    if not names:
        return names
    try:  # as it was saved: arguments and outer models change a config while they load
        config = AutoConfig.from_pretrained(path, **{name: x for name, x in options.items() if name in HUB})
    except Exception:  # a path of None with tensors given, say
        config = copy.deepcopy(model.config)
    saved = next(iter(config.architectures or ()), type(model).__name__)
    if saved == type(model).__name__:
        return names
    kind = getattr(transformers, saved, None)
    if kind is None:  # somebody's own class: its body at least must be whole
        body = f"{model.base_model_prefix}."
        return [name for name in names if name.startswith(body) or not hasattr(model, body[:-1])]
    with torch.device("meta"):
        had = {_bare(kind, name) for name in kind(config).state_dict()}
    return [name for name in names if _bare(type(model), name) in had]


def _bare(kind: type[PreTrainedModel], name: str) -> str:
    """Returns a tensor's name in the model without a head."""
    return name.removeprefix(f"{kind.base_model_prefix}.")
