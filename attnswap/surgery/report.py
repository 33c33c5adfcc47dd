"""The report of a patched model, as a table."""

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from attnswap.surgery.parameters import swap_parameters
from attnswap.surgery.spec import PatchSpec, Slot
from attnswap.surgery.stacks import AttentionStack, find_stack
from attnswap.visible import visible


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        layer: Its index.
        module: Name of its attention module.
        swaps: The slots by name.
        kept: Query heads without a swap.
        before: The attention implementation of heads without a swap.
        stack: Name pattern of the attention modules of this part of the model, such as ``model.layers.*.self_attn``.
    """

    layer: int
    module: str
    swaps: dict[str, Slot]
    kept: tuple[int, ...]
    before: str = ""
    stack: str = ""


@dataclass(frozen=True)
class PatchReport:
    """Which swap or attention implementation computes each head of each layer.

    Attributes:
        model: Class name of the model.
        before: The attention implementation of layers and heads without a swap; several if parts differ.
        layers: One entry per attention layer of each patched part.
        parameters: How many learned numbers the swaps hold.
        notes: Other changes, such as quantization flags that were cleared.
    """

    model: str
    before: str
    layers: tuple[LayerReport, ...]
    parameters: int
    notes: tuple[str, ...] = ()

    @property
    def patched_layers(self) -> list[int]:
        """Indices of the layers with at least one swap."""
        return sorted({row.layer for row in self.layers if row.swaps})

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Returns (layers, heads, swap, lambda) with equal neighbouring layers drawn together."""
        several = len({row.stack for row in self.layers}) > 1
        grouped: list[tuple[str, int, int, list[tuple[str, str, str]]]] = []
        for row in self.layers:
            cells = [(_span(s.heads), repr(s.swap), _ramp(s.ramp)) for s in row.swaps.values()]
            if row.kept or not row.swaps:
                cells.append((_span(row.kept if row.swaps else None), f"as before ({row.before})", ""))
            stack, first = f"{row.stack} " if several else "", row.layer
            if grouped and (grouped[-1][0], grouped[-1][2], grouped[-1][3]) == (stack, row.layer - 1, cells):
                first = grouped.pop()[1]
            grouped.append((stack, first, row.layer, cells))
        return [
            (f"{stack}{first}" if first == last else f"{stack}{first}-{last}", *cell)
            for stack, first, last, cells in grouped
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
            f"{self.model}: {sum(bool(row.swaps) for row in self.layers)} of {len(self.layers)} layers swapped, "
            f"{self.parameters:,} new parameters"
        )
        return visible("\n".join([summary, *lines, *self.notes]))


def build_report(
    model: PreTrainedModel, found: list[tuple[AttentionStack, PatchSpec]], notes: list[str]
) -> PatchReport:
    """Builds the report of a model's present state.

    Args:
        model: The model.
        found: Its patched stacks with their specs; none if it is untouched.
        notes: What else was done.
    """
    found = found or [_untouched(find_stack(model))]
    rows = [row for stack, spec in found for row in _rows(stack, spec)]
    parameters = sum(p.numel() for p in swap_parameters(model).values())
    before = ", ".join(dict.fromkeys(str(spec.before) for _, spec in found))
    return PatchReport(type(model).__name__, before, tuple(rows), parameters, tuple(notes))


def _untouched(stack: AttentionStack) -> tuple[AttentionStack, PatchSpec]:
    return stack, PatchSpec(stack.config._attn_implementation)


def _rows(stack: AttentionStack, spec: PatchSpec) -> Iterator[LayerReport]:
    for index, (name, _) in stack.modules.items():
        heads = stack.info(index).heads if spec.layers else 0
        slots = spec.layers.get(index, {})
        taken = {h for s in slots.values() for h in (range(heads) if s.heads is None else s.heads)}
        kept = tuple(h for h in range(heads) if h not in taken)
        yield LayerReport(index, name, slots, kept, spec.before, stack.name)


def _span(heads: tuple[int, ...] | None) -> str:
    return "all" if heads is None else ",".join(map(str, heads))


def _ramp(ramp: float | tuple[float, ...]) -> str:
    return f"{ramp:g}" if isinstance(ramp, float) else f"{min(ramp):g} to {max(ramp):g}"
