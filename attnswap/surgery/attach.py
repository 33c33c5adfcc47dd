"""Put the seam around a model's attention modules, and take it away again."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from attnswap.errors import CheckpointError, ConfigError, UnsupportedModelError
from attnswap.surgery.module import LayerSwap
from attnswap.surgery.owners import outermost
from attnswap.surgery.scores import intercept, release
from attnswap.surgery.seam import Enter, Leave, Route
from attnswap.surgery.select import layer_info, owning_config
from attnswap.surgery.spec import KEY, PatchSpec, Slot
from attnswap.surgery.stacks import Modules, attention_modules, is_cross, retie, seam_of, siblings, untie


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


def config_of(model: PreTrainedModel) -> PreTrainedConfig:
    """Returns the config that carries (or will carry) the model's spec."""
    return owning_config(model, patched_modules(model))


def patched_modules(model: PreTrainedModel) -> Modules:
    """Returns the attention modules that a patch of the model is about, or would be about by default."""
    entry = _entry(model)
    return attention_modules(model, None if entry is None else PatchSpec.from_dict(entry).part)


def enters(model: PreTrainedModel) -> list[Enter]:
    """Returns the pre-forward hooks of a patched model's attention modules; none if it is not patched."""
    if not is_patched(model):
        return []
    return [enter for _, module in patched_modules(model).values() if (enter := enter_of(module))]


def enter_of(module: nn.Module) -> Enter | None:
    """Returns the pre-forward hook of an attention module, if it has ours."""
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Enter)), None)


def spec_of(model: PreTrainedModel, read: bool = True) -> PatchSpec | None:
    """Returns what was done to a model, as its modules hold it now, or None if nothing was.

    Args:
        model: Any model.
        read: Whether to read lambda from its buffers; if not, it is as it was read last.

    Raises:
        NumericsError: A buffer holds no lambda.
    """
    entry = _entry(model)
    if entry is None:
        return None
    spec = PatchSpec.from_dict(entry)
    modules = attention_modules(model, spec.part)
    swaps = {layer: child_of(module) for layer, (_, module) in modules.items()}
    found = {i: child.present_slots() if read else child.slots for i, child in swaps.items() if child is not None}
    layers = {layer: slots for layer, slots in found.items() if slots}
    return replace(spec, before=before_of(modules, spec.before), layers=layers)


def before_of(modules: Modules, written: str) -> str:
    """Returns the attention implementation that layers without swaps run on.

    Args:
        modules: The attention modules of a model.
        written: The one it had when it was patched, for a model whose modules are not connected.
    """
    return next((enter.route.before for _, module in modules.values() if (enter := enter_of(module))), written)


def is_patched(model: nn.Module) -> bool:
    """Whether some config of a model's modules has an entry."""
    return _entry(model) is not None


def _entry(model: nn.Module) -> dict[str, Any] | None:
    """Returns the entry that was written when the model was patched, or None."""
    entries = (getattr(getattr(module, "config", None), KEY, None) for module in model.modules())
    return next((values for values in entries if isinstance(values, dict)), None)


def child_of(module: nn.Module) -> LayerSwap | None:
    """Returns the layer's swaps, through the wrapper of another library if there is one."""
    child = module._modules.get(KEY)
    serving = getattr(child, "serving", None)  # of the adapters on this layer
    if callable(serving):
        return serving()
    if hasattr(child, "modules_to_save"):  # of plain peft: a frozen original, and a copy for each adapter
        active: Any = child
        names = [name for name in active.active_adapters if name in active.modules_to_save]
        child = active.modules_to_save[names[0]] if names else active.original_module
    while child is not None and not isinstance(child, LayerSwap):
        child = next(iter(child.children()), None)
    return child


def children_of(module: nn.Module) -> list[LayerSwap]:
    """Returns every copy of a layer's swaps; wrappers of other libraries keep a frozen and a trained one."""
    child = module._modules.get(KEY)
    if hasattr(child, "serving"):
        return [one] if (one := child_of(module)) else []
    return [] if child is None else [c for c in child.modules() if isinstance(c, LayerSwap)]


def refuse_adapters(model: PreTrainedModel) -> None:
    """Refuses to change swaps that belong to adapters.

    Raises:
        ConfigError: The model's swaps do.
    """
    if any(hasattr(module._modules.get(KEY), "serving") for module in model.modules()):
        raise ConfigError(
            "this model's swaps belong to peft adapters: add, switch and remove them with peft (unload() gives the "
            "base model back)"
        )


def own_config(model: PreTrainedModel) -> Callable[[], None]:
    """Gives a model a config object of its own, since models built from one config share it.

    A model that is known to be inside another one gets it together with that one, which has to save the swaps too.

    Returns:
        A function that gives the model its old config object back.
    """
    model = outermost(model)
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    replaced = []
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig) and id(config) in copies:
            replaced.append((module, config))
            module.__dict__["config"] = copies[id(config)]

    def give_back() -> None:
        for module, config in replaced:
            module.__dict__["config"] = config

    return give_back


def parts_of(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Returns a model's config and those of its towers."""
    return [config, *(x for x in vars(config).values() if isinstance(x, PreTrainedConfig))]


def carrier_of(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """Returns the config that holds a spec: the model's own, or that of one of its towers."""
    return next((part for part in parts_of(config) if isinstance(getattr(part, KEY, None), dict)), None)


class Saved:
    """The hook before a patched model's state is written: what would reload as softmax is not written.

    Args:
        loaded: With what swaps the model came from a checkpoint, which is the base that its adapters name; None: it
            was patched in memory.
    """

    def __init__(self, loaded: PatchSpec | None) -> None:
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
                "lambda of this model's swaps is not where its checkpoint has it, which an adapter of plain peft does "
                "not say. Save the model as the adapter's base, or use attnswap.AttnSwapConfig",
                stacklevel=2,
            )

    def _moved(self, model: Any) -> bool:
        spec = spec_of(model)
        return spec is not None and self.loaded is not None and spec.layers != self.loaded.layers


class Present:
    """The hook after a patched model's forward: the modules that were patched are still its modules.

    Some models replace their attention modules while they run, and users may.
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
                continue  # a layer was taken out or wrapped: there is no attention without us
            if module is None or KEY not in _inside(module)._modules:
                raise UnsupportedModelError(
                    f"{type(model).__name__}.{name} is no longer the attention module that was patched: it was "
                    "replaced, and its swap with it. Unpatch, make the change first, and patch again"
                )


def _all_connected(model: nn.Module) -> bool:
    """Whether every attention module of the patched kind has our hooks."""
    if not is_patched(model):
        return False
    return all(enter_of(module) is not None for _, module in patched_modules(model).values())  # type: ignore[arg-type]


WRAPPING = ("_checkpoint_wrapped_module", "_orig_mod")
"""Where FSDP's activation checkpointing and torch.compile keep the module that they take the place of."""


def _inside(module: nn.Module) -> nn.Module:
    inner = next((module._modules[name] for name in WRAPPING if name in module._modules), None)
    return module if inner is None else _inside(inner)


def _part(module: nn.Module, word: str) -> nn.Module | None:
    return _inside(module)._modules.get(word)


def guard(model: PreTrainedModel, loaded: PatchSpec | None = None) -> None:
    """Makes a patched model check itself when its state is asked for and after its forward; parts leave that to it.

    Args:
        model: The model.
        loaded: What a checkpoint says of its swaps, if it comes from one.
    """
    unguard(model, around=False)
    model.register_state_dict_pre_hook(Saved(loaded))
    model.register_forward_hook(Present([name for name, module in model.named_modules() if KEY in module._modules]))


def unguard(model: PreTrainedModel, around: bool = True) -> None:
    """Undoes :func:`guard` for a model and its parts, and for the model around it."""
    modules = list((outermost(model) if around else model).modules())
    remove_hooks(modules, "_state_dict_pre_hooks", Saved)
    remove_hooks(modules, "_forward_hooks", Present)


def connect(
    model: PreTrainedModel, config: PreTrainedConfig, modules: Modules, before: str, loading: bool = False
) -> None:
    """Routes every attention module through attnswap; modules without slots go on as before.

    Args:
        model: The model.
        config: The config the modules share.
        modules: The attention modules.
        before: The previous attention implementation.
        loading: The swaps' tensors are yet to be read; the first forward then checks them.
    """
    through_interface, cross = dispatches_all(modules), is_cross(model, modules)
    untie(model, modules)
    if through_interface:
        config._attn_implementation_internal = KEY
    elif config._attn_implementation == KEY:
        config._attn_implementation_internal = before
    layers = {id(module): layer for layer, (_, module) in modules.items()}
    every = siblings(model, modules)
    route = next((enter.route for module in every if (enter := enter_of(module))), Route(before, through_interface))
    for module in every:
        enter = enter_of(module)
        if enter is None:
            enter = Enter(route, loading)
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(Leave(enter), with_kwargs=True)
            if not through_interface:
                intercept(module)
        if id(module) in layers:
            enter.layer, enter.cross = layers[id(module)], cross


def disconnect(model: PreTrainedModel, config: PreTrainedConfig, modules: Modules, before: str) -> None:
    """Undoes :func:`connect` and removes every slot."""
    unhook(siblings(model, modules))
    retie(model)
    config._attn_implementation_internal = before
    write_spec(model, config, None)


def write_spec(model: PreTrainedModel, config: PreTrainedConfig, spec: PatchSpec | None) -> None:
    """Enters a spec into the configs that carry it, or takes it out.

    Args:
        model: The model.
        config: The config of its attention modules.
        spec: The spec; None takes it out.
    """
    # Some encoder-decoders give each half a copy of the config, which is not what they save.
    for carrier in [config] if any(config is x for x in parts_of(model.config)) else [config, model.config]:
        if spec is None:
            forget(carrier)
        else:
            setattr(carrier, KEY, spec.to_dict())
            # Written to config.json, so that a process without attnswap refuses the checkpoint by name.
            carrier.attn_implementation = KEY


def forget(config: PreTrainedConfig) -> None:
    """Takes a spec, and the implementation that goes with it, out of a config."""
    for name in ("attn_implementation", KEY):
        config.__dict__.pop(name, None)


def unhook(modules: list[nn.Module]) -> None:
    """Takes hooks and swaps off attention modules."""
    for module in modules:
        module._modules.pop(KEY, None)
        release(module)
    remove_hooks(modules, "_forward_pre_hooks", Enter)
    remove_hooks(modules, "_forward_hooks", Leave)


def dispatches_all(modules: Modules) -> bool:
    """Whether a model's attention modules call transformers' attention interface.

    Raises:
        UnsupportedModelError: Some do and some do not.
    """
    kinds = {seam_of(type(module)): name for name, module in modules.values()}
    if len(kinds) > 1:
        raise UnsupportedModelError(
            f"{kinds['interface']} calls transformers' attention interface and {kinds['scores']} does not; attnswap "
            "serves models whose attention modules all do, or none"
        )
    return next(iter(kinds)) == "interface"


def remove_hooks(modules: list[nn.Module], table: str, kind: Any) -> None:
    """Removes the hooks of some class from one of torch's tables of hooks, and what torch notes beside them."""
    for module in modules:
        hooks = getattr(module, table)
        for key in [k for k, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[key]
            getattr(module, f"{table}_with_kwargs", {}).pop(key, None)


def add_slot(module: nn.Module, config: PreTrainedConfig, name: str, slot: Slot) -> None:
    """Adds a slot with fresh parameters to an attention module."""
    child = child_of(module)
    if child is None:
        child = LayerSwap(layer_info(config, module))
        child.train(module.training)
        module.add_module(KEY, child)
    # Under a meta device context some models make a few parameters elsewhere; the first need not be among the rest.
    device = min((p.device for p in module.parameters()), key=lambda d: d.type != "meta", default=torch.device("cpu"))
    child.add(name, slot, device)
