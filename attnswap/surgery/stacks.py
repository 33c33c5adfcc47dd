"""Which attention modules a model has: one stack per tower and kind, such as a decoder's self-attention."""

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from attnswap.errors import ConfigError, UnsupportedModelError
from attnswap.surgery.spec import KEY

Modules = dict[int, tuple[str, nn.Module]]
"""Attention modules with their names, by layer index."""

CROSS = re.compile(r"cross|encoder_attn|EncDec", re.IGNORECASE)
"""How modules that attend to another sequence are named."""

_BUT_SWAPS = rf"(?!.*\.{KEY}\.)"
"""Put behind a pattern of tied names, so that it takes no swap's."""

SENSES = re.compile("vision|image|img|visual|audio|speech")
"""How towers that read no text are named."""


@dataclass(frozen=True)
class Stack:
    """Attention modules that differ in their layer alone.

    Attributes:
        name: Their name in the model, with ``*`` for numbers: ``model.decoder.layers.*.self_attn``.
        modules: The modules by layer index.
        cross: They attend to another sequence than the one their queries come from.
    """

    name: str
    modules: Modules
    cross: bool

    def fits(self, part: str) -> bool:
        """Whether a user means this stack: by some consecutive parts of its name, or all of cross-attention."""
        if part == "cross":
            return self.cross
        words, wanted = self.name.split("."), part.split(".")
        places = [i for i in range(len(words) - len(wanted) + 1) if words[i : i + len(wanted)] == wanted]
        ends = any(i + len(wanted) == len(words) for i in places)
        return bool(places) and (ends or not self.cross)


def stacks(model: nn.Module) -> list[Stack]:
    """Returns the attention modules of a model.

    A module counts if its code calls transformers' attention interface, or if its class name ends in "Attention" and
    its code calls a softmax (linear attention does neither), and if there is none inside it. Its index is its
    ``layer_idx``, or in stacks that give none its place. Whether its attention can really be served is shown by the
    probe, not assumed here.
    """
    named = [(n, m) for n, m in model.named_modules() if seam_of(type(m)) is not None]
    named = [(n, m) for n, m in named if not any(other.startswith(f"{n}.") for other, _ in named)]
    groups: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in named:
        groups.setdefault(".".join("*" if w.isdigit() else w for w in name.split(".")), []).append((name, module))
    found = []
    for name, members in groups.items():
        indices = [_own_index(module) for _, module in members]
        if None in indices or len(set(indices)) < len(indices):
            indices = list(range(len(members)))
        cross = any(CROSS.search(type(m).__name__) or getattr(m, "is_cross_attention", False) for _, m in members)
        cross = cross or CROSS.search(name.split(".")[-1]) is not None
        found.append(Stack(name, dict(sorted(zip(indices, members, strict=True))), cross))  # type: ignore[arg-type]
    return found


def _own_index(module: nn.Module) -> int | None:
    indices = (getattr(module, name, None) for name in ("layer_idx", "layer_id"))
    return next((index for index in indices if isinstance(index, int)), None)


def attention_modules(model: nn.Module, part: str | None = None, config: PreTrainedConfig | None = None) -> Modules:
    """Returns the attention modules that a patch is about.

    Args:
        model: The model.
        part: Words of their names such as ``"encoder"``, ``"vision_tower"`` or ``"decoder.layers.*.self_attn"``, or
            ``"cross"``; default: self-attention, of the decoder or text tower where there are several.
        config: The tower's, where some attention has it as its own.

    Raises:
        ConfigError: ``part`` means no attention of this model, or several.
        UnsupportedModelError: The model has none.
    """
    every = stacks(model)
    if not every:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention module to patch (none that calls transformers' attention "
            "interface, and none whose class name ends in Attention and that computes a softmax)"
        )
    own = [
        s
        for s in every
        if config is not None and any(m.__dict__.get("config") is config for _, m in s.modules.values())
    ]
    every = own or every
    if part is not None:
        chosen = [stack for stack in every if stack.fits(part)]
    else:
        chosen = [stack for stack in every if not stack.cross] or every
        if _clash(chosen):
            decoder = _decoder(model)
            chosen = [s for s in chosen if any(m in decoder for _, m in s.modules.values())]
        if _clash(chosen):
            chosen = [s for s in chosen if not SENSES.search(s.name)]
    if not chosen or _clash(chosen):
        names = ", ".join(f'"{stack.name}"' for stack in every)
        what = f'part="{part}" names' if part else f"{type(model).__name__} has"
        raise ConfigError(
            f"{what} {'several attentions' if chosen else 'no attention'}; choose part= from {names}, or words of them"
        )
    return dict(sorted((index, named) for stack in chosen for index, named in stack.modules.items()))


def _clash(found: list[Stack]) -> bool:
    indices = [index for stack in found for index in stack.modules]
    return len(set(indices)) < len(indices)


def _decoder(model: nn.Module) -> set[nn.Module]:
    get: Callable[[], nn.Module] | None = getattr(model, "get_decoder", None)
    return set() if get is None else set(get().modules())


def is_cross(model: nn.Module, modules: Modules) -> bool:
    """Whether these modules attend to another sequence than the one their queries come from."""
    chosen = {id(module) for _, module in modules.values()}
    return any(stack.cross and any(id(m) in chosen for _, m in stack.modules.values()) for stack in stacks(model))


def untie(model: nn.Module, modules: Modules) -> None:
    """Keeps swaps out of what a model ties by name: layers that share one attention have swaps of their own."""
    chosen = {id(module) for _, module in modules.values()}
    for owner in model.modules():
        tied = getattr(owner, "_tied_weights_keys", None)
        if not isinstance(tied, dict) or any(pattern.endswith(_BUT_SWAPS) for pattern in tied):
            continue
        names = [f"{name}.{KEY}." for name, module in owner.named_modules() if id(module) in chosen]
        if any(re.search(f"^{pattern}", name) for pattern in tied for name in names):
            owner._tied_weights_keys = {to + _BUT_SWAPS: source + _BUT_SWAPS for to, source in tied.items()}  # type: ignore[assignment]


def retie(model: nn.Module) -> None:
    """Undoes :func:`untie`."""
    for owner in model.modules():
        tied = getattr(owner, "_tied_weights_keys", None)
        if isinstance(tied, dict) and any(pattern.endswith(_BUT_SWAPS) for pattern in tied):
            plain = {to.removesuffix(_BUT_SWAPS): source.removesuffix(_BUT_SWAPS) for to, source in tied.items()}
            owner._tied_weights_keys = plain  # type: ignore[assignment]


def siblings(model: nn.Module, modules: Modules) -> list[nn.Module]:
    """Returns every attention module that reads its implementation from the same config as some of ``modules``."""
    configs = {id(getattr(m, "config", None)) for _, m in modules.values()}
    return [
        m for stack in stacks(model) for _, m in stack.modules.values() if id(getattr(m, "config", None)) in configs
    ]


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
