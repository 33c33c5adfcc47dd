"""How far training moved the parameters of a swap. Parameters that do not move point at a swap without effect."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import attnswap
from attnswap.distributed import full_tensor
from attnswap.surgery.guard import WRAPPING


@dataclass(frozen=True)
class Moved:
    """The distance of one parameter from its initial value.

    Attributes:
        largest: Largest absolute change of an element.
        rms: Root mean square of the changes.
    """

    largest: float
    rms: float


class Movement:
    """Keeps the initial values of the swap's parameters.

    Args:
        model: A model before training. An unpatched one has no such parameters.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.start = {name: _copy(p) for name, p in _swap_parameters(model)}

    def save(self, file: Path) -> None:
        """Writes the initial values to a file, by the parameters' names in the unwrapped model."""
        save_file({name: start.float().contiguous() for name, start in self.start.items()}, file)

    def measure(self, model: torch.nn.Module) -> dict[str, Moved]:
        """Returns how far each parameter is from its initial value, by its full name."""
        moved = {}
        for name, parameter in _swap_parameters(model):
            change = _copy(parameter) - self.start[name]
            moved[name] = Moved(change.abs().max().item(), change.square().mean().sqrt().item())
        return moved


@torch.no_grad()
def load_start(model: torch.nn.Module, file: Path) -> None:
    """Sets the swap's parameters to initial values that :meth:`Movement.save` wrote."""
    start = load_file(file)
    for name, parameter in _swap_parameters(model):
        parameter.copy_(start[name])


def _swap_parameters(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the swap's parameters with their names in the unwrapped model."""
    for name, parameter in attnswap.swap_parameters(model).items():
        yield ".".join(word for word in name.split(".") if word not in WRAPPING), parameter


def _copy(parameter: Tensor) -> Tensor:
    """Returns a copy of the full tensor in fp64 on the CPU."""
    return full_tensor(parameter.detach()).to("cpu", torch.float64, copy=True)


def by_kind(moved: dict[str, Moved]) -> dict[str, Moved]:
    """Returns the largest and the rms change over all layers, by the last part of the parameters' names."""
    kinds: dict[str, list[Moved]] = {}
    for name, value in moved.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(value)
    return {
        kind: Moved(max(m.largest for m in values), (sum(m.rms**2 for m in values) / len(values)) ** 0.5)
        for kind, values in kinds.items()
    }


def as_json(moved: dict[str, Moved]) -> dict[str, dict[str, float]]:
    """Returns the measurements as plain values."""
    return {name: asdict(value) for name, value in moved.items()}
