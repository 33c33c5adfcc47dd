"""What is measured: swaps with their features, other implementations, and the sizes of a call."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, Literal

import torch

from attnswap import swaps
from attnswap.bench.peers import PEERS, installed

MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention layer: query heads, key/value heads and the width of a head."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {shape.name: shape for shape in (Shape("smollm2", 9, 3, 64), Shape("h8d128", 8, 8, 128))}
"""The layers measured, by name."""


@dataclass(frozen=True)
class Setting:
    """One point of the benchmark.

    Attributes:
        shape: The layer.
        length: Queries, and keys.
        dtype: Name of the torch dtype of query, key and value, such as ``"float32"``.
        mode: ``"forward"`` (without gradients) or ``"forward+backward"`` (gradients of every input and feature).
    """

    shape: Shape
    length: int
    dtype: str
    mode: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return getattr(torch, self.dtype)

    @property
    def backward(self) -> bool:
        """Whether gradients are computed."""
        return self.mode == MODES[1]


@dataclass(frozen=True)
class Case:
    """One contestant, as plain values, so that it can be handed to another process.

    Attributes:
        label: Its name in tables.
        kind: ``"sdpa"`` (torch's flash path, what all are compared with), ``"swap"`` or ``"peer"``.
        swap: The swap's config, for swaps.
        fill: Features held at one value, by name; the others are drawn (:mod:`attnswap.bench.calls`).
    """

    label: str
    kind: Literal["sdpa", "swap", "peer"]
    swap: Mapping[str, Any] = field(default_factory=dict)
    fill: Mapping[str, float] = field(default_factory=dict)

    @property
    def traits(self) -> swaps.Traits | None:
        """The traits of the swap, if it is one."""
        return swaps.resolve(self.swap).traits if self.kind == "swap" else None


SDPA = Case("sdpa", "sdpa")

OPTIONS: dict[str, Sequence[Mapping[str, Any]]] = {
    "selective-temperature": [{"value": False}],
    "entmax": [{}, {"alpha": 2.0}],  # the latter is sparsemax
}
"""Options that differ from a swap's defaults: one case for each choice of them."""

FILLS: dict[str, Sequence[Mapping[str, float]]] = {
    "forgetting-gate": [{"log_forget": value} for value in (0.0, -1e-3, -0.7)]
}
"""Swaps whose speed depends on the values of a feature: one case for each."""


def swap_cases(names: Sequence[str] | None = None) -> list[Case]:
    """Returns the cases of some swaps.

    Args:
        names: Names of swaps; None: all that are known.

    Raises:
        ConfigError: A name is unknown (the nearest known one is suggested).
    """
    found = []
    for name in swaps.names() if names is None else dict.fromkeys(names):
        for chosen, fill in product(OPTIONS.get(name, [{}]), FILLS.get(name, [{}])):
            options = "".join(f" {key}={value}" for key, value in chosen.items())
            values = "".join(f" {key}={value:g}" for key, value in fill.items())
            config = swaps.resolve({"name": name, **chosen}).to_dict()
            found.append(Case(f"{name}{options}{values}", "swap", config, fill))
    return found


def peer_cases() -> list[Case]:
    """Returns the other implementations that can run here."""
    return [Case(name, "peer") for name, peer in PEERS.items() if installed(peer)]


def to_json(case: Case, setting: Setting) -> dict[str, Any]:
    """Returns a case and its setting as plain values."""
    return {"case": asdict(case), "setting": asdict(setting)}


def from_json(values: Mapping[str, Any]) -> tuple[Case, Setting]:
    """Reads what :func:`to_json` wrote."""
    setting = values["setting"]
    return Case(**values["case"]), Setting(**{**setting, "shape": Shape(**setting["shape"])})
