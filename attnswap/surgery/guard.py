"""The checks that a patched model makes of itself: before its state is written, and after each forward."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from attnswap.errors import CheckpointError, UnsupportedModelError
from attnswap.surgery.entry import carrier_of
from attnswap.surgery.hooks import remove_hooks
from attnswap.surgery.module import child_of
from attnswap.surgery.patched import patched_stacks, written_stacks
from attnswap.surgery.seam import gate_hook_of
from attnswap.surgery.spec import KEY, PatchSpec

WRAPPING = ("_checkpoint_wrapped_module", "_orig_mod")
"""Where FSDP's activation checkpointing and torch.compile keep the module that they take the place of."""


class ConfigCheck:
    """The hook before a patched model's state is written: what would reload as softmax is not written.

    Args:
        loaded: The specs of the checkpoint that the model came from, which is the base that its adapters name; None:
            the model was patched in memory.
    """

    def __init__(self, loaded: Sequence[PatchSpec] | None) -> None:
        self.loaded = loaded

    def __call__(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Raises CheckpointError if the model's config no longer names its swaps."""
        config: Any = model.config
        if carrier_of(config) is None:
            raise CheckpointError(
                f"the config of {type(model).__name__} has lost its attnswap entry (was it edited or replaced?), so "
                "what is saved would reload as softmax. Put the model's own config back, or call attnswap.unpatch"
            )
        adapters = getattr(model, "peft_config", {})
        if not adapters or any(config.peft_type == "ATTNSWAP" for config in adapters.values()):
            return
        if self.loaded is None:
            warnings.warn(
                "this model was patched in memory, which an adapter of plain peft does not say: on its stock base it "
                "would load as softmax. Save the patched model as the adapter's base, or use attnswap.AttnSwapConfig",
                stacklevel=2,
            )
        elif any(child_of(m) is m._modules[KEY] for m in model.modules() if KEY in m._modules) and self._moved(model):
            warnings.warn(
                "lambda of this model's swaps differs from lambda in its checkpoint, which an adapter of plain peft "
                "does not say. Save the model as the adapter's base, or use attnswap.AttnSwapConfig",
                stacklevel=2,
            )

    def _moved(self, model: Any) -> bool:
        now = [spec.layers for _, spec in patched_stacks(model)]
        return bool(now) and now != [spec.layers for spec in self.loaded or ()]


class ModulesIntact:
    """The hook after a patched model's forward: the modules that were patched are still its modules.

    Some models replace their attention modules while they run, and users may.

    Args:
        names: The names of the patched modules.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Raises UnsupportedModelError if a patched module is gone."""
        if torch.compiler.is_compiling():
            return
        for name in self.names:
            module: nn.Module | None = model
            for word in name.split("."):
                if word not in WRAPPING:  # which may be put around a layer, and taken off, at any time
                    module = None if module is None else _part(module, word)
            if module is None and _all_connected(model):
                continue  # a layer was taken out or wrapped: there is no attention without our hooks
            if module is None or KEY not in _inside(module)._modules:
                raise UnsupportedModelError(
                    f"{type(model).__name__}.{name} is no longer the attention module that was patched: it was "
                    "replaced, and its swap with it. Unpatch, make the change first, and patch again"
                )


def _all_connected(model: nn.Module) -> bool:
    """Whether every attention module of the patched stacks has our hooks."""
    stacks = [stack for stack, _ in written_stacks(model)]  # type: ignore[arg-type]
    return bool(stacks) and all(gate_hook_of(m) is not None for stack in stacks for _, m in stack.modules.values())


def _inside(module: nn.Module) -> nn.Module:
    inner = next((module._modules[name] for name in WRAPPING if name in module._modules), None)
    return module if inner is None else _inside(inner)


def _part(module: nn.Module, word: str) -> nn.Module | None:
    return _inside(module)._modules.get(word)


def guard(model: PreTrainedModel, loaded: Sequence[PatchSpec] | None = None) -> None:
    """Makes a patched model check itself when its state is asked for and after its forward; parts leave that to it.

    Args:
        model: The model.
        loaded: The specs of the checkpoint that it comes from, if it does.
    """
    unguard(model)
    model.register_state_dict_pre_hook(ConfigCheck(loaded))
    model.register_forward_hook(
        ModulesIntact([name for name, module in model.named_modules() if KEY in module._modules])
    )


def unguard(model: PreTrainedModel) -> None:
    """Undoes :func:`guard` for a model and its parts."""
    modules = list(model.modules())
    remove_hooks(modules, "_state_dict_pre_hooks", ConfigCheck)
    remove_hooks(modules, "_forward_hooks", ModulesIntact)
