"""The reference equals what the released code of each paper computed, in fp64, outputs and gradients.

``golden/MANIFEST.json`` names the repository and commit behind every file. All are causal, with scores scaled by
``head_dim ** -0.5``, and hold the inputs next to the results.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import attnswap
from attnswap.attention import problem
from attnswap.swaps import ModelInfo, Swap
from tests.helpers.calls import Inputs, backends_of
from tests.helpers.calls import weights as weights_of
from tests.helpers.paths import GOLDEN

SOURCES = json.loads((GOLDEN / "MANIFEST.json").read_text(encoding="utf-8"))


def load(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def swap_of(name: str, golden: dict[str, Tensor]) -> tuple[Swap, dict[str, str]]:
    """The config that names the released code's behaviour, and its features by the file's names for them."""
    configs: dict[str, tuple[Swap, dict[str, str]]] = {
        "softpick": (attnswap.Softpick(eps=float(golden.get("eps", 0.0)), eps_after_max_shift=True), {}),
        "softpick_naive_fp32cast": (attnswap.Softpick(eps=1e-8, eps_after_max_shift=True), {}),
        "sigmoid_nobias": (attnswap.Sigmoid(bias=0.0), {}),
        "sigmoid_bias_neglogN": (attnswap.Sigmoid(bias=float(golden.get("bias", torch.zeros(1)).flatten()[0])), {}),
        "sigmoid_div_n": (attnswap.Sigmoid(bias=0.0, divide_by_n=True), {}),
        "fox_forgetting_attention": (attnswap.ForgettingGate(), {"log_forget": "log_fgate"}),
        "entmax15": (attnswap.Entmax(alpha=1.5), {}),
        "entmax_bisect_a1.2": (attnswap.Entmax(alpha=1.2), {}),
        "entmax_bisect_a1.5": (attnswap.Entmax(alpha=1.5), {}),
        "entmax_bisect_a2.0": (attnswap.Entmax(alpha=2.0), {}),
        "sparsemax": (attnswap.Entmax(alpha=2.0), {}),
        "ssa_position_temperature": (
            attnswap.SelectiveTemperature(position="released", query=False, value=False),
            {"position_gain": "beta"},
        ),
        "gated_attention_headwise": (attnswap.OutputGate(start=None), {"gate": "gate"}),
        "gated_attention_elementwise": (attnswap.OutputGate(per="element", start=None), {"gate": "gate"}),
        "lssa": (attnswap.LSSA(eps=1e-8), {}),
        "lssar_p3": (attnswap.LSSA(power=3.0, eps=1e-8), {}),
        "elastic_softmax": (attnswap.ElasticSoftmax(keep_single=False), {"tau": "tau"}),
        "lazy_attention_bias": (
            attnswap.ElasticSoftmax(keep_single=False, distances=6),
            {"tau": "tau", "bias": "bias"},
        ),
        "topk_softmax_k4": (attnswap.TopK(k=4), {}),
        "clipped_softmax_gamma": (attnswap.ClippedSoftmax(gamma=-0.03, over_n=False), {}),
        "stickbreaking": (attnswap.StickBreaking(), {}),
        "stickbreaking_strict_rem": (attnswap.StickBreaking(own="remainder"), {}),
        "scale_invariant_tau10": (attnswap.ScaleInvariant(), {}),
        "swat_window6": (attnswap.Swat(window=6, slope="recent").bind(ModelInfo(3, 3, 24)), {"slope": "slopes"}),
        "gumbel_softmax_tau0.7": (attnswap.GumbelSoftmax(temperature=0.7), {}),
    }
    return configs[name]


def compute(golden: dict[str, Tensor], swap: Swap, features: dict[str, str], backend: str) -> dict[str, Tensor]:
    """Output and gradients under the file's names."""
    given = {n: golden[n].clone().requires_grad_() for n in ("q", "k", "v", *features.values())}
    batch, heads, tokens, width = golden["v"].shape
    shapes = {name: feature.shape(batch, heads, tokens, tokens, width) for name, feature in swap.features().items()}
    named: dict[str, Any] = {feature: _fitted(given[n], shapes[feature]) for feature, n in features.items()}
    with stored_noise(golden):
        seed = 0 if "noise" in golden else None
        qkv = (given["q"], given["k"], given["v"])
        out = attnswap.attention(*qkv, swap, is_causal=True, backend=backend, seed=seed, **named)
    found = {"out": out.detach()}
    if "dout" in golden:
        out.backward(golden["dout"])
        found |= {f"d{n}": x.grad for n, x in given.items() if x.grad is not None and f"d{n}" in golden}
    return found


def _fitted(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns a stored array in the shape of a feature; a single number stays one."""
    return x.reshape(shape) if x.ndim else x


@contextmanager
def stored_noise(golden: dict[str, Tensor]) -> Iterator[None]:
    """Puts a file's Gumbel noise in the place of ours, as the uniform numbers that it was made of."""

    def uniform(seed: Tensor, batch: int, heads: int, queries: Tensor, keys: Tensor) -> Tensor:
        return (-(-golden["noise"]).exp()).exp()[:, :, queries][..., keys]

    with mock.patch.object(problem, "uniform_of", uniform):
        yield


def test_the_manifest_names_a_source_for_every_file():
    assert {path.stem for path in GOLDEN.glob("*.npz")} == set(SOURCES)
    for name, entry in SOURCES.items():
        assert "@" in entry["source"], f"{name} names no commit"
        assert sorted(load(name)) == entry["arrays"]


@pytest.mark.parametrize("backend", ["dense", "chunked", "auto"])
@pytest.mark.parametrize("name", [n for n in SOURCES if n != "softpick_naive_fp32cast"])
def test_golden(name: str, backend: str):
    golden = load(name)
    found = compute(golden, *swap_of(name, golden), backend)
    gradients = {n for n in golden if n.startswith("d") and n != "dout"}
    assert set(found) == gradients | {"out"}
    for key, got in found.items():
        if key == "dbeta":
            continue  # compared below
        assert golden[key].dtype == got.dtype == torch.float64
        error = float((got - golden[key]).abs().max())
        assert error <= 1e-10, f"{key} is off by {error:.1e}"


@pytest.mark.parametrize("name", [n for n in SOURCES if "weights" in SOURCES[n]["arrays"]])
def test_golden_weights(name: str):
    golden = load(name)
    swap, features = swap_of(name, golden)
    inputs = Inputs(
        {"query": golden["q"], "key": golden["k"], "value": golden["v"]},
        {feature: golden[n] for feature, n in features.items()},
        {"is_causal": True},
        torch.ones(17, 17, dtype=torch.bool).tril(),
        golden["out"],
    )
    inputs.features = {
        name: _fitted(x, swap.features()[name].shape(2, 3, 17, 17, 8)) for name, x in inputs.features.items()
    }
    allowed = 1e-6 if name == "softpick_naive_fp32cast" else 1e-10
    with stored_noise(golden):
        found = weights_of(swap, inputs, seed=0 if "noise" in golden else None)
    assert float((found - golden["weights"]).abs().max()) <= allowed


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_golden_softpick_with_the_released_cast_to_fp32(backend: str):
    """The released function works in fp32 inside; it agrees to fp32, and its eps is 1e-8, not our default."""
    golden = load("softpick_naive_fp32cast")
    out = compute(golden, attnswap.Softpick(eps=1e-8, eps_after_max_shift=True), {}, backend)["out"]
    assert float((out - golden["out"]).abs().max()) <= 1e-6
    other = compute(golden, attnswap.Softpick(eps=1e-6, eps_after_max_shift=True), {}, backend)["out"]
    assert float((other - golden["out"]).abs().max()) > 1e-5


def test_the_released_temperature_gradient_carries_fp32_precision_only():
    """The released table of ln n is fp32, so the whole gradient of the gain is summed in fp32.

    beta enters as exp(-exp(beta)) in fp64. Dividing the golden value by that last factor's slope therefore gives back
    the fp32 sum itself: a number that fp32 holds exactly. Ours is summed in fp64, so it agrees to fp32 and no more.
    """
    golden = load("ssa_position_temperature")
    beta, released = float(golden["beta"]), float(golden["dbeta"])
    slope = -math.exp(beta) * math.exp(-math.exp(beta))
    in_fp32 = float(np.float32(released / slope))
    assert abs(released / slope - in_fp32) <= 4 * np.finfo(np.float64).eps * abs(in_fp32)
    swap, features = swap_of("ssa_position_temperature", golden)
    ours = float(compute(golden, swap, features, "dense")["dbeta"])
    ours_in_fp32 = float(np.float32(ours / slope))
    assert abs(ours / slope - ours_in_fp32) > 1e-12, "ours is an fp32 number too: compare at 1e-10 after all"
    assert abs(ours - released) <= 17 * np.finfo(np.float32).eps * abs(released)
    assert abs(ours - released) > 1e-10


def test_the_released_temperature_gradient_is_reproduced_by_its_own_precision():
    """The same formula with the factor's gradient summed in fp32 gives the golden value to the last bits."""
    golden = load("ssa_position_temperature")
    q, k, v, beta = (golden[n].clone().requires_grad_() for n in ("q", "k", "v", "beta"))
    log_n = torch.arange(1, 18, dtype=torch.float32).log()
    factor = 1 + torch.exp(-torch.exp(beta)) * log_n
    assert factor.dtype == torch.float32
    scores = (q @ k.transpose(-1, -2)) * 8**-0.5 * factor[:, None]
    visible = torch.ones(17, 17, dtype=torch.bool).tril()
    out = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
    out.backward(golden["dout"])
    assert float((out - golden["out"]).abs().max()) <= 1e-12
    assert float((beta.grad - golden["dbeta"]).abs()) <= 1e-14


def paper_softpick(golden: dict[str, Tensor], eps: Tensor | float) -> Tensor:
    """relu(e^z - 1) / (sum |e^z - 1| + eps) as printed in the paper, in fp64 and without any shift."""
    z = (golden["q"] @ golden["k"].transpose(-1, -2)) * golden["q"].shape[-1] ** -0.5
    visible = torch.ones(17, 17, dtype=torch.bool).tril()
    e = torch.where(visible, torch.exp(z) - 1, 0.0)
    return torch.relu(e) / (e.abs().sum(-1, keepdim=True) + eps) @ golden["v"]


def test_where_eps_stands_is_the_difference_between_softpick_as_printed_and_as_released():
    golden = load("softpick")
    eps = float(golden["eps"])
    assert eps == 1e-8
    printed = compute(golden, attnswap.Softpick(eps=eps), {}, "dense")["out"]
    released = compute(golden, attnswap.Softpick(eps=eps, eps_after_max_shift=True), {}, "dense")["out"]
    assert float((printed - paper_softpick(golden, eps)).abs().max()) <= 1e-12
    assert float((released - golden["out"]).abs().max()) <= 1e-12
    difference = float((printed - released).abs().max())
    assert 2e-8 < difference < 5e-8
    # The released eps is the printed one times e^m, m being the row's largest score (or 0).
    z = (golden["q"] @ golden["k"].transpose(-1, -2)) * golden["q"].shape[-1] ** -0.5
    visible = torch.ones(17, 17, dtype=torch.bool).tril()
    m = z.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True)
    assert float((paper_softpick(golden, eps * torch.exp(m)) - golden["out"]).abs().max()) <= 1e-12


def test_the_released_constant_sigmoid_bias_is_not_the_one_per_row():
    golden = load("sigmoid_bias_neglogN")
    per_row = compute(golden, attnswap.Sigmoid(bias=0.0, bias_log_n=-1.0), {}, "dense")["out"]
    assert float((per_row - golden["out"]).abs().max()) > 0.1
    assert float((per_row - golden["out"])[:, :, -1].abs().max()) <= 1e-10, "at n = 17 both are -ln 17"


def test_the_own_gate_of_the_key_is_left_out():
    """A frequent slip, worth a test of its own: counting the key's own gate changes the golden output."""
    golden = load("fox_forgetting_attention")
    shifted = {**golden, "log_fgate": golden["log_fgate"].roll(-1, -1)}
    out = compute(shifted, attnswap.ForgettingGate(), {"log_forget": "log_fgate"}, "dense")["out"]
    assert float((out - golden["out"]).abs().max()) > 1e-2


@pytest.mark.parametrize("backend", backends_of(attnswap.Sigmoid()))
def test_division_by_the_root_of_n_is_that_by_n_times_the_root(backend: str):
    """The released code's other division has no file of its own: row i holds i + 1 keys."""
    golden = load("sigmoid_div_n")
    swap = attnswap.Sigmoid(bias=0.0, divide_by_n="sqrt")
    root = torch.arange(1, golden["q"].shape[2] + 1).double().sqrt()[:, None]
    found = compute({**golden, "dout": golden["dout"] / root}, swap, {}, backend)
    assert (found["out"] - golden["out"] * root).abs().max() < 1e-12
    for name in ("dq", "dk", "dv"):
        assert (found[name] - golden[name]).abs().max() < 1e-12
