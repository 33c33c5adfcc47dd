"""The tuner: LoRA's tuner, which also adds swaps before low-rank weights and removes them after."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from peft import LoraModel, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from attnswap.adapters.config import AttnSwapConfig
from attnswap.adapters.fingerprint import check, fingerprint
from attnswap.adapters.reading import (
    PREFIX,
    PendingAdapter,
    check_names,
    check_ramps,
    check_shapes,
    low_rank,
    ramps_of,
    swap_names,
)
from attnswap.adapters.wrapper import AdapterSet, SwapAdapters
from attnswap.errors import CheckpointError, ConfigError, UnsupportedModelError
from attnswap.surgery.attach import own_config
from attnswap.surgery.entry import is_patched, write_spec
from attnswap.surgery.guard import guard
from attnswap.surgery.hooks import remove_hooks
from attnswap.surgery.module import LayerSwap, SwapModule, child_of
from attnswap.surgery.owners import outermost
from attnswap.surgery.parameters import swap_parameters
from attnswap.surgery.patch import patch, unpatch
from attnswap.surgery.patched import patched_stacks, spec_of, stacks_of
from attnswap.surgery.probe import verify
from attnswap.surgery.rebuild import Unresolved, rebuild
from attnswap.surgery.spec import KEY, PatchSpec
from attnswap.surgery.stacks import find_stack


class AttnSwapModel(LoraModel):
    """A model with swap adapters; made by ``get_peft_model`` and ``PeftModel.from_pretrained``.

    ``merge_and_unload()`` merges the low-rank weights and leaves a patched model, which saves and reloads as such;
    ``unload()`` gives the base back; ``disable_adapter()`` computes what the base computed; ``set_adapter`` switches
    the swap with the weights.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter: its swaps, then its low-rank weights.

        Raises:
            ConfigError: The base is patched already, or is not the base of the saved adapter.
            UnsupportedModelError: The base cannot have the swap. In both cases it stays as it was.
        """
        given = cast(AttnSwapConfig, self.peft_config[adapter_name])
        others = {name: config for name, config in self.peft_config.items() if name != adapter_name}
        source = next((name for name, config in others.items() if given.is_copy_of(config)), None)
        config = self.peft_config[adapter_name] = given.for_adapter()
        try:
            if not isinstance(model, PreTrainedModel):
                raise UnsupportedModelError(f"{type(model).__name__} is no transformers model")
            added = add_swaps(model, adapter_name, config, source)
        except BaseException:
            self._forget(adapter_name)
            raise
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            added.undo()
            self._take_out(adapter_name)
            self._forget(adapter_name)
            raise
        if config.spec is not None:  # until they are read: transformers only prints which tensors are missing
            for parameter in low_rank(model, adapter_name).values():
                parameter.data.fill_(torch.nan)
        saved = config.spec is not None
        PendingAdapter(added.adapters, adapter_name, saved, partial(self._withdraw, added)).begin()

    def _withdraw(self, added: "Added") -> None:
        """Removes an adapter that could not be read: the model is as before."""
        if len(self.peft_config) > 1:
            self.delete_adapter(added.name)
            self.set_adapter(added.active)
        else:
            self.unload()
        added.restore()

    def _take_out(self, adapter_name: str) -> None:
        """Removes the low-rank weights of an adapter of which only some could be placed."""
        for key, module in list(self.model.named_modules()):
            if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
                module.delete_adapter(adapter_name)
                if not module.lora_A:
                    parent = self.model.get_submodule(key.rpartition(".")[0])
                    setattr(parent, key.rpartition(".")[2], module.get_base_layer())

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter; if it was the active one, the first of the others takes its place."""
        was_active = adapter_name in self.active_adapters
        kept = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        if was_active and not kept and self.peft_config:
            kept = [next(iter(self.peft_config))]
        if kept:
            self.set_adapter(kept)
        self.active_adapter = kept

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        swaps = swap_names(model, adapter_name)
        swaps |= {PREFIX + name: place for name, place in swaps.items()}  # as in the file, whatever the model is in
        renamed = {swaps.get(name, name): tensor for name, tensor in state_dict.items()}
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)
        wanted = {*swaps.values(), *low_rank(model, adapter_name)}
        places = {name: place for table in (model.named_parameters(), model.named_buffers()) for name, place in table}
        reading = PendingAdapter.of(model, adapter_name)
        try:
            check_names(wanted - found.keys(), found.keys() - places.keys())
            check_shapes(places, found, wanted)
            if reading is not None and reading.saved:
                check_ramps(ramps_of(model, adapter_name), found)
        except CheckpointError:
            # A PeftModel is loading an adapter it has just added; a model alone was given one before.
            if reading is not None and reading.saved and isinstance(model, PeftModel):
                reading.take_out()
            raise
        if reading is not None:
            reading.end()
        return found

    def _forget(self, adapter_name: str) -> None:
        if len(self.peft_config) > 1:
            del self.peft_config[adapter_name]

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # Called whenever an adapter is saved, which is when its config needs the present lambda.
        wrapper = next((m for m in model.modules() if isinstance(m, SwapAdapters)), None)
        if wrapper is not None and isinstance(config, AttnSwapConfig):
            config.spec = wrapper.adapters.spec(adapter_name).to_dict()
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge and adapter_names is not None:
            self.set_adapter(adapter_names)
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        model: PreTrainedModel = self.model
        for _, module in stacks_of(model)[0].modules.values():
            swaps = child_of(module)
            if swaps is not None and not swaps.slots:
                del module._modules[KEY]
        spec = spec_of(model)
        if not merge or spec is None or not spec.layers:
            unpatch(model)
        else:
            guard(outermost(model))
        return model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, SwapAdapters):  # no weight to hand on
            parent.add_module(child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raises an error: two normalizers have no mean.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError("adapters with swaps cannot be averaged into a new one")


@dataclass
class Added:
    """The swaps of an adapter that was added to a model, and the state to restore if it is removed again.

    Attributes:
        adapters: The adapters of the model.
        name: The adapter's name.
        first: The model had no other.
        active: The adapters that were active.
        trained: Which parameters were trainable.
    """

    adapters: AdapterSet
    name: str
    first: bool
    active: list[str]
    trained: dict[nn.Parameter, bool]

    def undo(self) -> None:
        """Removes the swaps."""
        for wrapper in self.adapters.wrappers.values():
            wrapper.delete_adapter(self.name)
        if self.first:
            self.adapters.detach()
        self.restore()

    def restore(self) -> None:
        """Makes the parameters trainable again that were trainable before."""
        for parameter, was in self.trained.items():
            parameter.requires_grad_(was)


def add_swaps(model: PreTrainedModel, name: str, config: AttnSwapConfig, source: str | None) -> Added:
    """Adds an adapter's swaps to a model, beside those of other adapters.

    Args:
        model: The base.
        name: The adapter's name.
        config: Its config, which learns what its base is.
        source: Another adapter of the model with the same config, whose present lambda is the initial one; or None.

    Returns:
        What was added.

    Raises:
        ConfigError: The base is patched already, or is not the base of the saved adapter.
        UnsupportedModelError: The base cannot have the swap.
    """
    others = next((m.adapters for m in model.modules() if isinstance(m, SwapAdapters)), None)
    if others is None and is_patched(model):
        raise ConfigError(
            "the base is patched already, by attnswap.patch or when it was loaded: call attnswap.unpatch first, or "
            'train its swap with LoraConfig(modules_to_save=["attnswap"])'
        )
    _check_name(name, config, others)
    carried = config.modules_to_save or ()
    check(config.fingerprint, model, carried)
    found = fingerprint(model, carried)
    adapters = others or AdapterSet([model], PatchSpec(""))
    added = Added(adapters, name, others is None, _active(model), {p: p.requires_grad for p in model.parameters()})
    if not any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        model.requires_grad_(False)  # peft will take our wrappers for an earlier adapter, and freeze nothing
    if others is not None:
        others.detach()
    try:
        spec = _patch(model, config, None if source is None else adapters.spec(source))
        if others is not None and (spec.part, spec.seam) != (others.empty.part, others.empty.seam):
            unpatch(model)
            raise ConfigError(f"part={spec.part!r}: all adapters of a model swap one part, here {others.empty.part!r}")
    except BaseException:
        if others is not None:
            others.attach()
        added.restore()
        raise
    if others is None:
        adapters.empty = replace(spec, layers={})
    stack = stacks_of(model)[0]
    for layer, (_, module) in stack.modules.items():
        info = stack.info(layer)
        swaps = module._modules.pop(KEY, None)
        wrapper = adapters.wrappers.get(layer) or SwapAdapters(adapters, layer, LayerSwap(info))
        wrapper.put(name, swaps if isinstance(swaps, LayerSwap) else LayerSwap(info))
        wrapper.train(module.training)
    adapters.attach()
    config.fingerprint = found
    return added


def _active(model: nn.Module) -> list[str]:
    """Returns the active adapters of a model; wrappers of swaps do not know those without a swap."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    layers.sort(key=lambda layer: isinstance(layer, SwapAdapters))
    return list(layers[0].active_adapters) if layers else []


def _check_name(name: str, config: AttnSwapConfig, others: AdapterSet | None) -> None:
    """Refuses an adapter name that is also the name of a tensor: peft could not distinguish them in a file.

    Raises:
        ConfigError: It is.
    """
    wanted = config.swaps()
    swaps = list(wanted) if isinstance(wanted, dict) else [wanted]
    names = {name, *(others.names() if others is not None else ())}
    swaps += [slot.swap for slot in others.slots()] if others is not None else []
    words = {"ramp", "original_module", "modules_to_save"}
    words |= {
        word for swap in swaps for word in (swap.name.replace("-", "_"), *swap.features(), *swap.gate_parameters())
    }
    taken = sorted(names & words)
    if taken:
        raise ConfigError(
            f'an adapter cannot be called "{taken[0]}", which is the name of something in a swap: choose another'
        )


def _patch(model: PreTrainedModel, config: AttnSwapConfig, source: PatchSpec | None) -> PatchSpec:
    """Patches a model: as a config asks, like another adapter of the model, or exactly like a saved adapter."""
    if source is not None:
        _patch_again(model, source)
    elif config.spec is None:
        if _registers_on_meta():
            raise ConfigError("low_cpu_mem_usage=True is for adapters that are loaded: add a new one without it")
        patch(model, config.swaps(), part=config.part, layers=config.layers, heads=config.heads, ramp=config.ramp)
    elif isinstance(config.spec, dict):
        _patch_as_saved(model, config, PatchSpec.from_dict(config.spec))
    else:
        raise CheckpointError("the spec in the adapter's config is damaged: was adapter_config.json edited?")
    spec = spec_of(model)
    assert spec is not None
    return spec


def _patch_as_saved(model: PreTrainedModel, config: AttnSwapConfig, spec: PatchSpec) -> None:
    wanted = config.swaps()
    names = {swap.name for swap in (wanted if isinstance(wanted, dict) else (wanted,))}
    saved = {slot.swap.name for slots in spec.layers.values() for slot in slots.values()}
    if names != saved:
        raise ConfigError(f"the adapter's config asks for {sorted(names)}, but what was saved swapped {sorted(saved)}")
    _patch_again(model, spec)
    for parameter in swap_parameters(model).values():
        parameter.data.fill_(torch.nan)  # until it is read: transformers only prints which tensors are missing


def _patch_again(model: PreTrainedModel, spec: PatchSpec) -> None:
    give_back = own_config(model)
    try:
        write_spec(find_stack(model, spec.part), spec)
        rebuild(model)
        _off_meta(model)
        for stack, attached in patched_stacks(model):
            verify(stack, attached.before)
    except BaseException:
        remove_hooks(model.modules(), "_forward_pre_hooks", Unresolved)
        if is_patched(model):
            unpatch(model)
        give_back()
        raise


def _registers_on_meta() -> bool:
    """Whether accelerate's context is active under which every new parameter has no storage."""
    probe = nn.Module()
    probe.register_parameter("probe", nn.Parameter(torch.empty(0)))
    return next(probe.parameters()).is_meta


def _off_meta(model: PreTrainedModel) -> None:
    """Gives storage to swaps that were added under such a context: they are small, and the probe runs them."""
    for _, module in stacks_of(model)[0].modules.values():
        device = next((p.device for p in module.parameters() if not p.is_meta), None)
        for swap in module.modules():
            if isinstance(swap, SwapModule) and device is not None and any(p.is_meta for p in swap.parameters()):
                for name, parameter in swap.named_parameters():
                    swap._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=device))
                swap.set_start()
