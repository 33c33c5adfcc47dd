"""Which attention modules a model has, and the stack of them that one patch is about."""

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from attnswap.errors import ConfigError, UnsupportedModelError
from attnswap.swaps.base import ModelInfo

Modules = dict[int, tuple[str, nn.Module]]
"""Attention modules with their names, by layer index."""

CROSS = re.compile(r"cross|encoder_attn|EncDec", re.IGNORECASE)
"""How modules that attend to another sequence are named."""

SENSES = re.compile("vision|image|img|visual|audio|speech")
"""How towers that read no text are named."""


@dataclass(frozen=True)
class Group:
    """Attention modules whose names differ in the number of their layer alone.

    Attributes:
        name: Their name in the model, with ``*`` for numbers: ``model.decoder.layers.*.self_attn``.
        modules: The modules by layer index.
        cross: They attend to another sequence than the one their queries come from.
    """

    name: str
    modules: Modules
    cross: bool

    def fits(self, part: str) -> bool:
        """Whether ``part`` names this group: by consecutive words of its name, or all cross-attention by "cross"."""
        if part == "cross":
            return self.cross
        words, wanted = self.name.split("."), part.split(".")
        places = [i for i in range(len(words) - len(wanted) + 1) if words[i : i + len(wanted)] == wanted]
        ends = any(i + len(wanted) == len(words) for i in places)
        return bool(places) and (ends or not self.cross)


@dataclass(frozen=True, eq=False)
class AttentionStack:
    """The attention modules of a model that are patched together, such as its decoder's self-attention.

    Attributes:
        model: The model.
        part: The words that chose the modules; None: the default.
        modules: The modules with their names, by layer index.
        name: What their names have in common, with ``*`` for numbers.
        cross: They attend to another sequence than the one their queries come from.
        others: The model's other attention modules, with their names.
        saved: The entry that names the stack, if there is one, is in a config that the model saves.
    """

    model: PreTrainedModel
    part: str | None
    modules: Modules
    name: str
    cross: bool
    others: tuple[tuple[str, nn.Module], ...]
    saved: bool = True

    @property
    def layers(self) -> list[int]:
        """Layer indices in ascending order."""
        return list(self.modules)

    @property
    def config(self) -> PreTrainedConfig:
        """The config that all modules of the stack read their attention implementation from.

        Raises:
            UnsupportedModelError: They do not share one.
        """
        configs = {id(c): c for _, m in self.modules.values() if (c := getattr(m, "config", None)) is not None}
        if not configs and not any(seam_of(type(m)) == "interface" for _, m in self.modules.values()):
            return self.model.config.get_text_config()
        if len(configs) != 1:
            raise UnsupportedModelError(
                f"the attention modules of {type(self.model).__name__} do not share one config ({len(configs)} found), "
                "so their attention implementation cannot be set per model"
            )
        return next(iter(configs.values()))

    @functools.cached_property
    def seam(self) -> str:
        """Where the modules are served: at transformers' "interface", or at the "scores" of their own softmax.

        Raises:
            UnsupportedModelError: Some are of the one kind and some of the other.
        """
        kinds = {seam_of(type(module)): name for name, module in self.modules.values()}
        if len(kinds) > 1:
            raise UnsupportedModelError(
                f"{kinds['interface']} calls transformers' attention interface and {kinds['scores']} does not; "
                "attnswap serves models whose attention modules all do, or none"
            )
        return str(next(iter(kinds)))

    @functools.cached_property
    def siblings(self) -> list[nn.Module]:
        """Every attention module that reads its implementation from the config of this stack, the stack's included."""
        every = [module for _, module in (*self.modules.values(), *self.others)]
        configs = {id(getattr(module, "config", None)) for _, module in self.modules.values()}
        return [module for module in every if id(getattr(module, "config", None)) in configs]

    def module(self, layer: int) -> nn.Module:
        """Returns the attention module of a layer."""
        return self.modules[layer][1]

    def info(self, layer: int) -> ModelInfo:
        """Returns the sizes of a layer.

        Raises:
            UnsupportedModelError: Neither the module nor its config says how many heads there are.
        """
        return _layer_info(self.config, self.module(layer))

    def shares(self, other: "AttentionStack") -> set[int]:
        """Returns the layers of this stack whose module is also another stack's."""
        theirs = {id(module) for _, module in other.modules.values()}
        return {layer for layer, (_, module) in self.modules.items() if id(module) in theirs}


def _layer_info(config: PreTrainedConfig, module: nn.Module) -> ModelInfo:
    """Returns a layer's sizes, from its attention module where that has them, else from its config."""
    usual = _size(config, "num_attention_heads")
    heads = _size(module, "num_heads", "num_attention_heads", "n_heads", "n_head") or usual
    hidden = _size(module, "attention_hidden_size") or _size(config, "hidden_size")
    if heads is None or hidden is None:
        raise UnsupportedModelError(f"{type(config).__name__} names no single num_attention_heads and hidden_size")
    kv_heads = _size(module, "num_key_value_heads", "num_kv_heads")
    if kv_heads is None and heads == usual:  # a config speaks of one of its towers
        kv_heads = _size(config, "num_key_value_heads")
    return ModelInfo(
        heads=heads,
        kv_heads=kv_heads or heads,
        hidden=hidden,
        max_positions=_size(config, "max_position_embeddings"),
        value_dim=_size(module, "v_head_dim", "value_head_dim", "head_dim") or _size(config, "head_dim"),
    )


def _size(owner: Any, *names: str) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def groups(model: nn.Module) -> list[Group]:
    """Returns the attention modules of a model.

    A module counts if its code calls transformers' attention interface, or if its class name ends in "Attention" and
    its code calls a softmax (linear attention does neither), and if there is none inside it. Its index is its
    ``layer_idx``, or its place among the modules of that name where some have none. Whether its attention can really
    be served is shown by the probe, not assumed here.
    """
    named = [(n, m) for n, m in model.named_modules() if seam_of(type(m)) is not None]
    named = [(n, m) for n, m in named if not any(other.startswith(f"{n}.") for other, _ in named)]
    members: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in named:
        members.setdefault(".".join("*" if w.isdigit() else w for w in name.split(".")), []).append((name, module))
    return [_group(name, several) for name, several in members.items()]


def _group(name: str, members: list[tuple[str, nn.Module]]) -> Group:
    indices = [_own_index(module) for _, module in members]
    if None in indices or len(set(indices)) < len(indices):
        indices = list(range(len(members)))
    cross = any(CROSS.search(type(m).__name__) or getattr(m, "is_cross_attention", False) for _, m in members)
    cross = cross or CROSS.search(name.split(".")[-1]) is not None
    return Group(name, dict(sorted(zip(indices, members, strict=True))), cross)  # type: ignore[arg-type]


def _own_index(module: nn.Module) -> int | None:
    indices = (getattr(module, name, None) for name in ("layer_idx", "layer_id"))
    return next((index for index in indices if isinstance(index, int)), None)


def find_stack(
    model: PreTrainedModel, part: str | None = None, config: PreTrainedConfig | None = None, saved: bool = True
) -> AttentionStack:
    """Returns the attention modules that a patch is about.

    Args:
        model: The model.
        part: Words of their names such as ``"encoder"``, ``"vision_tower"`` or ``"decoder.layers.*.self_attn"``, or
            ``"cross"``; default: self-attention, of the decoder or text tower where there are several.
        config: Only modules with this config are meant, if there are any.
        saved: See :class:`AttentionStack`.

    Raises:
        ConfigError: ``part`` means no attention of this model, or several.
        UnsupportedModelError: The model has none.
    """
    every = groups(model)
    if not every:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention module to patch (none that calls transformers' attention "
            "interface, and none whose class name ends in Attention and that computes a softmax)"
        )
    chosen = _choose(model, [g for g in every if config is not None and _has_config(g, config)] or every, part)
    modules = dict(sorted((index, named) for group in chosen for index, named in group.modules.items()))
    return AttentionStack(
        model,
        part,
        modules,
        name=", ".join(group.name for group in chosen),
        cross=any(group.cross for group in chosen),
        others=tuple(named for group in every if group not in chosen for named in group.modules.values()),
        saved=saved,
    )


def refuse_own_parts(stacks: list[AttentionStack]) -> None:
    """Refuses parts that were patched as models of their own, if their entry would mean other attention in the whole.

    Args:
        stacks: The patched stacks of the whole model.

    Raises:
        ConfigError: There is such a part.
    """
    for stack in stacks:
        if not stack.saved and not _means_same(stack):
            raise ConfigError(
                f"{stack.name} was patched as a model of its own, whose config the {type(stack.model).__name__} around "
                "it does not save: unpatch that part, and patch the whole model with part="
            )


def _means_same(stack: AttentionStack) -> bool:
    """Whether the words of a part choose the same attention in the whole model."""
    try:
        return len(find_stack(stack.model, stack.part).shares(stack)) == len(stack.modules)
    except ConfigError:
        return False


def refuse_half(stack: AttentionStack, whole: PreTrainedModel) -> None:
    """Refuses a part of a larger model if attention outside of the part reads its implementation from the same config.

    Args:
        stack: The attention modules of the part.
        whole: The outermost model around it, or its model itself.

    Raises:
        ConfigError: There is such attention: its layers would have no hooks.
    """
    if whole is stack.model:
        return
    inside, config = {id(module) for module in stack.siblings}, stack.config
    modules = [named for group in groups(whole) for named in group.modules.values()]
    rest = [name for name, m in modules if getattr(m, "config", None) is config and id(m) not in inside]
    if rest:
        raise ConfigError(
            f"{rest[0]} of the {type(whole).__name__} around this {type(stack.model).__name__} has the same config, so "
            f"that one cannot be changed without the other: pass the {type(whole).__name__}, with part= for a patch"
        )


def _has_config(group: Group, config: PreTrainedConfig) -> bool:
    return any(module.__dict__.get("config") is config for _, module in group.modules.values())


def _choose(model: PreTrainedModel, every: list[Group], part: str | None) -> list[Group]:
    """Returns the groups that make up one stack: those that ``part`` names, whose layer indices differ."""
    if part is not None:
        chosen = [group for group in every if group.fits(part)]
    else:
        chosen = [group for group in every if not group.cross] or every
        if _clash(chosen):
            decoder = _decoder(model)
            chosen = [g for g in chosen if any(m in decoder for _, m in g.modules.values())]
        if _clash(chosen):
            chosen = [g for g in chosen if not SENSES.search(g.name)]
    if not chosen or _clash(chosen):
        names = ", ".join(f'"{group.name}"' for group in every)
        what = f'part="{part}" names' if part else f"{type(model).__name__} has"
        raise ConfigError(
            f"{what} {'several attentions' if chosen else 'no attention'}; choose part= from {names}, or words of them"
        )
    return chosen


def _clash(found: list[Group]) -> bool:
    indices = [index for group in found for index in group.modules]
    return len(set(indices)) < len(indices)


def _decoder(model: nn.Module) -> set[nn.Module]:
    get: Callable[[], nn.Module] | None = getattr(model, "get_decoder", None)
    return set() if get is None else set(get().modules())


def seam_of(kind: type) -> str | None:
    """Returns how a class of modules computes attention: through the "interface", by "scores" of its own, or not."""
    found: str | None = _seam(kind)
    return found


@functools.cache
def _seam(kind: Any) -> str | None:
    if kind.__module__.startswith("torch.") or issubclass(kind, PreTrainedModel):
        return None
    code = code_of(kind)
    named = kind.__name__.endswith("Attention")
    if "ALL_ATTENTION_FUNCTIONS" in code or (named and not code):
        return "interface"
    if not named:
        return None
    return "scores" if re.search("softmax|scaled_dot_product_attention", code, re.IGNORECASE) else None


def code_of(kind: type) -> str:
    """Returns the source of a class of modules and of the classes it derives from, as far as there is any."""
    return "".join(_code(cls) for cls in kind.__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module)


def _code(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed in or generated
        return ""
