"""The swaps: the shared contract, and the reference against formulas written out row by row."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attnswap
from attnswap.errors import ConfigError
from attnswap.swaps import REGISTRY, Call, Swap, resolve
from attnswap.swaps.softmax import Softmax
from attnswap.swaps.statistics import Max
from tests.helpers.calls import (
    SETTINGS,
    Case,
    Inputs,
    bound,
    cases,
    compare,
    draw,
    run,
    shares_value_features,
    variants,
)
from tests.helpers.contract import CHECKS, check_ids
from tests.helpers.ids import variant_id

# --- the shared contract ----------------------------------------------------------------------------------------------


def test_every_swap_has_variants():
    # Asked for when the test runs: a swap that another test module registered and left behind fails here.
    covered = {swap.name for swap in variants()}
    assert covered == set(REGISTRY) == {swap.name for swap in attnswap.list_swaps()}
    assert covered >= {"ssmax", "softpick", "sigmoid", "selective-temperature", "forgetting-gate"}


EXEMPT = {("softmax", "ramp")}
"""A swap and the check that it need not pass: softmax does not differ from itself at the end of the ramp."""


@pytest.mark.parametrize("swap", variants(), ids=variant_id)
@pytest.mark.parametrize("check", CHECKS, ids=check_ids)
def test_contract(swap: Swap, check: Callable[[Swap], None]):
    if (swap.name, check_ids(check)) in EXEMPT:
        with pytest.raises(AssertionError):  # an exemption that is not needed is none
            check(swap)
    else:
        check(swap)


# --- the formulas, one row at a time, sharing nothing with the package ------------------------------------------------

Row = Callable[[Tensor, int, list[int], dict[str, Tensor], Swap, Tensor, int], tuple[Tensor, Tensor]]
"""Takes content scores z of the visible keys, n, those keys, one head's features, lambda and the query's own key
index; returns weights and what they multiply each value with."""


def softmax(z: Tensor) -> Tensor:
    e = torch.exp(z - z.max().detach())
    return e / e.sum()


def ssmax_row(z, bias, keys, f, swap, ramp, own):
    n = len(keys)
    if swap.form == "affine":
        full = f["scale"] * math.log(n) + f["offset"]
    elif swap.form == "scale":
        full = f["scale"] * math.log(n)
    else:
        full = 1 + f["scale"] * max(0.0, math.log(n) - math.log(swap.train_length))
    a = 1 + ramp * (full - 1)
    return softmax(a * z + bias), torch.ones_like(z)


def softpick_row(z, bias, keys, f, swap, ramp, own):
    z = z + bias + (0.0 if swap.anchor is None else max(0.0, math.log(len(keys) / swap.anchor)))
    z = z + (1e3 if swap.keep_lone and len(keys) == 1 else 0.0)
    # Relative to e^m throughout; m is a plain number, so it cancels exactly where eps is not tied to it.
    m = torch.maximum(z.max(), torch.log(ramp))
    eps = ramp * swap.eps * (1.0 if swap.eps_after_max_shift else torch.exp(-m))
    difference = torch.exp(z - m) - ramp * torch.exp(-m)
    total = difference.abs().sum() + eps
    return torch.relu(difference) / total, torch.ones_like(z)


def softmax_one_row(z, bias, keys, f, swap, ramp, own):
    s = torch.cat([z + bias, (torch.log(ramp) + f["sink"])[None]])
    return softmax(s)[:-1], torch.ones_like(z)


def damped(w, swap, ramp):
    if swap.row_limit is None:
        return w
    return w / (1 + ramp * (w.sum() - 1) / swap.row_limit)


def sigmoid_row(z, bias, keys, f, swap, ramp, own):
    if swap.bias == "predicted":
        known = (z + bias).detach().logsumexp(0)
        level = (1 - ramp) * known + ramp * (f["level"] + f["offset"] + f["slope"] * math.log(len(keys)))
        if swap.keep_lone and len(keys) == 1:  # all of its weight; a ramp at its end is no longer on its way
            level = known + torch.log(torch.clamp(1 - ramp, min=1e-30))
        x = z + bias - level
        w = torch.exp(x - torch.nn.functional.softplus(x + torch.log(ramp)))
        return damped(w, swap, ramp), torch.ones_like(z)
    constant = (
        f["bias"] if swap.bias == "learned" else -math.log(swap.max_positions) if swap.bias is None else swap.bias
    )
    b = constant + swap.bias_log_n * math.log(len(keys))
    b = 1e3 if swap.keep_lone and len(keys) == 1 else b
    full = damped(0.5 + 0.5 * torch.tanh((z + bias + b) / 2), swap, 1.0)
    if swap.divide_by_n:
        full = full / (math.sqrt(len(keys)) if swap.divide_by_n == "sqrt" else len(keys))
    return (1 - ramp) * softmax(z + bias) + ramp * full, torch.ones_like(z)


def selective_temperature_row(z, bias, keys, f, swap, ramp, own):
    gain = torch.exp(-torch.exp(f["position_gain"])) if swap.position == "released" else f["position_gain"]
    t = gain * math.log(len(keys))
    if swap.query:
        t = t + f["query_temperature"]
    u = 1 + ramp * f["value_temperature"][keys] if swap.value else torch.ones_like(z)
    return softmax((1 + ramp * t) * z + bias), u


def forgetting_gate_row(z, bias, keys, f, swap, ramp, own):
    log_f = f["log_forget"]
    decay = []
    for j in keys:
        between = log_f[j + 1 : own + 1].sum() if j <= own else -log_f[own + 1 : j + 1].sum()
        decay.append(ramp * between)
    return softmax(z + bias + torch.stack(decay)), torch.ones_like(z)


ROWS: dict[str, Row] = {
    "ssmax": ssmax_row,
    "softpick": softpick_row,
    "sigmoid": sigmoid_row,
    "softmax-1": softmax_one_row,
    "selective-temperature": selective_temperature_row,
    "forgetting-gate": forgetting_gate_row,
}


def by_hand(swap: Swap, inputs: Inputs, ramp: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a call from the formulas above, with n counted key by key."""
    leaves = {k: x.clone().requires_grad_() for k, x in {**inputs.tensors, **inputs.features}.items()}
    ramp = ramp.double().requires_grad_()
    query, key, value = (leaves[k] for k in ("query", "key", "value"))
    batch, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    declared = swap.features()
    padded = token_is_padding(inputs)
    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                visible = [j for j in range(key.shape[2]) if inputs.visible[b, h, i, j]]
                if not visible:
                    rows.append(0 * value[b, 0, 0])
                    continue
                f = {}
                for name, feature in declared.items():
                    owner = h if feature.heads == "query" else h // groups
                    if feature.per == "head":
                        f[name] = leaves[name][owner]
                    elif feature.per == "query":
                        f[name] = leaves[name][b, owner, i]
                    else:
                        f[name] = torch.where(padded[b], 0.0, leaves[name][b, owner])
                z = torch.stack([(query[b, h, i] * key[b, h // groups, j]).sum() for j in visible]) / width**0.5
                bias = inputs.bias[b, h, i, visible]
                own = min(max(i + key.shape[2] - queries, 0), key.shape[2] - 1)
                w, u = ROWS[swap.name](z, bias, visible, f, swap, ramp[h], own)
                rows.append(sum(w[x] * u[x] * value[b, h // groups, j] for x, j in enumerate(visible)))
    out = torch.stack(rows).reshape(batch, heads, queries, -1)
    out.backward(inputs.upstream)
    found = {"output": out.detach()}
    for name, leaf in {**leaves, "ramp": ramp}.items():
        found[f"gradient of {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


def token_is_padding(inputs: Inputs) -> Tensor:
    """Under a dense mask: tokens whose key no query of any head sees, as far as they are among the queries."""
    batch, _, queries, keys = inputs.visible.shape
    padded = torch.zeros(batch, keys, dtype=torch.bool)
    if "attn_mask" in inputs.options:
        for b in range(batch):
            for i in range(queries):
                own = i + keys - queries
                if 0 <= own < keys:
                    seen = [bool(head[row, own]) for head in inputs.visible[b] for row in range(queries)]
                    padded[b, own] = not any(seen)
    return padded


@pytest.mark.thinned(2)
@pytest.mark.parametrize("swap", [s for s in variants() if s.name in ROWS], ids=variant_id)
def test_reference_equals_the_formula(swap: Swap):
    # The released position factor is rounded to fp32 by definition.
    tolerance = 1e-6 if getattr(swap, "position", "") == "released" else 1e-10

    @SETTINGS
    @given(cases(), st.sampled_from([1.0, 0.5, 0.125]))
    def check(case: Case, ramp: float):
        config = bound(swap, case)
        inputs = draw(config, case)
        lambdas = torch.full((case.heads,), ramp)
        wanted = by_hand(config, inputs, lambdas)
        found = run(config, inputs, "dense", ramp=lambdas)
        if shares_value_features(config):  # heads of a group share lambda there, and so its gradient
            for both in (found, wanted):
                both["gradient of ramp"] = both["gradient of ramp"].reshape(case.kv_heads, -1).sum(1)
        looser = tolerance * (1e4 if case.level in ("huge", "low") else 1)
        compare(found, wanted, looser, looser, f"{ramp} {case}")

    check()


@pytest.mark.parametrize("form", ["affine", "scale", "anchored"])
@pytest.mark.parametrize("mask", ["none", "causal", "per head", "causal and bool", "padding", "lowest"])
def test_n_counts_visible_keys_at_a_large_coefficient(form: str, mask: str):
    swap = attnswap.SSMax(form=form, train_length=2)
    case = Case(queries=5, keys=9, mask=mask, seed=21)
    inputs = draw(swap, case)
    inputs.features["scale"] = torch.tensor([3.0, -2.0, 5.0, 4.0], dtype=torch.float64)
    wanted = by_hand(swap, inputs, torch.ones(case.heads))
    for backend in ("auto", "dense", "chunked", "folded"):
        found = run(swap, inputs, backend, ramp=torch.ones(case.heads))
        compare(found, wanted, 1e-11, 1e-10, f"{form} {mask} {backend}")


# --- identities between swaps and forms -------------------------------------------------------------------------------


def attend(swap: Swap, inputs: Inputs, **features: Tensor) -> Tensor:
    return attnswap.attention(*inputs.tensors.values(), swap, **{**inputs.options, **features})


def test_softpick_of_only_negative_scores_is_dead():
    inputs = draw(Softmax(), Case(level="low", mask="none"))
    for eps in (1e-6, 0.0):
        for dtype in (torch.float32, torch.float64):
            found = run(attnswap.Softpick(eps=eps), inputs, "auto", dtype)
            assert not any(x.any() for x in found.values())


def test_softpick_of_scores_of_exactly_zero_is_zero_without_nan():
    inputs = draw(Softmax(), Case(mask="none"))
    inputs.tensors["query"] = torch.zeros_like(inputs.tensors["query"])
    for eps in (1e-6, 0.0):
        found = run(attnswap.Softpick(eps=eps), inputs)
        assert not found["output"].any()
        assert all(x.isfinite().all() for x in found.values())


def test_the_published_softpick_form_fails_where_ours_does_not():
    """The shift by max z alone: exp(-max) overflows in fp32, and the gradient is NaN. Ours is exact there."""
    z = torch.full((4,), -100.0, requires_grad=True)
    m = z.max()
    weights = torch.relu(torch.exp(z - m) - torch.exp(-m))
    (weights / ((torch.exp(z - m) - torch.exp(-m)).abs().sum() + 1e-6)).sum().backward()
    assert z.grad.isnan().any()
    inputs = draw(Softmax(), Case(level="low", mask="none"))
    assert all(x.isfinite().all() for x in run(attnswap.Softpick(), inputs, "auto", torch.float32).values())


def test_ssmax_forms_agree_where_their_formulas_meet():
    case = Case(mask="causal", queries=7, keys=7)
    inputs = draw(Softmax(), case)
    s = torch.tensor([0.7, -0.3, 1.1, 0.2], dtype=torch.float64)
    scale = attend(attnswap.SSMax(form="scale"), inputs, scale=s)
    affine = attend(attnswap.SSMax(), inputs, scale=s, offset=torch.zeros(4))
    assert (scale - affine).abs().max() < 1e-13
    anchored = attend(attnswap.SSMax(form="anchored", train_length=1), inputs, scale=s)
    affine = attend(attnswap.SSMax(), inputs, scale=s, offset=torch.ones(4))
    assert (anchored - affine).abs().max() < 1e-13
    untouched = attend(attnswap.SSMax(form="anchored", train_length=7), inputs, scale=100 * s)
    assert torch.equal(untouched, attend(attnswap.SSMax(), inputs)), "anchored changes rows within the trained length"


def test_a_row_limit_leaves_sums_of_one_and_bounds_the_rest():
    keys = torch.zeros(1, 1, 8, 2, dtype=torch.float64)
    for bias, sum_of_eight in ((-math.log(7), 1.0), (-9.0, 8 / (1 + math.exp(9))), (30.0, 8.0)):
        swap = attnswap.Sigmoid(bias=bias, row_limit=2.0)
        out = attnswap.attention(keys[:, :, :1], keys, keys + 1, swap, backend="dense")
        assert out == pytest.approx(sum_of_eight / (1 + (sum_of_eight - 1) / 2))
        assert (out < 2).all()


def test_a_learned_and_a_constant_sigmoid_bias_agree():
    inputs = draw(Softmax(), Case())
    constant = attend(attnswap.Sigmoid(bias=-2.0), inputs)
    assert torch.equal(attend(attnswap.Sigmoid(bias="learned"), inputs, bias=torch.full((4,), -2.0)), constant)
    paper = attend(attnswap.Sigmoid(max_positions=32), inputs)
    assert (paper - attend(attnswap.Sigmoid(bias=-math.log(32)), inputs)).abs().max() < 1e-14
    learned = attend(attnswap.Sigmoid(bias="learned", max_positions=32), inputs)
    assert (paper - learned).abs().max() < 1e-7  # its start is an fp32 parameter


def test_a_forgetting_gate_that_shuts_hides_the_past():
    inputs = draw(Softmax(), Case(queries=6, keys=6))
    value = inputs.tensors["value"].repeat_interleave(2, 1)
    shut = torch.zeros(2, 4, 6, dtype=torch.float64)
    shut[..., 3] = -1e5
    found = attend(attnswap.ForgettingGate(), inputs, log_forget=shut)
    assert torch.equal(found[:, :, 3], value[:, :, 3]), "the token whose gate shuts sees itself alone"
    open_gate = attend(attnswap.ForgettingGate(), inputs, log_forget=torch.zeros(2, 4, 6))
    assert (found - open_gate)[:, :, :3].abs().max() < 1e-14
    tail = {k: v[:, :, 3:] for k, v in inputs.tensors.items()}
    alone = attnswap.attention(
        *tail.values(), attnswap.ForgettingGate(), log_forget=torch.zeros(2, 4, 3), **inputs.options
    )
    assert (found[:, :, 3:] - alone).abs().max() < 1e-14


@pytest.mark.parametrize("backend", ["auto", "dense", "chunked"])
def test_forget_gates_keep_their_precision_over_a_long_past(backend: str):
    """Differences of sums near 1e5, whose fp32 neighbours are 8e-3 apart, stay exact: they meet in fp64."""
    keys = 4096
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, n, 8, generator=generator) for n in (2, keys))
    value = torch.randn(1, 1, keys, 4, generator=generator)
    log_forget = -0.05 * torch.rand(1, 1, keys, generator=generator)
    log_forget[..., :4000] -= 25  # a past that is forgotten, but stays in the sums
    options = {"is_causal": True, "log_forget": log_forget}
    found = attnswap.attention(query, key, value, "forgetting-gate", backend=backend, **options)
    wide = [x.double() for x in (query, key, value)]
    options["log_forget"] = log_forget.double()
    assert (found - attnswap.attention(*wide, "forgetting-gate", backend="dense", **options)).abs().max() < 2e-6


# --- the forgetting gate's own parameters -----------------------------------------------------------------------------


def gate_step(target: str, gain: float, rate: float = 1.0) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
    """One SGD step on a task whose answer is the newest value ("forget") or the mean of all ("remember")."""
    swap = attnswap.ForgettingGate()
    hidden = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    weight = 0.1 * torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    parameters = {"gain": torch.full((2,), gain), "weight": weight, "bias": torch.zeros(2)}
    parameters = {k: v.requires_grad_() for k, v in parameters.items()}
    value = torch.randn(2, 2, 8, 3, generator=torch.Generator().manual_seed(2))
    flat = torch.zeros(2, 2, 8, 4)  # equal scores, so that only the gates decide
    wanted = value if target == "forget" else value.cumsum(2) / torch.arange(1, 9)[:, None]
    out = attnswap.attention(flat, flat, value, swap, is_causal=True, **swap.gates(hidden, parameters))
    (out - wanted).square().mean().backward()
    with torch.no_grad():
        for p in parameters.values():
            p -= rate * (p.grad if p.grad is not None else 0)
    return parameters, lambda: swap.gates(hidden, parameters)["log_forget"]


def test_a_loss_that_rewards_forgetting_opens_the_gate():
    parameters, log_forget = gate_step("forget", gain=0.0)
    assert (parameters["gain"] > 1e-3).all()
    assert (log_forget() < 0).all()


def test_a_loss_that_punishes_forgetting_leaves_the_identity_and_can_be_turned_around():
    parameters, log_forget = gate_step("remember", gain=0.05, rate=100.0)
    assert (parameters["gain"] < 0).all(), "the loss does not push the gain below 0, so this shows nothing"
    assert torch.equal(log_forget(), torch.zeros_like(log_forget())), "a negative gain is not the identity"
    swap = attnswap.ForgettingGate()
    tensors = [torch.randn(2, 2, 8, 4, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    found = attnswap.attention(*tensors, swap, is_causal=True, log_forget=log_forget(), backend="dense")
    assert torch.equal(found, attnswap.attention(*tensors, Softmax(), is_causal=True, backend="dense"))
    back, log_forget = gate_step("forget", gain=-0.001)
    assert (back["gain"] > 0).all(), "a gain below 0 gets no gradient and can never come back"
    assert (log_forget() < 0).all()


@pytest.mark.parametrize("gain", [-3.0, -1e-9, 0.0, 1e-9, 2.0])
def test_log_forget_is_never_positive(gain: float):
    swap = attnswap.ForgettingGate()
    parameters = {"gain": torch.full((2,), gain), "weight": torch.randn(2, 4), "bias": torch.randn(2)}
    log_forget = swap.gates(1e3 * torch.randn(2, 50, 4), parameters)["log_forget"]
    assert (log_forget <= 0).all()
    assert log_forget.isfinite().all()


def test_a_gain_of_one_is_the_published_gate():
    swap = attnswap.ForgettingGate(init="paper")
    assert swap.gate_parameters()["gain"].initial == 1.0
    hidden, weight, bias = torch.randn(1, 5, 4), torch.randn(3, 4), torch.randn(3)
    found = swap.gates(hidden, {"gain": torch.ones(3), "weight": weight, "bias": bias})["log_forget"]
    published = torch.log(torch.sigmoid(hidden @ weight.T + bias)).transpose(1, 2)
    assert (found - published).abs().max() < 1e-5


def test_value_temperature_gates_follow_the_hidden_states():
    swap = attnswap.SelectiveTemperature()
    hidden = torch.randn(1, 5, 4)
    weights = {"query_weight": torch.randn(4, 4), "value_weight": torch.randn(2, 4)}
    biases = {"query_bias": torch.randn(4), "value_bias": torch.randn(2)}
    found = swap.gates(hidden, {**weights, **biases})
    for side in ("query", "value"):
        by_token = torch.tanh(
            torch.stack([weights[f"{side}_weight"] @ x + biases[f"{side}_bias"] for x in hidden[0]], 1)
        )
        assert (found[f"{side}_temperature"][0] - by_token).abs().max() < 1e-6


def test_the_key_index_of_each_query_is_handed_to_the_swap():
    """Terms see fp64 features, lambda, n and positions aligned with the last key."""
    seen: list[Call] = []

    class Spy(Swap):
        def terms(self, call: Call):
            seen.append(call)
            return super().terms(call)

    q, k = torch.randn(1, 2, 3, 4).double(), torch.randn(1, 2, 5, 4).double()
    attnswap.attention(q, k, k, Spy(), is_causal=True, backend="dense")
    assert seen[0].key_index.tolist() == [2, 3, 4]
    assert seen[0].n.flatten().tolist() == [3.0, 4.0, 5.0]
    assert seen[0].n.dtype == torch.float64


def define(title: str, bases: tuple[type, ...], **members: Any) -> type:
    """Defines a swap class, and forgets its name again."""
    try:
        return type(title, bases, members)
    finally:
        if "name" in members:
            REGISTRY.pop(members["name"], None)


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"shift_floor": lambda self, p: 0.0},
        {"statistics": lambda self: {"top": Max()}},
        {"features": lambda self: {}, "native_ramp": True, "needs_n": True},
        {"wieght": lambda self, s, shift, p: 0.0 * s},
    ],
    ids=["nothing", "a floor", "a statistic", "features", "a slip of the pen"],
)
def test_a_named_swap_that_is_softmax_is_an_error(members: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"terms, .*weight, norm, null"):
        define("Same", (Swap,), name="same-as-softmax", **members)
    assert "same-as-softmax" not in REGISTRY
    define("Nameless", (Swap,), **members)


@pytest.mark.parametrize("member", ["threshold", "bracket", "mass_power", "shift_gradient"])
def test_members_of_the_time_before_stages_are_refused(member: str):
    """They would be passed over in silence, and another swap be computed."""
    with pytest.raises(ConfigError, match=f"defines {member}, .*statistics"):
        define("Old", (attnswap.Softpick,), **{member: True})


def test_a_named_swap_may_inherit_its_maths():
    """From another swap or a class beside it; helpers of its own are its own."""
    members = {"helper": lambda self: 1, "size": property(lambda self: 2)}
    for method in ("terms", "weight", "norm", "null"):
        mixin = type("Mixin", (), {method: lambda self, *rest: None})
        assert issubclass(define("Own", (mixin, Swap), name="own-maths", **members), Swap)
    inherits = define("Renamed", (attnswap.Softpick,), name="softpick-renamed", **members)
    assert issubclass(inherits, attnswap.Softpick)


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("swap", "words"),
    [
        ("softpik", ["softpik", '"softpick"']),
        ("SSMax", ["SSMax", "Known: "]),
        ({"name": "ssmax", "from": "scale"}, ['"from"', '"form"']),
        ({"name": "softpick", "epsilon": 1}, ['"epsilon"', '"eps"']),
        ({"name": "softpick", 3: 1}, ["3"]),
        ({"name": "ssmax", "form": "afine"}, ["afine", "affine"]),
        ({"name": "ssmax", "form": "scale", "init": "identity"}, ["identity", "paper"]),
        ({"name": "ssmax", "train_length": 0}, ["train_length"]),
        ({"name": "ssmax", "train_length": "1k"}, ["train_length"]),
        ({"name": "ssmax", "train_length": 1.5}, ["train_length"]),
        ({"name": "softpick", "eps": -1.0}, ["eps"]),
        ({"name": "softpick", "eps": "small"}, ["eps"]),
        ({"name": "softpick", "eps": math.nan}, ["eps"]),
        ({"name": "softpick", "eps": math.inf}, ["eps"]),
        ({"name": "softpick", "eps_after_max_shift": "yes"}, ["eps_after_max_shift"]),
        ({"name": "sigmoid", "bias": "lerned"}, ["lerned", "learned"]),
        ({"name": "sigmoid", "bias": True}, ["bias"]),
        ({"name": "sigmoid", "bias": math.nan}, ["bias"]),
        ({"name": "sigmoid", "bias": 10**400}, ["bias"]),
        ({"name": "ssmax", "form": "anchored", "train_length": 10**400}, ["train_length"]),
        ({"name": "sigmoid", "bias_log_n": "x"}, ["bias_log_n"]),
        ({"name": "sigmoid", "divide_by_n": 3}, ["divide_by_n"]),
        ({"name": "sigmoid", "max_positions": -4}, ["max_positions"]),
        ({"name": "selective-temperature", "query": "no"}, ["query"]),
        ({"name": "selective-temperature", "position": "log"}, ["log", "log_n"]),
        ({"name": "selective-temperature", "position": "released", "init": "identity"}, ["identity"]),
        ({"name": "forgetting-gate", "init": "papr"}, ["papr", "paper"]),
        ({"name": "forgetting-gate", "init": 0}, ["init"]),
        ({"form": "scale"}, ["name"]),
        ({"name": None}, ["name"]),
        (None, ["name"]),
        (7, ["7"]),
        (["ssmax"], ["ssmax"]),
        ("", ["Known: "]),
    ],
)
def test_a_bad_config_is_refused_by_name(swap: object, words: list[str]):
    with pytest.raises(ConfigError) as caught:
        resolve(swap)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.exit_code == 2


def test_configs_resolve_from_name_mapping_and_object():
    assert resolve("ssmax") == attnswap.SSMax()
    assert resolve({"name": "ssmax", "form": "scale"}) == attnswap.SSMax(form="scale", init="paper")
    config = attnswap.Softpick(eps=1e-8)
    assert resolve(config) is config
    given = {"name": "softpick", "eps": 1e-3}
    resolve(given)
    assert given == {"name": "softpick", "eps": 1e-3}, "resolve changes its argument"


def test_a_second_swap_of_the_same_name_is_refused():
    before = dict(REGISTRY)
    try:
        for kind, module in (("Impostor", "my_swaps"), ("Softpick", "my_swaps")):
            with pytest.raises(ConfigError, match="softpick"):
                type(kind, (Swap,), {"name": "softpick", "__module__": module, "__qualname__": kind})
            assert before == REGISTRY
    finally:
        REGISTRY.update(before)


plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["learned", "identity"])
)
junk = st.recursive(
    plain,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
option_names = sorted({key for swap in variants() for key in swap.to_dict()} - {"name"})
option_values = st.one_of(
    junk, st.sampled_from(["affine", "scale", "anchored", "paper", "log_n", "released", 0.5, 3, -1.0, 0, True, False])
)
mappings = st.builds(
    lambda name, options: {"name": name, **options},
    st.one_of(st.sampled_from([*REGISTRY]), junk),
    st.dictionaries(
        st.one_of(st.sampled_from(option_names), st.text(max_size=6), st.integers()), option_values, max_size=3
    ),
)


@SETTINGS
@given(st.one_of(mappings, mappings, junk, st.text(max_size=12)))
def test_resolve_refuses_or_gives_a_config_that_works(swap: object):
    """Whatever is given: a ConfigError, or a config that survives JSON and computes finite numbers."""
    try:
        config = resolve(swap)
    except ConfigError as error:
        assert str(error).strip()
        return
    rebuilt = resolve(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    assert rebuilt == config
    case = Case(queries=3, keys=3)
    ready = bound(config, case)
    assert ready.traits.route in ("folded", "elementwise", "row")
    found = run(ready, draw(ready, case), "auto", torch.float32)
    assert all(x.isfinite().all() for x in found.values())


# `option_names` per swap: the fuzz above rarely hits a valid combination, this one always names real options.
@pytest.mark.parametrize("name", sorted(name for name, cls in REGISTRY.items() if dataclasses.fields(cls)))
def test_real_options_with_any_value_are_refused_or_work(name: str):
    known = [key for key in resolve(name).to_dict() if key != "name"]

    @SETTINGS
    @given(st.dictionaries(st.sampled_from(known), option_values, min_size=1, max_size=3))
    def check(options: dict[str, object]):
        test_resolve_refuses_or_gives_a_config_that_works.hypothesis.inner_test({"name": name, **options})

    check()
