"""The cases of a benchmark (swaps and other implementations), and its settings (sizes, dtypes, modes)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, Literal

import torch

from attnswap import swaps
from attnswap.bench.peers import PEERS, installed
from attnswap.errors import require

MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Shape:
    """The sizes of an attention layer."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    shape.name: shape
    for shape in (
        *(Shape("smollm2", 9, 3, 64), Shape("h8d128", 8, 8, 128)),
        *(Shape("h32d64", 32, 32, 64), Shape("h16d128", 16, 16, 128), Shape("llama8b", 32, 8, 128)),
    )
}
"""Layers by name."""


@dataclass(frozen=True)
class Defaults:
    """What is measured on a type of device unless something else is asked for.

    Attributes:
        shapes: Names of layers.
        lengths: Numbers of queries and of keys.
        dtypes: Names of torch dtypes.
        tokens: Tokens of a call; shorter sequences get a batch.
    """

    shapes: Sequence[str]
    lengths: Sequence[int]
    dtypes: Sequence[str]
    tokens: int


DEFAULTS = {
    "cpu": Defaults(("smollm2", "h8d128"), [1 << i for i in range(10, 15)], ("float32", "bfloat16"), 1),
    "cuda": Defaults(("h32d64", "h16d128"), [1 << i for i in range(11, 17)], ("bfloat16",), 1 << 15),
}
"""By type of device; others cannot be timed."""


def defaults(device: str) -> Defaults:
    """Returns the defaults for a device.

    Raises:
        ConfigError: It cannot be timed.
    """
    kind = torch.device(device).type
    require(kind in DEFAULTS, f'"{device}" cannot be timed: only CPUs and GPUs of NVIDIA and AMD can')
    return DEFAULTS[kind]


@dataclass(frozen=True)
class Setting:
    """The sizes, dtype and mode of a call.

    Attributes:
        shape: The layer.
        length: Number of queries and of keys.
        dtype: Name of the torch dtype of query, key and value, such as ``"float32"``.
        mode: ``"forward"`` (without gradients) or ``"forward+backward"`` (gradients of every input and feature).
        batch: Number of sequences.
        device: Name of the torch device.
    """

    shape: Shape
    length: int
    dtype: str
    mode: str
    batch: int = 1
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype."""
        return getattr(torch, self.dtype)

    @property
    def backward(self) -> bool:
        """Whether gradients are computed."""
        return self.mode == MODES[1]

    @property
    def operations(self) -> float:
        """Floating point operations of the matrix products of causal attention.

        Two products of queries by keys in the forward pass, half of which the mask leaves out, and five in the backward
        pass.
        """
        pairs = self.batch * self.shape.heads * self.length**2 / 2
        return 4 * pairs * self.shape.head_dim * (3.5 if self.backward else 1.0)


@dataclass(frozen=True)
class Case:
    """One implementation of attention, as plain values that can be passed to another process.

    Attributes:
        label: Name in tables.
        kind: ``"sdpa"`` (torch's flash attention, the baseline), ``"swap"`` or ``"peer"`` (another implementation).
        swap: Config of the swap, for swaps and for peers that compute one.
        fill: Constant values of some features, by name. The others are drawn (:mod:`attnswap.bench.calls`).
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
"""Options by swap: one case for each entry. Other swaps have one case with their default options."""

FILLS: dict[str, Sequence[Mapping[str, float]]] = {
    "forgetting-gate": [{"log_forget": value} for value in (0.0, -1e-3, -0.7)]
}
"""Constant feature values by swap, for swaps whose speed depends on them: one case for each entry."""


def swap_cases(names: Sequence[str] | None = None) -> list[Case]:
    """Returns the cases of some swaps.

    Args:
        names: Names of swaps; None: all known swaps.

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


def peer_cases(device: str = "cpu") -> list[Case]:
    """Returns the other implementations for a device whose packages are installed."""
    kind = torch.device(device).type
    known = [(name, peer) for name, peer in PEERS.items() if installed(peer) and kind in peer.devices]
    return [Case(name, "peer", peer.swap, peer.fill) for name, peer in known]


def to_json(case: Case, setting: Setting) -> dict[str, Any]:
    """Returns a case and its setting as plain values."""
    return {"case": asdict(case), "setting": asdict(setting)}


def from_json(values: Mapping[str, Any]) -> tuple[Case, Setting]:
    """Returns the case and the setting that :func:`to_json` was given."""
    setting = values["setting"]
    return Case(**values["case"]), Setting(**{**setting, "shape": Shape(**setting["shape"])})
