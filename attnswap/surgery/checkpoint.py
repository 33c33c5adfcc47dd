"""Reload what was saved: the swaps are rebuilt from ``config.json`` while transformers constructs the model."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init

from attnswap.errors import CheckpointError
from attnswap.loading import refuse_orphans
from attnswap.surgery.attach import attach_from_config, spec_of
from attnswap.surgery.module import SwapModule
from attnswap.surgery.probe import verify
from attnswap.surgery.seam import Enter, check_ramps
from attnswap.surgery.select import attention_modules, owning_config
from attnswap.surgery.spec import KEY


def from_pretrained(path: str | Path, *, auto_class: Any = AutoModelForCausalLM, **kwargs: Any) -> PreTrainedModel:
    """Loads a patched checkpoint and proves that its swaps are in use.

    ``AutoModelForCausalLM.from_pretrained`` loads the same model once attnswap is imported; this function checks more.

    Args:
        path: A directory written by ``save_pretrained`` of a patched model, or a hub name.
        auto_class: The ``transformers`` class to load with.
        **kwargs: Passed on to its ``from_pretrained``.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: The checkpoint has no swap, is incomplete or unreadable, or is of a newer format.
        UnsupportedModelError: Its attention cannot be served exactly.
    """
    _require_spec(path, kwargs)
    try:
        model, loaded = auto_class.from_pretrained(path, output_loading_info=True, **kwargs)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f'the checkpoint "{path}" cannot be read: {error}. Is it complete?') from error
    missing = [k for k in loaded["missing_keys"] if f".{KEY}." in k]
    if missing:
        raise CheckpointError(f'the checkpoint "{path}" lacks {len(missing)} swap parameters, such as {missing[0]}')
    refuse_orphans(loaded["unexpected_keys"], path)
    spec = spec_of(model)
    modules = attention_modules(model)
    for _, module in modules.values():
        if KEY in module._modules:
            check_ramps(module._modules[KEY])  # type: ignore[arg-type]
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, Enter):
                hook.unchecked = False
    if spec is not None and not any(p.is_meta for p in model.parameters()):
        verify(model, owning_config(model, modules), modules, spec.before)
    return model


def _require_spec(path: str | Path, kwargs: dict[str, Any]) -> None:
    hub = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if k in kwargs}
    try:
        config = AutoConfig.from_pretrained(path, **hub)
    except (OSError, ValueError) as error:
        raise CheckpointError(f'no readable config in "{path}": {error}') from error
    owner = config if hasattr(config, KEY) else config.get_text_config()
    if not isinstance(getattr(owner, KEY, None), dict):
        raise CheckpointError(
            f'"{path}" is not a patched checkpoint; load it with transformers and call attnswap.patch'
        )


def rebuild(model: PreTrainedModel) -> None:
    """Attaches the swaps a model's config names; called for every model under construction."""
    if not attach_from_config(model):
        return
    kept = getattr(model, "_keep_in_fp32_modules_strict", None)
    model._keep_in_fp32_modules_strict = {*(kept or ()), KEY}
    # An instance attribute: transformers calls it for each module whose weights were not in the checkpoint.
    model._init_weights = _InitWeights(model, model._init_weights)  # type: ignore[method-assign]


class _InitWeights:
    """Gives swap modules their start, and leaves every other module to the model."""

    def __init__(self, model: PreTrainedModel, original: Callable[[nn.Module], None]) -> None:
        self.model, self.original = model, original

    def __call__(self, module: nn.Module) -> None:
        if not isinstance(module, SwapModule):
            self.original(module)
            return
        others = (p for n, p in self.model.named_parameters() if f".{KEY}." not in n)
        unset = [n for n, p in module.state_dict(keep_vars=True).items() if not getattr(p, "_is_hf_initialized", False)]
        if unset and any(getattr(p, "_is_hf_initialized", False) for p in others):
            raise CheckpointError(
                f'the checkpoint names the swap "{module.swap.name}" in its config but lacks its parameters '
                f"({', '.join(unset)}): it is incomplete. To start a swap afresh, load the original model and call "
                "attnswap.patch"
            )
        if unset:
            module.set_start(_start)


def _start(parameter: torch.Tensor, mean: float, std: float) -> None:
    if std:
        init.normal_(parameter, mean, std)
    else:
        init.constant_(parameter, mean)


def install() -> None:
    """Wraps ``PreTrainedModel.post_init``, once, so that configs with a spec rebuild their swaps.

    It does nothing for every other config.
    """
    original = PreTrainedModel.post_init
    if getattr(original, "_attnswap", False):
        return

    @functools.wraps(original)
    def post_init(self: PreTrainedModel) -> None:
        rebuild(self)
        original(self)

    post_init._attnswap = True  # type: ignore[attr-defined]
    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
