"""The stages of a call: on every backend that takes it, a swap that overrides one is not softmax, and equals dense.

Each swap here overrides one stage alone, with something that is not trivial.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnswap
from attnswap.attention.dispatch import AROUND, BACKENDS, compute
from attnswap.bench.causal import causal_problem
from attnswap.errors import ConfigError, UnsupportedModelError
from attnswap.swaps import Swap
from attnswap.swaps import expression as fn
from attnswap.swaps.base import STAGES, Call, Feature, Numbers, Pair, Prepared, Terms
from attnswap.swaps.softmax import Softmax
from attnswap.swaps.statistics import Max, Min, Rank, Root, Scan, Statistic, Sum
from tests.helpers.calls import Case, Inputs, backends_of, compare, draw, run, short_blocks, weights


class Window(Swap):
    """Three keys."""

    window: ClassVar[int] = 3  # type: ignore[assignment]


class Prepare(Swap):
    """Other queries, keys, values and scaling."""

    def prepare(self, call: Call) -> Prepared:
        return Prepared(call.query.tanh(), call.key * 2, call.value.exp(), 0.3)


class QueryScale(Swap):
    def terms(self, call: Call) -> Terms:
        return Terms(query_scale=1 + call.n.sqrt())


class PairScale(Swap):
    def pair_scale(self, pair: Pair, p: Numbers) -> Any:
        return 1.0 / (1.0 + fn.abs(pair.distance))


class PairBias(Swap):
    def pair_bias(self, pair: Pair, p: Numbers) -> Any:
        return -0.3 * fn.abs(pair.distance)


class DistanceBias(Swap):
    def features(self) -> dict[str, Feature]:
        return {"table": Feature("head", initial=0.5, width=3)}

    def distance_bias(self, call: Call) -> Tensor | None:
        return call.features["table"] * torch.arange(1.0, 4.0, dtype=call.n.dtype)


class Weight(Swap):
    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        return fn.exp(s - shift) * fn.sigmoid(s)


class Norm(Swap):
    def norm(self, s: Any, shift: Any, p: Numbers) -> Any:
        return 2.0 * fn.exp(s - shift)


class Null(Swap):
    def null(self, shift: Any, n: Any, p: Numbers) -> Any:
        return n * fn.exp(-shift)


class Finish(Swap):
    def finish(self, out: Tensor, call: Call) -> Tensor:
        return out.square() + call.n[..., None]


class StatisticSum(Swap):
    def statistics(self) -> dict[str, Statistic]:
        return {"total": Sum(lambda s, shift, p: fn.exp(s - shift))}

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        return fn.relu(fn.exp(s - shift) / p.total - 0.1)


class StatisticMax(StatisticSum):
    def statistics(self) -> dict[str, Statistic]:
        return {"top": Max()}

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        return fn.exp((s - p.top) * p.top)


class StatisticMin(StatisticSum):
    def statistics(self) -> dict[str, Statistic]:
        return {"least": Min()}

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        return 0.1 + s - p.least


class StatisticRoot(StatisticSum):
    """The sum is not one, and an earlier statistic is read."""

    def statistics(self) -> dict[str, Statistic]:
        cut = Root(self._above, lambda top, n, p: (top - 4.0 - p.top * 0.0, top + fn.log(n) + 4.0), target=0.75)
        return {"top": Max(), "cut": cut}

    def _above(self, s: Any, r: Any, p: Numbers) -> Any:
        above = fn.relu(1.0 + (s - r) / 3.0)
        return above * above * above

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        return self._above(s, p.cut, p) * fn.exp(0.1 * p.top)


class StatisticRank(StatisticSum):
    def statistics(self) -> dict[str, Statistic]:
        return {"third": Rank(3)}

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        return fn.where(p.third > s, 0.5, 1.0) * fn.exp(s - shift)


class StatisticScan(StatisticSum):
    def statistics(self) -> dict[str, Statistic]:
        return {"later": Scan(lambda s, shift, p: fn.softplus(s))}

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        return fn.sigmoid(s) * fn.exp(-p.later)


class Count(Swap):
    """n among the numbers."""

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        return fn.exp(s - shift) * (1.0 + fn.sigmoid(s) * p.n)


class Unrelated(Swap):
    """Weights that are not relative to the shift, though the class says so."""

    def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
        return fn.softplus(s)


EACH = [
    *(Window, Prepare, QueryScale, PairScale, PairBias, DistanceBias, Weight, Norm, Null, Finish, Count, Unrelated),
    *(StatisticSum, StatisticMax, StatisticMin, StatisticRoot, StatisticRank, StatisticScan),
]

for _kind in EACH:
    _kind.name = _kind.__name__  # after its definition, so that it is not registered


def serving(swap: Swap, inputs: Inputs) -> list[str]:
    """The backends that take a call."""
    found = []
    for name in BACKENDS:
        try:
            run(swap, inputs, name)
        except ConfigError as error:
            assert name in str(error)
        else:
            found.append(name)
    return found


@pytest.mark.parametrize("mask", ["causal", "none", "bool", "padding"])
@pytest.mark.parametrize("kind", EACH, ids=lambda kind: kind.__name__)
def test_every_backend_that_takes_a_stage_computes_it(kind: type[Swap], mask: str):
    swap = kind()
    inputs = draw(swap, Case(queries=7, keys=7, mask=mask, seed=3))
    wanted = run(swap, inputs)
    assert (wanted["output"] - run(Softmax(), softmax_inputs(inputs))["output"]).abs().max() > 1e-3
    found = serving(swap, inputs)
    assert {"dense", "chunked"} <= set(found)
    with short_blocks():
        for name in found:
            compare(run(swap, inputs, name), wanted, 1e-11, 1e-10, f"{kind.__name__} {name}")


def softmax_inputs(inputs: Inputs) -> Inputs:
    plain = copy.copy(inputs)
    plain.features = {}
    return plain


@pytest.mark.parametrize("kind", EACH, ids=lambda kind: kind.__name__)
def test_gradients_of_every_stage(kind: type[Swap]):
    swap = kind()
    inputs = draw(swap, Case(batch=1, kv_heads=1, groups=2, queries=4, keys=4, width=3, value_width=2, seed=5))
    names = ["query", "key", "value", *inputs.features]
    leaves = [{**inputs.tensors, **inputs.features}[name].requires_grad_() for name in names]

    def call(*values: Tensor) -> Tensor:
        query, key, value, *features = values
        given = dict(zip(inputs.features, features, strict=True))
        return attnswap.attention(query, key, value, swap, is_causal=True, enable_gqa=True, backend="dense", **given)

    assert torch.autograd.gradcheck(call, leaves)


def test_stages_are_read_off_the_class():
    assert Softmax().stages == frozenset()
    assert {stage: kind().stages for stage, kind in (("window", Window), ("finish", Finish), ("pair", PairBias))} == {
        stage: {stage} for stage in ("window", "finish", "pair")
    }
    assert StatisticSum().stages == {"statistics", "weights"}
    every = frozenset().union(*(kind().stages for kind in EACH))
    assert every == set(STAGES), "a stage has no swap here"


def test_every_member_of_the_maths_is_in_a_stage():
    """A new hook of the base class that no stage names would be passed over by every backend."""
    known = {member for members in STAGES.values() for member in members}
    around = "exact_identity bind features gate_parameters gates fit fit_powers regression needs_logsumexp stages"
    around += " softmax_weighted weighing traits check_shared to_dict options from_dict versions examples"
    public = {name for name, x in vars(Swap).items() if callable(x) or isinstance(x, property | classmethod)}
    assert {name for name in public if not name.startswith("_")} == known | set(around.split())


def test_what_a_backend_does_not_know_it_refuses():
    for kind in EACH:
        swap = kind()
        for name, backend in BACKENDS.items():
            unknown = swap.stages - backend.stages - AROUND
            if unknown:
                with pytest.raises(ConfigError, match=f'"{name}" cannot compute .*stage'):
                    run(swap, draw(swap, Case()), name)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Count, "depend on n"), (Unrelated, "not relative to the shift"), (StatisticScan, "the statistics of")],
)
def test_maths_that_kernels_would_get_wrong_is_refused(kind: type[Swap], reason: str):
    with pytest.raises(ConfigError, match=reason):
        run(kind(), draw(kind(), Case()), "native")


def test_plain_torch_in_the_maths_is_refused_by_kernels():
    class Direct(Swap):
        def weight(self, s: Any, shift: Any, p: Numbers) -> Any:
            return torch.exp(s - shift) * torch.special.erfc(s)

    swap = Direct()
    swap.__class__.name = "direct"
    inputs = draw(swap, Case())
    assert run(swap, inputs)["output"].isfinite().all()
    with pytest.raises(ConfigError, match=r"attnswap\.swaps\.expression"):
        run(swap, inputs, "native")


# --- the stages around the scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("holes", [[], [0, 1], [2, 5]])
def test_a_window_counts_tokens(holes: list[int]):
    """With padding anywhere in a row the window reaches as far back in the text as without."""
    real = [i for i in range(10) if i not in holes]
    visible = torch.zeros(10, dtype=torch.bool).index_fill(0, torch.tensor(real), True)
    mask = visible[None] & torch.ones(10, 10, dtype=torch.bool).tril()
    query = torch.randn(1, 1, 10, 4, dtype=torch.float64)
    found = attnswap.attention(query, query, query, Window(), attn_mask=mask[None, None])
    for place, i in enumerate(real):
        keys = real[max(0, place - 2) : place + 1]
        row = (query[0, 0, keys] @ query[0, 0, i] * 0.5).softmax(0) @ query[0, 0, keys]
        assert (found[0, 0, i] - row).abs().max() < 1e-12


def test_a_window_narrows_n():
    seen: list[Call] = []

    class Seen(Window):
        def terms(self, call: Call) -> Terms:
            seen.append(call)
            return Terms()

    query = torch.randn(1, 1, 6, 4)
    attnswap.attention(query, query, query, Seen(), is_causal=True, backend="dense")
    assert seen[0].n.flatten().tolist() == [1, 2, 3, 3, 3, 3]


def test_preparation_may_change_widths():
    """Values that get a column of ones return the sum of the weights in it."""

    class Wider(Prepare):
        def prepare(self, call: Call) -> Prepared:
            value = torch.cat([call.value, torch.ones_like(call.value[..., :1])], -1)
            return Prepared(call.query, call.key, value, call.scaling)

        def finish(self, out: Tensor, call: Call) -> Tensor:
            return out[..., :-1] + out[..., -1:]

    inputs = draw(Wider(), Case(mask="causal"))
    plain = run(Softmax(), inputs)["output"]
    for name in backends_of(Wider()):
        assert (run(Wider(), inputs, name)["output"] - plain - 1).abs().max() < 1e-12


def test_the_weights_of_a_call():
    query, key = torch.randn(1, 2, 5, 4), torch.randn(1, 1, 5, 4)
    found = attnswap.attention(query, key, key, "softpick", is_causal=True, enable_gqa=True)
    weights_of = attnswap.attention_weights(query, key, key, "softpick", is_causal=True)
    assert torch.allclose(weights_of @ key.repeat_interleave(2, 1), found, atol=1e-6)


# --- sinks and statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [StatisticMin, StatisticRank, StatisticScan])
def test_statistics_of_keys_alone_are_refused_with_sinks(kind: type[Swap]):
    query = torch.randn(1, 2, 5, 4)
    problem = causal_problem(Softmax(), query, query, query, {})
    compute(replace(problem, swap=kind()), lambda: query)
    with pytest.raises(UnsupportedModelError, match="model with sinks"):
        compute(replace(problem, swap=kind(), sinks=torch.zeros(2)), lambda: query)


ROW_OF: dict[type[Swap], Callable[[Tensor], Tensor]] = {
    StatisticSum: lambda s: (s.softmax(0) - 0.1).relu(),
    StatisticMax: lambda s: ((s - s.max()) * s.max()).exp(),
    StatisticMin: lambda s: 0.1 + s - s.min(),
    StatisticRank: lambda s: torch.where(s < s.sort().values[max(0, len(s) - 3)], 0.5, 1.0) * (s - s.max()).exp(),
    StatisticScan: lambda s: torch.stack([s[j].sigmoid() * (1 - s[j + 1 :].sigmoid()).prod() for j in range(len(s))]),
}


@pytest.mark.parametrize("kind", ROW_OF, ids=lambda kind: kind.__name__)
def test_statistics_row_by_row(kind: type[Swap]):
    inputs = draw(kind(), Case(batch=1, kv_heads=1, groups=1, queries=8, keys=8, mask="causal"))
    found = weights(kind(), inputs)[0, 0]
    query, key, _ = (x[0, 0] for x in inputs.tensors.values())
    for i in range(8):
        row = ROW_OF[kind](key[: i + 1] @ query[i] / 2)
        assert (found[i, : i + 1] - row / row.sum()).abs().max() < 1e-12


def test_a_root_meets_its_target():
    swap = StatisticRoot()
    inputs = draw(swap, Case(batch=1, kv_heads=1, groups=1, queries=8, keys=8, mask="causal"))
    query, key, _ = (x[0, 0] for x in inputs.tensors.values())
    found = weights(swap, inputs)[0, 0]
    for i in range(8):
        s = key[: i + 1] @ query[i] / 2
        low, high = s.max() - 4, s.max() + 8
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if (1 + (s - middle) / 3).relu().pow(3).sum() > 0.75 else (low, middle)
        row = (1 + (s - low) / 3).relu().pow(3)
        assert (found[i, : i + 1] - row / row.sum()).abs().max() < 1e-9


# --- LSSAR at the power of the paper's long contexts ------------------------------------------------------------------


@pytest.mark.parametrize("n", [5, 400])
def test_high_powers_neither_overflow_nor_vanish(n: int):
    """x^15 overflows fp32 from 369 on, which a row of 400 keys reaches; the published eps would take whole rows."""
    generator = torch.Generator().manual_seed(n)
    query, key, value = (torch.randn(1, 1, n, 64, generator=generator, dtype=torch.float64) for _ in range(3))
    key[:, :, 0] = query[:, :, -1]  # one key that fits the last query
    swap = attnswap.LSSA(power=15.0)
    found = attnswap.attention_weights(query.float(), key.float(), value.float(), swap, is_causal=True)
    a = torch.nn.functional.softplus(
        torch.nn.functional.cosine_similarity(query[0, 0, :, None], key[0, 0, None], dim=-1)
        * torch.arange(1.0, n + 1, dtype=torch.float64).log()[:, None]
        * torch.tensor(64.0).log()
    ).tril()
    visible = torch.arange(1.0, n + 1, dtype=torch.float64)[:, None]
    b = (visible * a / a.sum(-1, keepdim=True) - (visible > 3).double()).relu().tril().pow(15)
    wanted = b / b.sum(-1, keepdim=True)
    assert (found[0, 0].double() - wanted).abs().max() < 1e-3
    assert ((found.sum(-1) - 1).abs() < 1e-5).all()
