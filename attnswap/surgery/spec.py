"""What was done to a model, as plain data: the part of ``config.json`` that makes a checkpoint reload."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

from attnswap.errors import AttnSwapError, CheckpointError
from attnswap.swaps import Swap, resolve

FORMAT = 2
"""Version of the layout below. A reader accepts every version up to its own.

2: ``seam`` and ``part``, where they are not the default.
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
    """Everything needed to rebuild the swaps of a model.

    Attributes:
        layers: For each layer index its slots by name, which is also the name of their parameters.
        before: The attention implementation the model had.
        seam: How attention modules are served: by transformers' "interface", or by the "scores" of their own softmax.
        part: Which attention of the model; see :func:`attnswap.surgery.stacks.attention_modules`.
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
                "layers": layers,
                "heads": None if slot.heads is None else list(slot.heads),
                "ramp": list(slot.ramp) if isinstance(slot.ramp, tuple) else slot.ramp,
            }
            for (name, slot), layers in groups.items()
        ]
        if self.seam == "interface" and self.part is None:
            return {"format": 1, "before": self.before, "swaps": entries}
        return {"format": FORMAT, "before": self.before, "seam": self.seam, "part": self.part, "swaps": entries}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            CheckpointError: The format is newer than this reader, or the values are damaged.
        """
        version = values.get("format")
        if not isinstance(version, int) or not 1 <= version <= FORMAT:
            raise CheckpointError(
                f"the checkpoint's attnswap format is {version!r}; this attnswap reads up to {FORMAT}: upgrade attnswap"
            )
        try:
            part = values.get("part")
            spec = cls(str(values["before"]), seam=str(values.get("seam", "interface")), part=part)
            if spec.seam not in ("interface", "scores") or not isinstance(part, str | None):
                raise ValueError(f"seam {spec.seam}, part {part}")
            for entry in values["swaps"]:
                ramp, heads = entry["ramp"], entry["heads"]
                slot = Slot(
                    resolve(entry["swap"]),
                    None if heads is None else tuple(int(h) for h in heads),
                    tuple(float(r) for r in ramp) if isinstance(ramp, list) else float(ramp),
                )
                if not all(0 <= r <= 1 for r in (slot.ramp if isinstance(slot.ramp, tuple) else (slot.ramp,))):
                    raise ValueError(f"lambda {ramp}")
                for layer in entry["layers"]:
                    spec.layers.setdefault(int(layer), {})[str(entry["slot"])] = slot
        except AttnSwapError as error:
            raise CheckpointError(f"the checkpoint names a swap that cannot be built: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the attnswap entry of config.json is damaged: {error!r}") from error
        return spec

    def with_slot(self, layer: int, name: str, slot: Slot) -> Self:
        """Returns a copy in which a layer has one more slot, or another slot of that name."""
        layers = {k: dict(v) for k, v in self.layers.items()}
        layers.setdefault(layer, {})[name] = slot
        return replace(self, layers=dict(sorted(layers.items())))
