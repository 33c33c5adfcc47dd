"""Lists of swaps: what each contributes, what is refused, and the contract of every swap."""

import copy
from collections.abc import Callable

import pytest
import torch

import attnswap
from attnswap.errors import ConfigError
from attnswap.swaps import Swap, resolve
from attnswap.swaps.base import Observed
from attnswap.swaps.composed import Composed
from tests.helpers.calls import Case, backends_of, bound, compare, draw, run
from tests.helpers.contract import CHECKS, check_ids

LISTS = [
    ["sigmoid", "output-gate"],
    ["forgetting-gate", "output-gate"],
    [attnswap.Entmax(alpha="learned"), "ssmax", attnswap.OutputGate(per="element", start=0.8)],
    [attnswap.StickBreaking(), "ssmax"],
    [attnswap.ElasticSoftmax(start=-0.5, distances=3), "scale-invariant"],
]


@pytest.mark.parametrize("swap", [resolve(parts) for parts in LISTS], ids=lambda swap: swap.name)
@pytest.mark.parametrize("check", CHECKS, ids=check_ids)
def test_contract(swap: Swap, check: Callable[[Swap], None]):
    check(swap)


def test_a_gate_on_softpick_is_softpick_times_the_gate():
    case = Case(mask="causal", seed=3)
    both = bound(resolve("softpick+output-gate"), case)
    inputs = draw(both, case)
    alone = copy.copy(inputs)
    alone.features = {}
    wanted = run(attnswap.Softpick(), alone)["output"] * 2 * inputs.features["output_gate_gate"].sigmoid()[..., None]
    for backend in backends_of(both):
        found = run(both, inputs, backend)
        assert (found["output"] - wanted).abs().max() < 1e-12
        compare(found, run(both, inputs), 1e-12, 1e-11, backend)
    assert set(backends_of(both)) == set(backends_of(attnswap.Softpick())), "the same kernels serve"


def test_factors_multiply_and_biases_add():
    case = Case(batch=1, kv_heads=1, groups=1, mask="causal")
    both = bound(resolve(["ssmax", attnswap.SelectiveTemperature(value=False)]), case)
    inputs = draw(both, case)
    query, key, value = inputs.tensors.values()
    features = inputs.features
    n = torch.arange(1.0, 7.0, dtype=torch.float64)
    first = features["ssmax_scale"] * n.log() + features["ssmax_offset"]
    second = 1 + features["selective_temperature_position_gain"] * n.log()
    second = second + features["selective_temperature_query_temperature"][0, 0]
    z = (query @ key.mT / 2)[0, 0] * (first * second)[:, None]
    wanted = z.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf).softmax(-1) @ value[0, 0]
    assert (run(both, inputs)["output"][0, 0] - wanted).abs().max() < 1e-12


def test_three_ways_to_write_a_list():
    want = Composed((attnswap.Softpick(), attnswap.OutputGate()))
    assert resolve("softpick+output-gate") == resolve(["softpick", {"name": "output-gate"}]) == want
    assert resolve(want.to_dict()) == want and want.name == "softpick+output-gate"
    assert resolve(["softpick"]) == attnswap.Softpick()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "empty"),
        (["softpick", "softpick"], "once only"),
        (["softpick", "sigmoid"], "at most one swap of a list may have weights of its own, not softpick and sigmoid"),
        (["softpick", "top-k"], "weights of its own"),
        (["softpick", ["ssmax", "output-gate"]], "no other list"),
        ("softpick+nothing", 'unknown swap "nothing"'),
        ({"name": "softpick+output-gate"}, '"swaps"'),
        ({"name": "softpick+ssmax", "swaps": ["softpick", "output-gate"]}, "is not the name"),
    ],
)
def test_what_cannot_be_one_swap_is_refused(given: object, words: str):
    with pytest.raises(ConfigError, match=words):
        resolve(given)  # type: ignore[arg-type]


def test_a_fit_reaches_the_swap_that_can_be_fitted():
    swap = resolve([attnswap.Sigmoid(bias="predicted", units=4), "output-gate"])
    assert swap.fit_powers == (1.0, 2.0)
    hidden = torch.randn(64, 8)
    sums = {power: power * torch.randn(2, 64).abs() for power in (1.0, 2.0)}
    values, error = swap.fit(Observed(hidden, sums, torch.arange(1.0, 65.0)))
    assert set(values) <= set(swap.traits.learned) and error > 0
    assert all(name.startswith("sigmoid_") for name in values)


def test_traits_of_a_list():
    swap = resolve("entmax+forgetting-gate")
    assert (swap.traits.route, swap.traits.row_sum, swap.traits.cache_state) == ("row", "one", True)
    assert resolve("ssmax+output-gate").exact_identity and not resolve("softpick+output-gate").exact_identity
    assert resolve("top-k+output-gate").native_ramp is False
    assert resolve("stick-breaking+output-gate").causal_only
