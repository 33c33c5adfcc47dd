"""How far training moved each of the swap's parameters: a swap that never moved was never used."""

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
    """The distance of one parameter from its start.

    Attributes:
        largest: Largest absolute change of an element.
        rms: Root mean square of the changes.
    """

    largest: float
    rms: float


class Movement:
    """Remembers where the swap's parameters started.

    Args:
        model: A patched model before training; an unpatched one has nothing to remember.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.start = {name: _copy(p) for name, p in _named(model)}

    def save(self, file: Path) -> None:
        """Writes where the parameters started, by the names they have in the bare model."""
        save_file({name: start.float().contiguous() for name, start in self.start.items()}, file)

    def measure(self, model: torch.nn.Module) -> dict[str, Moved]:
        """Returns how far each parameter is from its start, by its full name."""
        moved = {}
        for name, parameter in _named(model):
            change = _copy(parameter) - self.start[name]
            moved[name] = Moved(change.abs().max().item(), change.square().mean().sqrt().item())
        return moved


@torch.no_grad()
def start_from(model: torch.nn.Module, file: Path) -> None:
    """Puts the swap's parameters where those of another run started; see :meth:`Movement.save`."""
    start = load_file(file)
    for name, parameter in _named(model):
        parameter.copy_(start[name])


def _named(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the swap's parameters under the names they have in the bare model."""
    for name, parameter in attnswap.swap_parameters(model).items():
        yield ".".join(word for word in name.split(".") if word not in WRAPPING), parameter


def _copy(parameter: Tensor) -> Tensor:
    """Returns a copy in fp64 on the CPU."""
    return full_tensor(parameter.detach()).to("cpu", torch.float64, copy=True)


def by_kind(moved: dict[str, Moved]) -> dict[str, Moved]:
    """Merges the layers: the last part of a parameter's name with the largest and the overall rms change."""
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
