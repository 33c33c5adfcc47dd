"""What patching did, as a table a person can read."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from attnswap.surgery.attach import Modules
from attnswap.surgery.parameters import swap_parameters
from attnswap.surgery.select import layer_info, owning_config
from attnswap.surgery.spec import PatchSpec, Slot
from attnswap.visible import visible


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        layer: Its index.
        module: Name of its attention module.
        swaps: The slots by name.
        kept: Query heads that keep the previous implementation.
    """

    layer: int
    module: str
    swaps: dict[str, Slot]
    kept: tuple[int, ...]


@dataclass(frozen=True)
class PatchReport:
    """What serves which head of which layer of a model.

    Attributes:
        model: Class name of the model.
        before: The attention implementation that unselected layers and heads keep.
        layers: One entry per attention layer.
        parameters: How many learned numbers the swaps hold.
        notes: Anything else that was done.
    """

    model: str
    before: str
    layers: tuple[LayerReport, ...]
    parameters: int
    notes: tuple[str, ...] = ()

    @property
    def patched_layers(self) -> list[int]:
        """Indices of the layers with at least one swap."""
        return [row.layer for row in self.layers if row.swaps]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Returns (layers, heads, swap, lambda) with equal neighbouring layers drawn together."""
        grouped: list[tuple[int, int, list[tuple[str, str, str]]]] = []
        for row in self.layers:
            cells = [(_span(s.heads), repr(s.swap), _ramp(s.ramp)) for s in row.swaps.values()]
            if row.kept or not row.swaps:
                cells.append((_span(row.kept if row.swaps else None), f"as before ({self.before})", ""))
            if grouped and grouped[-1][2] == cells and grouped[-1][1] == row.layer - 1:
                grouped[-1] = (grouped[-1][0], row.layer, cells)
            else:
                grouped.append((row.layer, row.layer, cells))
        return [
            (str(first) if first == last else f"{first}-{last}", *cell)
            for first, last, cells in grouped
            for cell in cells
        ]

    def __str__(self) -> str:
        head = ("layers", "heads", "attention", "lambda")
        table = [head, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        summary = (
            f"{self.model}: {len(self.patched_layers)} of {len(self.layers)} layers swapped, "
            f"{self.parameters:,} new parameters"
        )
        return visible("\n".join([summary, *lines, *self.notes]))


def build_report(model: PreTrainedModel, modules: Modules, spec: PatchSpec, notes: list[str]) -> PatchReport:
    """Builds the report of a model's present state."""
    config = owning_config(model, modules)
    rows = []
    for index, (name, module) in modules.items():
        heads = layer_info(config, module).heads if spec.layers else 0
        slots = spec.layers.get(index, {})
        taken = {h for s in slots.values() for h in (range(heads) if s.heads is None else s.heads)}
        rows.append(LayerReport(index, name, slots, tuple(h for h in range(heads) if h not in taken)))
    parameters = sum(p.numel() for p in swap_parameters(model).values())
    return PatchReport(type(model).__name__, spec.before, tuple(rows), parameters, tuple(notes))


def _span(heads: tuple[int, ...] | None) -> str:
    return "all" if heads is None else ",".join(map(str, heads))


def _ramp(ramp: float | tuple[float, ...]) -> str:
    return f"{ramp:g}" if isinstance(ramp, float) else f"{min(ramp):g} to {max(ramp):g}"
