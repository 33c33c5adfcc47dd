"""What was done to a model, as plain data: the part of ``config.json`` that makes a checkpoint reload."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import nn

from attnswap.errors import AttnSwapError, CheckpointError, ConfigError
from attnswap.swaps import Swap, resolve

FORMAT = 3
"""Version of the layout of an entry. A reader accepts every version up to its own.

1: One part of the model, which is the default one. 2: ``seam`` and ``part``. 3: ``parts``, several of version 2.
"""

KEY = "attnswap"
"""The name of everything attnswap adds to a model: config entry, child module, attention implementation, kwarg."""


def with_towers(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a config's values and those of its towers, any of which may hold a spec."""
    return [values, *(part for part in values.values() if isinstance(part, dict))]


@dataclass(frozen=True)
class Slot:
    """One swap on some heads of one layer.

    Attributes:
        swap: The config, bound to the layer.
        heads: The query heads it serves, in order; None: all of them.
        ramp: lambda: one number, or one per head.
        phase: ``"before"`` (lambda 0), ``"swap"`` (lambda 1) or ``"ramp"``. Kept, so that a compiled model depends on
            it alone and not on the number.
    """

    swap: Swap
    heads: tuple[int, ...] | None = None
    ramp: float | tuple[float, ...] = 1.0
    phase: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        values = frozenset(self.ramp) if isinstance(self.ramp, tuple) else frozenset({self.ramp})
        phase = {frozenset({0.0}): "before", frozenset({1.0}): "swap"}.get(values, "ramp")
        object.__setattr__(self, "phase", phase)

    def count(self, heads: int) -> int:
        """How many of a layer's ``heads`` it serves."""
        return heads if self.heads is None else len(self.heads)


@dataclass(frozen=True)
class PatchSpec:
    """Everything needed to rebuild the swaps of one part of a model.

    Attributes:
        layers: For each layer index its slots by name, which is also the name of their parameters.
        before: The attention implementation the model had.
        seam: How attention modules are served: by transformers' "interface", or by the "scores" of their own softmax.
        part: Which attention of the model; see :func:`attnswap.surgery.stacks.find_stack`.
    """

    before: str
    layers: dict[int, dict[str, Slot]] = field(default_factory=dict)
    seam: str = "interface"
    part: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values; equal slots of several layers are written once."""
        groups: dict[tuple[str, Slot], list[int]] = {}
        for layer, slots in self.layers.items():
            for name, slot in slots.items():
                groups.setdefault((name, slot), []).append(layer)
        entries = [
            {
                "slot": name,
                "swap": slot.swap.to_dict(),
                **_later_versions(slot.swap),
                "layers": layers,
                "heads": None if slot.heads is None else list(slot.heads),
                "ramp": list(slot.ramp) if isinstance(slot.ramp, tuple) else slot.ramp,
            }
            for (name, slot), layers in groups.items()
        ]
        if self.seam == "interface" and self.part is None:
            return {"format": 1, "before": self.before, "swaps": entries}
        return {"format": 2, "before": self.before, "seam": self.seam, "part": self.part, "swaps": entries}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            CheckpointError: The format is newer than this reader, the values are damaged, or of several parts.
        """
        specs = read_entry(values)
        if len(specs) > 1:
            raise CheckpointError("the attnswap entry swaps several parts of its model, where one is expected")
        return cls(**vars(specs[0]))

    def with_slot(self, layer: int, name: str, slot: Slot) -> Self:
        """Returns a copy in which a layer has one more slot, or another slot of that name.

        Raises:
            ConfigError: No slot can have that name.
        """
        check_slot_name(name)
        layers = {k: dict(v) for k, v in self.layers.items()}
        layers.setdefault(layer, {})[name] = slot
        return replace(self, layers=dict(sorted(layers.items())))


def write_entry(specs: Sequence[PatchSpec]) -> dict[str, Any]:
    """Returns the entry of a config for one or several parts of a model, as JSON-able values."""
    if len(specs) == 1:
        return specs[0].to_dict()
    if len({spec.part for spec in specs}) < len(specs):
        raise ValueError(f"an entry cannot name the parts {[spec.part for spec in specs]}")
    parts = [{"seam": spec.seam, "part": spec.part, **spec.to_dict(), "format": 2} for spec in specs]
    return {"format": FORMAT, "parts": parts}


def read_entry(values: Any) -> list[PatchSpec]:
    """Reads what :func:`write_entry` returned.

    Raises:
        CheckpointError: The format is newer than this reader, or the values are damaged.
    """
    version = values.get("format") if isinstance(values, dict) else None
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise CheckpointError(
            f"the checkpoint's attnswap format is {version!r}; this attnswap reads up to {FORMAT}: upgrade attnswap"
        )
    try:
        specs = [_read_part(part) for part in values["parts"]] if version == FORMAT else [_read_part(values)]
        parts = [spec.part for spec in specs]
        _require(specs and len(set(parts)) == len(parts), f"parts are {parts}")
    except AttnSwapError as error:
        raise CheckpointError(f"the checkpoint names a swap that cannot be built: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"the attnswap entry of config.json is damaged: {error!r}") from error
    return specs


def _read_part(values: Any) -> PatchSpec:
    """Reads the spec of one part; raises ValueError, TypeError or LookupError where it is damaged."""
    seam, part = (values["seam"], values["part"]) if values["format"] != 1 else ("interface", None)
    _require(seam in ("interface", "scores"), f"seam is {seam!r}")
    _require(isinstance(part, str | None), f"part is {part!r}")
    _require(isinstance(values["before"], str) and values["before"] != "", f"before is {values['before']!r}")
    layers: dict[int, dict[str, Slot]] = {}
    for entry in values["swaps"]:
        slot, name = _read_slot(entry), entry["slot"]
        check_slot_name(name)
        for layer in _indices(entry["layers"], "layers", lowest=-1):  # Zamba 2 numbers a shared layer so
            present = layers.setdefault(layer, {})
            _check_free(layer, name, slot, present)
            present[name] = slot
    return PatchSpec(values["before"], layers, seam, part)


def check_slot_name(name: Any) -> None:
    """Refuses what cannot name a slot: its parameters are found by it, in a module and in files.

    Raises:
        ConfigError: It is no identifier, or the name of something else in the module that holds slots.
    """
    if not isinstance(name, str) or not name.isidentifier() or name in _taken():
        raise ConfigError(
            f"{name!r} cannot name a slot, which is called as its swap is: it must be an identifier, and none that the "
            "module around it has already"
        )


_OWN = ("add", "drop", "info", "present_slots", "set_ramp", "slots", "slots_at", "_slot_at")
"""Attributes of the module that holds slots, beside those of every module."""


@functools.cache
def _taken() -> frozenset[str]:
    """Returns the attributes of the module that holds slots, and of peft's wrapper around it."""
    return frozenset({*dir(nn.Module()), *_OWN, "original_module", "modules_to_save"})


def _later_versions(swap: Swap) -> dict[str, dict[str, int]]:
    """Returns the entry's key for versions of the maths, which is left out where all are 1."""
    later = {name: version for name, version in swap.versions().items() if version > 1}
    return {"versions": later} if later else {}


def _check_versions(swap: Swap, saved: Mapping[str, Any]) -> None:
    """Refuses a swap that was saved with other maths than is computed here.

    Raises:
        CheckpointError: The versions differ.
    """
    for name, ours in swap.versions().items():
        theirs = saved.get(name, 1)
        if theirs != ours:
            way = "upgrade attnswap" if theirs > ours else "load it with the attnswap that saved it, or train it again"
            raise CheckpointError(f'it was saved with version {theirs} of "{name}"; this attnswap has {ours}: {way}')


def _read_slot(entry: Any) -> Slot:
    """Reads one swap of a spec; raises ValueError, TypeError or KeyError where it is damaged."""
    swap = resolve(entry["swap"])
    _check_versions(swap, entry.get("versions", {}))
    ramp, heads = entry["ramp"], entry["heads"]
    several = isinstance(ramp, list)
    for value in ramp if several else [ramp]:
        _require(type(value) in (int, float) and 0 <= value <= 1, f"lambda is {value!r}")
    return Slot(
        swap,
        None if heads is None else _indices(heads, "heads"),
        tuple(float(value) for value in ramp) if several else float(ramp),
    )


def _indices(values: Any, what: str, lowest: int = 0) -> tuple[int, ...]:
    """Returns whole numbers of which none is too low or given twice, at least one."""
    fine = isinstance(values, list) and values and all(type(x) is int and x >= lowest for x in values)
    _require(fine and len(set(values)) == len(values), f"{what} are {values!r}")
    return tuple(values)


def _check_free(layer: int, name: str, slot: Slot, present: Mapping[str, Slot]) -> None:
    _require(name not in present, f"layer {layer} has two slots {name!r}")
    for other in present.values():
        apart = slot.heads is not None and other.heads is not None and not set(slot.heads) & set(other.heads)
        _require(apart, f"two swaps of layer {layer} serve one head")


def _require(condition: Any, message: str) -> None:
    """Raises ValueError unless a condition holds."""
    if not condition:
        raise ValueError(message if len(message) <= 200 else f"{message[:200]}...")
