"""Several swaps in one: an output gate on softpick, a temperature on entmax.

At most one of them gives weights of its own. The others act around it, in the order of the list: windows intersect,
preparations and finishes follow one another, factors of scores and values multiply, biases add.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from attnswap.errors import ConfigError, require
from attnswap.swaps.base import Call, Feature, ModelInfo, Numbers, Observed, Pair, Parameter, Prepared, Swap, Terms
from attnswap.swaps.statistics import Root, Scan, Statistic, Sum

JOINT = "+"
"""Stands between the names of the swaps."""


@dataclass(frozen=True)
class Composed(Swap):
    """Swaps that act together on the same heads. Made by giving a list wherever one swap is taken.

    Their features and learned tensors carry the names of their swaps in front: ``output_gate_weight``.

    Attributes:
        parts: The swaps, at least two and each of another name.
    """

    parts: tuple[Swap, ...] = ()

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        require(len(names) > 1, f"a list of swaps must have at least two, not {len(names)}")
        require(len(set(names)) == len(names), f"a swap may be in a list once only: {', '.join(names)}")
        require(not any(isinstance(part, Composed) for part in self.parts), "a list of swaps holds no other list")
        own = [part.name for part in self.parts if part.stages & {"weights", "statistics"}]
        require(len(own) < 2, f"at most one swap of a list may have weights of its own, not {' and '.join(own)}")

    # --- what it needs ------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:  # type: ignore[override]
        """The names of the swaps."""
        return JOINT.join(part.name for part in self.parts)

    @property
    def paper(self) -> str:  # type: ignore[override]
        return "; ".join(part.paper for part in self.parts)

    @property
    def summary(self) -> str:  # type: ignore[override]
        return "; ".join(part.summary for part in self.parts)

    @property
    def row_sum(self) -> str:  # type: ignore[override]
        return self._weighing().row_sum

    @property
    def needs_n(self) -> bool:  # type: ignore[override]
        return any(part.needs_n for part in self.parts)

    @property
    def native_ramp(self) -> bool:  # type: ignore[override]
        return all(part.native_ramp for part in self.parts)

    @property
    def causal_only(self) -> bool:  # type: ignore[override]
        return any(part.causal_only for part in self.parts)

    @property
    def random(self) -> bool:  # type: ignore[override]
        return any(part.random for part in self.parts)

    @property
    def shifted(self) -> bool:  # type: ignore[override]
        return self._weighing().shifted

    @property
    def fixed_in_ramp(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(_long(part, name) for part in self.parts for name in part.fixed_in_ramp)

    @property
    def already_in(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset().union(*(part.already_in for part in self.parts))

    @property
    def exact_identity(self) -> bool:
        return all(part.exact_identity for part in self.parts)

    @property
    def needs_logsumexp(self) -> bool:
        return any(part.needs_logsumexp for part in self.parts)

    @property
    def stages(self) -> frozenset[str]:
        return frozenset().union(*(part.stages for part in self.parts))

    @property
    def weighing(self) -> tuple[Swap, dict[str, str]]:
        part = self._weighing()
        return part, {name: _long(part, name) for name in part.features()}

    def _weighing(self) -> Swap:
        return next((part for part in self.parts if part.stages & {"weights", "statistics"}), self.parts[0])

    def bind(self, info: ModelInfo) -> Self:
        return replace(self, parts=tuple(part.bind(info) for part in self.parts))

    def features(self) -> dict[str, Feature]:
        return {_long(part, name): x for part in self.parts for name, x in part.features().items()}

    def gate_parameters(self) -> dict[str, Parameter]:
        return {_long(part, name): x for part in self.parts for name, x in part.gate_parameters().items()}

    def gates(self, hidden: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in self.parts:
            own = {name: parameters[_long(part, name)] for name in part.gate_parameters()}
            found |= {_long(part, name): x for name, x in part.gates(hidden, own).items()} if own else {}
        return found

    @property
    def fit_powers(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys(power for part in self.parts for power in part.fit_powers))

    def fit(self, seen: Observed) -> tuple[dict[str, Tensor], float]:
        values: dict[str, Tensor] = {}
        squares = 0.0
        for part in self.parts:
            if part.fit_powers:
                found, error = part.fit(seen)
                values |= {_long(part, name): x for name, x in found.items()}
                squares += error**2
        return values, math.sqrt(squares)

    def regression(self, call: Call) -> Tensor | None:
        errors = [part.regression(_of(part, call)) for part in self.parts]
        given = [error for error in errors if error is not None]
        return sum(given[1:], start=given[0]) if given else None

    # --- the maths ----------------------------------------------------------------------------------------------

    @property
    def window(self) -> int | None:
        return min((part.window for part in self.parts if part.window is not None), default=None)

    def prepare(self, call: Call) -> Prepared:
        for part in self.parts:
            if "prepare" in part.stages:
                call = replace(call, **vars(part.prepare(_of(part, call))))
        return Prepared(call.query, call.key, call.value, call.scaling)

    def terms(self, call: Call) -> Terms:
        every = [part.terms(_of(part, call)) for part in self.parts if "terms" in part.stages]
        return Terms(
            query_scale=_joined([t.query_scale for t in every], lambda a, b: a * b),
            query_bias=_joined([t.query_bias for t in every], lambda a, b: a + b),
            key_bias=_joined([t.key_bias for t in every], lambda a, b: a + b),
            value_scale=_joined([t.value_scale for t in every], lambda a, b: a * b),
        )

    def pair_scale(self, pair: Pair, p: Numbers) -> Any:
        return _joined([part.pair_scale(pair, self._numbers(part, p)) for part in self.parts], lambda a, b: a * b)

    def pair_bias(self, pair: Pair, p: Numbers) -> Any:
        # Without a seed the noise of a part is left out, and the biases of the others are not.
        parts = [part for part in self.parts if not part.random or pair.uniform is not None]
        return _joined([part.pair_bias(pair, self._numbers(part, p)) for part in parts], lambda a, b: a + b)

    def distance_bias(self, call: Call) -> Tensor | None:
        tables = [part.distance_bias(_of(part, call)) for part in self.parts]
        return _joined(tables, _sum_of_tables)

    def statistics(self) -> Mapping[str, Statistic]:
        part = self._weighing()
        return {_long(part, name): self._lifted(part, kind) for name, kind in part.statistics().items()}

    def shift_floor(self, p: Numbers) -> Any:
        part = self._weighing()
        return part.shift_floor(self._numbers(part, p))

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        part = self._weighing()
        return part.weight(s, shift, self._numbers(part, p))

    def norm(self, s: Any, shift: Any, p: Numbers) -> Any:
        part = self._weighing()
        return part.norm(s, shift, self._numbers(part, p))

    def null(self, shift: Any, n: Any, p: Numbers) -> Any:
        part = self._weighing()
        return part.null(shift, n, self._numbers(part, p))

    def finish(self, out: Tensor, call: Call) -> Tensor:
        for part in self.parts:
            out = part.finish(out, _of(part, call))
        return out

    # --- plain values -------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as JSON-able values."""
        return {"name": self.name, "swaps": [part.to_dict() for part in self.parts]}

    def _numbers(self, part: Swap, p: Numbers) -> Numbers:
        """Returns the numbers as a part calls them."""
        given = vars(p)
        names = [*part.features(), *part.statistics()]
        own = {name: given[_long(part, name)] for name in names if _long(part, name) in given}
        return Numbers(**{name: given[name] for name in ("ramp", "n") if name in given}, **own)

    def _lifted(self, part: Swap, kind: Statistic) -> Statistic:
        """Returns a part's statistic as a function of the numbers of the whole."""

        def lift(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *arguments: function(*arguments[:-1], self._numbers(part, arguments[-1]))

        if isinstance(kind, Sum | Scan):
            return type(kind)(lift(kind.of))
        if isinstance(kind, Root):
            return Root(lift(kind.of), lift(kind.bracket), kind.target, lift(kind.power))
        return kind


def _long(part: Swap, name: str) -> str:
    return f"{part.name.replace('-', '_')}_{name}"


def _of(part: Swap, call: Call) -> Call:
    """Returns a call with the features as a part calls them."""
    return replace(call, features={name: call.features[_long(part, name)] for name in part.features()})


def _joined(values: Sequence[Any], join: Callable[[Any, Any], Any]) -> Any:
    given = [value for value in values if value is not None]
    if not given:
        return None
    total = given[0]
    for value in given[1:]:
        total = join(total, value)
    return total


def _sum_of_tables(a: Tensor, b: Tensor) -> Tensor:
    """Adds two tables of biases by distance; beyond the shorter one it is 0."""
    short, long = sorted((a, b), key=lambda table: table.shape[1])
    return long + torch.nn.functional.pad(short, (0, long.shape[1] - short.shape[1]))


def parts_of(values: Any) -> list[Any]:
    """Returns the swaps of a composed config in JSON.

    Raises:
        ConfigError: It is damaged.
    """
    swaps = values.get("swaps")
    if set(values) != {"name", "swaps"} or not isinstance(swaps, list):
        raise ConfigError(f'a composed swap has the keys "name" and "swaps" (a list), not {sorted(map(str, values))}')
    names = [part.get("name") if isinstance(part, Mapping) else part for part in swaps]
    require(values["name"] == JOINT.join(map(str, names)), f"{values['name']!r} is not the name of the swaps {names}")
    return swaps
