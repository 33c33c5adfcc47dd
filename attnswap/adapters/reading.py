"""Reading an adapter's tensors: exactly those that its config names."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightRenaming

from attnswap.adapters.wrapper import AdapterSet, SwapAdapters
from attnswap.attention.checks import ensure
from attnswap.errors import CheckpointError
from attnswap.surgery.hooks import remove_hooks
from attnswap.surgery.spec import KEY

LOW_RANK = "lora_"
PREFIX = "base_model.model."
"""Before the names of an adapter's tensors in its file, and in a ``PeftModel``; not in the model alone."""


def low_rank(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Returns an adapter's low-rank weights by their names in the model."""
    found = model.named_parameters()
    return {name: p for name, p in found if LOW_RANK in name and adapter in name.split(".")}


def swap_names(model: nn.Module, adapter: str) -> dict[str, str]:
    """Returns the names in the model of the tensors of an adapter's swaps, by those without the adapter's name."""
    names: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, SwapAdapters) and adapter in module.modules_to_save:
            swaps = module.modules_to_save[adapter]
            tensors = [name for table in (swaps.named_parameters(), swaps.named_buffers()) for name, _ in table]
            names |= {f"{path}.{name}": f"{path}.modules_to_save.{adapter}.{name}" for name in tensors}
    return names


def check_names(missing: Iterable[str], unknown: Iterable[str]) -> None:
    """Compares an adapter's file with its config.

    Args:
        missing: Tensors that the config asks for and the file lacks.
        unknown: Tensors of the file that the model has no place for.

    Raises:
        CheckpointError: A tensor is missing, or a swap's or a low-rank weight has no place.
    """
    missing = sorted(missing)
    unknown = sorted(name for name in unknown if is_ours(name))
    if missing:
        raise CheckpointError(f"the adapter is incomplete: it lacks {len(missing)} tensors, such as {missing[0]}")
    if unknown:
        raise CheckpointError(
            f"the adapter holds {len(unknown)} tensors that its config does not name, such as {unknown[0]}: was "
            "adapter_config.json edited?"
        )


def check_shapes(places: Mapping[str, Tensor], found: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Compares the shapes of an adapter's tensors with those of their places, which parallel libraries may hide.

    Raises:
        CheckpointError: One differs.
    """
    for name in names:
        place = places[name]
        if type(place.data) is Tensor and place.numel() and place.shape != found[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(found[name].shape)} in the adapter's file, but its config asks for "
                f"{tuple(place.shape)}: was adapter_config.json edited?"
            )


def check_ramps(places: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Compares lambda in the config of an adapter that is being added with lambda in its file.

    Args:
        places: The adapter's buffers of lambda by name, as its config made them.
        found: What was read.

    Raises:
        CheckpointError: They differ.
    """
    for name, place in places.items():
        if not place.is_meta and not torch.equal(place.cpu(), found[name].cpu().to(place.dtype)):
            raise CheckpointError(
                f"adapter_config.json says lambda {place.tolist()}, but {name} holds {found[name].tolist()}: one of "
                "them was edited. Move lambda with attnswap.set_ramp and save again"
            )


def ramps_of(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Returns copies of an adapter's buffers of lambda by their names in the model."""
    places = (place for place in swap_names(model, adapter).values() if place.endswith(".ramp"))
    return {place: model.get_buffer(place).clone() for place in places}


def is_ours(name: str) -> bool:
    """Whether a tensor of that name is a swap's or a low-rank weight."""
    return KEY in name.split(".") or LOW_RANK in name


class PendingAdapter:
    """A new adapter whose tensors are not read yet: a hook before the forward of its base.

    Args:
        adapters: The adapters of the base.
        adapter: The adapter's name.
        saved: Its config comes from a file: a forward without its tensors is refused.
        take_out: Removes it from the model again.
    """

    def __init__(self, adapters: AdapterSet, adapter: str, saved: bool, take_out: Callable[[], None]) -> None:
        self.adapters, self.adapter, self.saved, self.take_out = adapters, adapter, saved, take_out

    @staticmethod
    def of(model: nn.Module, adapter: str) -> "PendingAdapter | None":
        """Returns the hook of an adapter, or None if the adapter has been read or used."""
        hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
        return next((x for x in hooks if isinstance(x, PendingAdapter) and x.adapter == adapter), None)

    def begin(self) -> None:
        """Waits for the tensors to be read."""
        base: Any = self.adapters.base[0]
        base.register_forward_pre_hook(self)
        base._load_pretrained_model = self.load  # what transformers' own load_adapter calls

    def end(self) -> None:
        """Stops waiting."""
        base = self.adapters.base[0]
        hooks = base._forward_pre_hooks.values()
        waiting = [hook for hook in hooks if isinstance(hook, PendingAdapter) and hook is not self]
        remove_hooks([base], "_forward_pre_hooks", PendingAdapter)
        for other in waiting:
            base.register_forward_pre_hook(other)
        base.__dict__.pop("_load_pretrained_model", None)

    def __call__(self, base: nn.Module, args: tuple[Any, ...]) -> None:
        """Raises CheckpointError if the adapter is used before its tensors were read."""
        if self.saved:
            wrapper = next(iter(self.adapters.wrappers.values()))
            if wrapper.disable_adapters or self.adapter not in wrapper.active_adapters:
                return
            for name, parameter in low_rank(base, self.adapter).items():
                ensure(
                    parameter.is_meta or ~parameter.isnan().all(),
                    f"{name} of a saved adapter was not read: the adapter is incomplete. (To train its config afresh, "
                    "set its spec to None)",
                    error=CheckpointError,
                )
        if not torch.compiler.is_compiling():  # a graph checks whenever it runs
            self.end()

    def load(self, *, model: Any, load_config: Any, **kwargs: Any) -> Any:
        """Reads the tensors, in place of transformers' ``_load_pretrained_model``.

        Raises:
            CheckpointError: They are not the tensors that the config names. The adapter is removed again.
        """
        names = swap_names(model, self.adapter)
        ramps = ramps_of(model, self.adapter)
        renamings = [*(load_config.weight_mapping or []), *(WeightRenaming(*pair) for pair in names.items())]
        self.end()
        try:
            found, offloaded = model._load_pretrained_model(
                model=model, load_config=replace(load_config, weight_mapping=renamings), **kwargs
            )
            unread = {*found.missing_keys, *(name for name, *_ in found.mismatched_keys)}
            check_names(unread & {*names.values(), *low_rank(model, self.adapter)}, found.unexpected_keys)
            check_ramps(ramps, {name: model.get_buffer(name) for name in ramps})
        except BaseException:
            self.take_out()
            model._hf_peft_config_loaded = hasattr(model, "peft_config")
            raise
        return found, offloaded
