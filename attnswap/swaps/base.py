"""What a swap is: a frozen config, the features and parameters it needs, and its maths written once.

A call goes through a pipeline of stages; what a swap leaves out is softmax's. It weighs values by

    s_ij = a_i * A_ij * cap(scaling * q_i.k_j) + b_i + c_j + B_ij
    O_i  = (1 / Z_i) * sum_j w(s_ij; r_i) u_j v_j,    Z_i = z0_i + sum_j d(s_ij; r_i)

with the sums over the keys visible to query i. The stages, in this order:

- ``window`` narrows what is visible, and :meth:`Swap.prepare` maps query, key, value and scaling.
- :meth:`Swap.terms` gives a, b, c and u; the pair stage (:meth:`Swap.pair_scale`, :meth:`Swap.pair_bias`,
  :meth:`Swap.distance_bias`) gives A and B.
- :meth:`Swap.statistics` names numbers r_i of the whole row of scores.
- :meth:`Swap.weight`, :meth:`Swap.norm` and :meth:`Swap.null` are w, d and z0. They also see a shift m_i of the row,
  its largest score unless the swap says otherwise, relative to which nothing overflows; the result must not depend on
  it.
- :meth:`Swap.finish` maps the output O.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal, Self, get_type_hints

import torch
from torch import Tensor

from attnswap.errors import ConfigError, nearest, require
from attnswap.hints import fits, spell
from attnswap.imports import after_import
from attnswap.swaps import expression as fn
from attnswap.swaps.statistics import Statistic

LONE = 1e3
"""Added to the score of the only key of a row, it is above any other number there."""


@dataclass(frozen=True)
class ModelInfo:
    """What a swap may know of the layer it goes into.

    Attributes:
        heads: Query heads of the layer.
        kv_heads: Key/value heads of the layer.
        hidden: Width of the hidden states that enter the attention module.
        max_positions: The longest trained context in tokens (``max_position_embeddings``), where the config has it.
        value_dim: Width of a head's values, where it is known.
        layer: Index of the layer.
        layers: Number of layers of the model.
    """

    heads: int
    kv_heads: int
    hidden: int
    max_positions: int | None = None
    value_dim: int | None = None
    layer: int = 0
    layers: int = 1


@dataclass(frozen=True)
class Parameter:
    """A learned tensor that feeds a gate: initialised to ``initial`` plus normal noise of deviation ``std``.

    Attributes:
        shape: Sizes, by name where the model has them: ``"heads"`` (the heads swapped), ``"kv_heads"``, ``"hidden"``,
            ``"value_dim"``.
        initial: Mean of the initial values.
        std: Standard deviation of the initial values.
    """

    shape: tuple[Literal["heads", "kv_heads", "hidden", "value_dim"] | int, ...]
    initial: float = 0.0
    std: float = 0.0


@dataclass(frozen=True)
class Feature:
    """A tensor the maths needs at call time.

    Attributes:
        per: ``"head"``: (heads,), a learned parameter; ``"query"``: (batch, heads, queries), in the order of the
            queries; ``"key"``: (batch, heads, keys), over all keys, cached ones included.
        heads: Whether there is one value per query head or per key/value head.
        initial: The value of an omitted per-head feature, and the start of the learned parameter: one number, or one
            for each head of the layer; None: no such value exists without a model, so it must be given.
        std: Deviation of the learned parameter's start around ``initial``.
        padding: What a padded key holds (per-key features).
        what: One line for the tables.
        width: The size of one more dimension at the end, ``"value_dim"`` for the width of the values; None: there is
            none. Features with a width are read by prepare, terms, distance_bias and finish, which see whole tensors.
        drawn: The range of values at which tests and benchmarks try the maths; None: about one half beside the start
            (per head), and values of either sign near 1 (per token).
        summed: Whether the maths adds the values up over the keys, as decays: ``drawn`` is then the range of a row's
            sum.
        rounded: Whether the maths rounds what depends on it to fp32 in any precision, which hides small changes.
    """

    per: Literal["head", "query", "key"]
    heads: Literal["query", "kv"] = "query"
    initial: float | tuple[float, ...] | None = None
    std: float = 0.0
    padding: float = 0.0
    what: str = ""
    width: Literal["value_dim"] | int | None = None
    drawn: tuple[float, float] | None = None
    summed: bool = False
    rounded: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError for initial values per head that have a deviation as well."""
        require(not (isinstance(self.initial, tuple) and self.std), "a feature's start per head has no deviation")

    def start(self, heads: Sequence[int]) -> Tensor:
        """Returns the initial values of some heads of the layer, fp64, shape (heads,), or (heads, 1) with a width."""
        initial = self.initial or 0.0
        values = torch.tensor(
            [initial[h] if isinstance(initial, tuple) else initial for h in heads], dtype=torch.float64
        )
        return values if self.width is None else values[:, None]

    def shape(self, batch: int, heads: int, queries: int, keys: int, value_dim: int) -> tuple[int, ...]:
        """Returns the shape of the tensor, from the sizes of a call and the number of heads that it is for."""
        sizes = {"head": (heads,), "query": (batch, heads, queries), "key": (batch, heads, keys)}[self.per]
        if self.width is None:
            return sizes
        return (*sizes, value_dim if self.width == "value_dim" else self.width)


@dataclass(frozen=True)
class Observed:
    """What a layer of the unswapped model did with some text, for :meth:`Swap.fit`. All fp32.

    Attributes:
        hidden: What entered the attention module, shape (tokens, hidden).
        log_sums: The logsumexp of a multiple of each row's scores, shape (heads, tokens), by the multiples that
            :attr:`Swap.fit_powers` names; that of 1 is softmax's normalizer.
        n: Keys visible to each token, shape (tokens,).
    """

    hidden: Tensor
    log_sums: Mapping[float, Tensor]
    n: Tensor


@dataclass(frozen=True)
class Call:
    """What the stages around the scores see of one attention call.

    All numbers share one dtype (fp32, or fp64 in the oracle); query, key and value have that of the model.

    Attributes:
        n: Keys visible to each query, as a float tensor of shape (batch or 1, heads or 1, queries).
        features: The declared features; per-head ones come as (heads, 1).
        ramp: lambda: 1.0, or a tensor that broadcasts like ``n``.
        key_index: Index of each query's own key among the keys, shape (queries,).
        query: Shape (batch, heads, queries, head_dim), before :meth:`Swap.prepare`.
        key: Shape (batch, kv heads, keys, head_dim), likewise.
        value: Shape (batch, kv heads, keys, value_dim), likewise.
        scaling: Multiplies the dot products, likewise.
        logsumexp: Of each query's scores, shape (batch, heads, queries), without gradients; for swaps that declare
            :attr:`Swap.needs_logsumexp`, while lambda is below 1.
    """

    n: Tensor
    features: Mapping[str, Tensor]
    ramp: Any
    key_index: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    logsumexp: Tensor | None = None


@dataclass(frozen=True)
class Prepared:
    """What :meth:`Swap.prepare` returns; widths may change, and the dtype may be raised to fp32.

    Attributes:
        query: Shape (batch, heads, queries, any width).
        key: Shape (batch, kv heads, keys, the same width).
        value: Shape (batch, kv heads, keys, any width).
        scaling: Multiplies the dot products.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


class Pair:
    """What :meth:`Swap.pair_scale` and :meth:`Swap.pair_bias` see of a query and a key: tensors, or expressions.

    Attributes:
        distance: How many tokens the key is before the query, padding not counted.
        uniform: A random number in (0, 1), the same whenever the same call is computed; for swaps with
            :attr:`Swap.random`.
    """

    def __init__(self, distance: Any, uniform: Any = None) -> None:
        self.distance, self.uniform = distance, uniform


@dataclass(frozen=True)
class Terms:
    """The parts of the score a swap changes; None means 1 (scales) or 0 (biases).

    Attributes:
        query_scale: a_i, shape (batch or 1, heads, queries); multiplies the capped content score only.
        query_bias: b_i, same shape; softmax does not see it, elementwise swaps do.
        key_bias: c_j, shape (batch, heads, keys); fp64 where differences of large sums matter.
        value_scale: u_j, shape (batch, kv heads, keys).
    """

    query_scale: Tensor | None = None
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_scale: Tensor | None = None


@dataclass(frozen=True)
class Traits:
    """The declared and derived properties from which dispatch, tables and tests are made.

    Attributes:
        row_sum: What the weights of a row add up to.
        exact_identity: The start can leave the model exactly as it was.
        learned: Names of the learned tensors.
        needs_hidden: Gates read the hidden states.
        needs_n: The number of visible keys enters the maths.
        cache_state: Per-token values must live beside the KV cache.
        per_kv_head: One value serves all query heads that share a key/value head.
        route: ``"folded"`` runs on the stock softmax kernel, ``"elementwise"`` has weights or scores of its own, one
            pair of tokens at a time, ``"row"`` has weights that depend on statistics of the whole row.
        native_ramp: lambda acts inside the maths instead of blending two outputs.
        paper: Title and arXiv id.
    """

    row_sum: str
    exact_identity: bool
    learned: tuple[str, ...]
    needs_hidden: bool
    needs_n: bool
    cache_state: bool
    per_kv_head: bool
    route: str
    native_ramp: bool
    paper: str


class Numbers:
    """What the maths reads, as attributes.

    lambda as ``ramp``, the per-head features, and for each row the number ``n`` of its visible keys and its statistics.

    A plain class, since torch.compile does not trace ``types.SimpleNamespace``.
    """

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """Names what is missing (and tells type checkers that any name may be there)."""
        raise AttributeError(
            f'the maths of a swap reads "ramp", "n", its per-head features and its statistics, not "{name}"'
        )

    def plus(self, **values: Any) -> "Numbers":
        """Returns a copy with more numbers."""
        return Numbers(**vars(self), **values)


STAGES: dict[str, tuple[str, ...]] = {
    "window": ("window",),
    "prepare": ("prepare",),
    "terms": ("terms",),
    "pair": ("pair_scale", "pair_bias", "distance_bias"),
    "statistics": ("statistics",),
    "weights": ("weight", "norm", "null", "shift_floor"),
    "finish": ("finish",),
}
"""The stages of a call, and the members of a swap that override them.

Every backend names the stages it computes, and refuses swaps with others.
"""
MATHS = ("window", "prepare", "terms", "pair_scale", "pair_bias", "distance_bias", "weight", "norm", "null", "finish")
"""The members without any of which a swap is softmax: a shift or a statistic alone changes no weight."""

RETIRED = {
    "threshold": "return a Root from statistics()",
    "bracket": "return a Root from statistics()",
    "mass_power": "return a Root from statistics()",
    "shift_gradient": "return a Max from statistics()",
}
"""Members that swaps had before stages, and what says the same now: they would be passed over without a word."""

REGISTRY: dict[str, type["Swap"]] = {}
"""Every swap class by name; a class enters when its file is imported."""


@dataclass(frozen=True)
class Swap:
    """Base class of every swap: a frozen, JSON-able config with the maths as pure methods.

    A concrete class is a frozen dataclass that sets ``name`` and is registered by being defined.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    row_sum: ClassVar[Literal["one", "at most one", "free", "signed"]] = "one"
    needs_n: ClassVar[bool] = False
    native_ramp: ClassVar[bool] = False
    causal_only: ClassVar[bool] = False
    """Whether the maths means nothing for a query that sees later keys."""
    shifted: ClassVar[bool] = True
    """Whether scores are taken relative to the row's largest one; if not, the shift is 0."""
    random: ClassVar[bool] = False
    """Whether :meth:`pair_bias` reads random numbers. Without a seed, as in evaluation, it is then left out."""
    fixed_in_ramp: ClassVar[tuple[str, ...]] = ()
    """Per-head features that do not learn before lambda is 1."""

    overridden: ClassVar[frozenset[str]] = frozenset()
    """The stages that the class overrides."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.overridden = frozenset(
            stage for stage, members in STAGES.items() if any(getattr(cls, m) is not getattr(Swap, m) for m in members)
        )
        for member in RETIRED.keys() & cls.__dict__.keys():
            raise ConfigError(f"{cls.__qualname__} defines {member}, which no swap has any more: {RETIRED[member]}")
        if isinstance(cls.__dict__.get("name"), str):
            if cls.name != "softmax" and all(getattr(cls, method) is getattr(Swap, method) for method in MATHS):
                raise ConfigError(
                    f'the swap "{cls.name}" ({cls.__qualname__}) would compute softmax: override at least one of '
                    f"{', '.join(MATHS)} (what else it defines only feeds these), or give it no name"
                )
            known = REGISTRY.get(cls.name)
            # The same class again is a notebook cell or `python -m` on its file; anything else is a clash.
            modules = {cls.__module__, known.__module__} - {"__main__"} if known else set()
            if known is not None and (known.__qualname__ != cls.__qualname__ or len(modules) > 1):
                raise ConfigError(f'two swaps are named "{cls.name}": {known.__qualname__} and {cls.__qualname__}')
            REGISTRY[cls.name] = cls

    def __post_init__(self) -> None:
        """Checks every option against its type hint; an override starts with ``super().__post_init__()``."""
        for name in _options(type(self)):
            wanted = _wanted(type(self), name, getattr(self, name))
            if wanted is not None:
                raise ConfigError(f"{self.name}: {name} must be {wanted}, not {getattr(self, name)!r}")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        """Returns the configs that tests try: one for each mode of the maths, the default among them."""
        return (cls(),)

    # --- what it needs ------------------------------------------------------------------------------------------

    version: ClassVar[int] = 1
    """Of the maths: raised where the same options and tensors would give other outputs than before."""
    built_in: ClassVar[str] = ""
    """A regular expression: attention modules whose code matches compute this swap themselves, and refuse it."""

    @property
    def exact_identity(self) -> bool:
        """Whether this config starts by leaving every output as it was."""
        return False

    def bind(self, info: ModelInfo) -> Self:
        """Returns the config with everything that depends on the model filled in."""
        return self

    def features(self) -> dict[str, Feature]:
        """Returns the features the maths takes, by name."""
        return {}

    def gate_parameters(self) -> dict[str, Parameter]:
        """Returns the learned tensors that :meth:`gates` reads, by name."""
        return {}

    def gates(self, hidden: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Computes the per-query and per-key features.

        Args:
            hidden: What enters the attention module, fp32, shape (batch, tokens, hidden).
            parameters: The tensors of :meth:`gate_parameters`, fp32.

        Returns:
            Features of shape (batch, heads, tokens).
        """
        return {}

    @property
    def needs_logsumexp(self) -> bool:
        """Whether the ramp begins from softmax's own normalizer, which costs another pass over the scores."""
        return False

    @property
    def fit_powers(self) -> tuple[float, ...]:
        """The powers of e^score whose sums over a row :meth:`fit` reads; none: there is nothing to fit."""
        return ()

    def fit(self, seen: Observed) -> tuple[dict[str, Tensor], float]:
        """Returns a start of learned tensors found by least squares; see ``attnswap.training.fit``.

        Args:
            seen: Text through one layer.

        Returns:
            Values by the names of features and gate parameters (those left out stay at their start), and the root
            mean square of what they miss.
        """
        raise NotImplementedError(f"{self.name} names fit_powers, so it must define fit")

    def regression(self, call: Call) -> Tensor | None:
        """Returns how far a prediction is from what the unswapped layer has at hand, or None if nothing is predicted.

        Args:
            call: With ``logsumexp``.

        Returns:
            A squared error for each query, shape (batch, heads, queries).
        """
        return None

    # --- the maths ----------------------------------------------------------------------------------------------

    @property
    def window(self) -> int | None:
        """How many keys a query sees at most, its own included and padding not counted; None: all of them."""
        return None

    def prepare(self, call: Call) -> Prepared:
        """Returns query, key, value and scaling as the scores and sums shall read them, after RoPE and the KV cache."""
        return Prepared(call.query, call.key, call.value, call.scaling)

    def terms(self, call: Call) -> Terms:
        """Returns what changes in the scores and values."""
        return Terms()

    def pair_scale(self, pair: Pair, p: Numbers) -> Any:
        """Returns A_ij, the factor of the content score of a query and a key; None: 1."""
        return None

    def pair_bias(self, pair: Pair, p: Numbers) -> Any:
        """Returns B_ij, which is added to the score of a query and a key; None: 0."""
        return None

    def distance_bias(self, call: Call) -> Tensor | None:
        """Returns what is added to scores by distance, shape (heads, distances), 0 for larger ones; None: nothing."""
        return None

    def statistics(self) -> Mapping[str, Statistic]:
        """Returns the statistics of a row that the maths reads, by name and in the order of their computation."""
        return {}

    def shift_floor(self, p: Numbers) -> Any:
        """Returns the smallest reference shift a row may have (a number or per-head value), None for no floor."""
        return None

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        """The unnormalised weight of a visible key with score ``s``."""
        return fn.exp(s - shift)

    def norm(self, s: Any, shift: Any, p: Numbers) -> Any:
        """What a visible key adds to the denominator; default: its weight."""
        return self.weight(s, shift, p)

    def null(self, shift: Any, n: Any, p: Numbers) -> Any:
        """What the denominator holds before any key."""
        return 0.0

    def finish(self, out: Tensor, call: Call) -> Tensor:
        """Maps the heads' outputs.

        Args:
            out: Shape (batch, heads, queries, width of the prepared values), in the dtype of ``call.n``.
            call: The call.

        Returns:
            Shape (batch, heads, queries, width of the model's values).
        """
        return out

    # --- derived ------------------------------------------------------------------------------------------------

    @property
    def stages(self) -> frozenset[str]:
        """The names of :data:`STAGES` in which this config differs from softmax."""
        idle = {"window"} if self.window is None else set()
        return self.overridden - (idle if self.statistics() else idle | {"statistics"})

    @property
    def softmax_weighted(self) -> bool:
        """Whether the weights are softmax's of some scores, so that a stock kernel can serve."""
        return not self.stages & {"statistics", "weights"}

    def versions(self) -> dict[str, int]:
        """Returns the version of the maths of each swap in this config, by name."""
        return {self.name: self.version}

    @property
    def weighing(self) -> tuple["Swap", Mapping[str, str]]:
        """The swap whose weights are computed, and what its features are called here."""
        return self, {name: name for name in self.features()}

    @property
    def _route(self) -> str:
        if "statistics" in self.stages:
            return "row"
        return "elementwise" if self.stages & {"weights", "pair"} else "folded"

    @property
    def traits(self) -> Traits:
        """The properties of this config."""
        features = self.features()
        learned = [k for k, f in features.items() if f.per == "head"] + list(self.gate_parameters())
        return Traits(
            row_sum=self.row_sum,
            exact_identity=self.exact_identity,
            learned=tuple(learned),
            needs_hidden=any(f.per != "head" for f in features.values()),
            needs_n=self.needs_n,
            cache_state=any(f.per == "key" for f in features.values()),
            per_kv_head=any(f.heads == "kv" for f in features.values()),
            route=self._route,
            native_ramp=self.native_ramp,
            paper=self.paper,
        )

    def check_shared(self, ramps: Sequence[float], groups: int) -> None:
        """Raises ConfigError if heads that share one of this swap's values ask for different ramps.

        Args:
            ramps: lambda of each query head, in the order of the heads.
            groups: Query heads per key/value head.
        """
        parts = [ramps[i : i + groups] for i in range(0, len(ramps), groups)]
        require(
            not self.traits.per_kv_head or all(len(set(part)) == 1 for part in parts),
            f'"{self.name}" keeps one value per key/value head: give the {groups} query heads that share one the same '
            f"ramp, not {list(ramps)}",
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as JSON-able values, with its name."""
        return {"name": self.name, **self.options()}

    def options(self) -> dict[str, Any]:
        """Returns the values of the config's fields, by name."""
        return {name: getattr(self, name) for name in _options(type(self))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a config from plain values.

        Raises:
            ConfigError: A key is unknown (the nearest valid one is named) or a value is not allowed.
        """
        known = _options(cls)
        for key in values:
            if key not in known:
                raise ConfigError(
                    f'swap "{cls.name}" has no option "{key}".{nearest(str(key), known)} '
                    f"Options: {', '.join(known) or 'none'}"
                )
        return cls(**values)


def _options(cls: type[Swap]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _wanted(cls: type[Swap], name: str, value: Any) -> str | None:
    """Returns the type of an option in words if a value does not have it, else None."""
    hint = get_type_hints(cls)[name]
    return None if fits(value, hint) else spell(hint)


def resolve_init(init: str | None, identity_allowed: bool, name: str) -> str:
    """Returns the start a config uses: ``"identity"`` by default where the swap allows it, else ``"paper"``."""
    require(
        init != "identity" or identity_allowed,
        f'{name}: this form has no identity start; use init="paper" and a ramp from 0 instead',
    )
    return init or ("identity" if identity_allowed else "paper")


def _mark_constant(_dynamo: ModuleType) -> None:
    """Marks the options of a swap as constants for torch.compile."""
    for function in (_options, _wanted):
        torch.compiler.assume_constant_result(function)


after_import("torch._dynamo", _mark_constant)  # the mark needs this module, which takes longer to import than torch
