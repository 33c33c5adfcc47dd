"""The Triton kernels against the dense reference in fp64: outputs and all gradients.

They run on a GPU if there is one (``make gpu``), else in Triton's interpreter. The interpreter is chosen when triton is
imported, so everything then runs in a process of its own; what is compared here comes back from it. What compilers say
of the same kernels is in ``results/triton/``.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import attnswap
from attnswap.attention import triton as triton_backend
from attnswap.attention.codegen import maths_refusal
from attnswap.attention.problem import Problem
from attnswap.attention.triton.tiles import tiles_of
from attnswap.attention.visibility import Visibility
from attnswap.errors import ConfigError
from attnswap.swaps import Swap
from attnswap.swaps import expression as fn
from attnswap.swaps.base import Feature
from attnswap.swaps.softmax import Softmax
from tests.helpers.calls import Case, allowed_error, bound, compare, draw, run, variants
from tests.helpers.devices import device_of
from tests.helpers.ids import variant_id
from tests.helpers.paths import ROOT
from tests.helpers.triton_calls import KINDS, LARGE, ROUNDING, Worker, check, negated, solve

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SWAPS = [
    attnswap.Softpick(),
    attnswap.Sigmoid(bias=-1.5),
    attnswap.Sigmoid(bias="learned"),
    attnswap.SSMax(init="paper"),
    attnswap.SelectiveTemperature(init="paper"),
    attnswap.ForgettingGate(init="paper"),
]


class Broken(Swap):
    """Softmax weights with a slope of the wrong sign where it is printed; no name, so it is not registered."""

    def weight(self, s: Any, shift: Any, p: SimpleNamespace) -> Any:
        return fn.exp(shift - s) if isinstance(s, fn.Expr) else fn.exp(s - shift)


class EveryWord(Swap):
    """A swap of the whole vocabulary, with per-head numbers; no name, so it is not registered."""

    def features(self) -> dict[str, Feature]:
        return {"alpha": Feature("head", initial=1.0), "beta": Feature("head", initial=0.5)}

    def shift_floor(self, p: SimpleNamespace) -> Any:
        return fn.maximum(-2.0, fn.log(p.ramp))

    def weight(self, s: Any, shift: Any, p: SimpleNamespace) -> Any:
        t = p.alpha * fn.clamp(s, -3.0, 3.0) - p.beta
        soft = fn.softplus(t) + fn.sigmoid(t) * (1.5 + fn.tanh(p.beta * t))
        bent = fn.where(s > p.beta, fn.power(fn.relu(s) + 0.5, 1 + p.alpha * p.alpha), soft / (1 + fn.abs(t)))
        return bent * fn.exp(fn.minimum(s, 3.0) - 3.0) * fn.exp(-shift)

    def norm(self, s: Any, shift: Any, p: SimpleNamespace) -> Any:
        return (fn.log(2 + fn.exp(-fn.abs(s))) + fn.sign(s - p.beta) * 0.25) * fn.exp(-shift)

    def null(self, shift: Any, n: Any, p: SimpleNamespace) -> Any:
        return (n * p.ramp + fn.where(p.beta < n, 1.0 + p.alpha * p.alpha, 2.0)) * fn.exp(-shift)


WIDE = pytest.param(256, marks=pytest.mark.slow)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("width", [64, 96, 128, WIDE])
@pytest.mark.parametrize("swap", SWAPS, ids=variant_id)
def test_outputs_and_gradients(worker: Worker, swap: Swap, width: int):
    """Two tiles each way, shared key/value heads, and values of another width."""
    value_width = 64 if width == 96 else width
    case = Case(batch=1, queries=70 * LARGE, keys=100 * LARGE, width=width, value_width=value_width, seed=width)
    check(worker, swap, case)


@pytest.mark.slow
@pytest.mark.parametrize("swap", variants(), ids=variant_id)
def test_every_config(worker: Worker, swap: Swap):
    case = Case(batch=1, queries=20, keys=30, width=16, value_width=16, seed=8)
    if maths_refusal(swap):
        with pytest.raises(ConfigError, match="statistics of"):
            check(worker, swap, case)
    else:
        check(worker, swap, case)


MASKS = ("none", "bool", "additive", "per head", "padding", "inf", "lowest", "one for all", "causal and bool")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("swap", [SWAPS[0], SWAPS[2], SWAPS[5]], ids=variant_id)
def test_masks(worker: Worker, swap: Swap, mask: str):
    """Dense masks hold a row that sees nothing and one that sees one key."""
    if swap.causal_only and mask == "none":
        mask = "causal"
    batch = 2 if mask == "padding" else 1
    case = Case(batch=batch, kv_heads=1, queries=9, keys=70, width=16, value_width=24, mask=mask, seed=5)
    check(worker, swap, case)


@pytest.mark.parametrize(("queries", "keys"), [(1, 130), (130, 3), (65, 64)])
def test_lengths_that_do_not_fill_their_tiles(worker: Worker, queries: int, keys: int):
    case = Case(batch=1, kv_heads=1, queries=queries, keys=keys, width=16, value_width=1, seed=1)
    for swap in (SWAPS[0], SWAPS[5]):
        check(worker, swap, case)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("level", ["huge", "low"])
@pytest.mark.parametrize("swap", [SWAPS[0], SWAPS[2], SWAPS[3]], ids=variant_id)
def test_scores_of_ten_thousand(worker: Worker, swap: Swap, level: str):
    """Scores near +-1e4 carry an fp32 rounding of their own; near -130 no weight may underflow."""
    case = Case(queries=9, keys=12, width=64, value_width=16, level=level, seed=2)
    swap = bound(swap, case)
    inputs = draw(swap, case).rounded(torch.float32)
    if level == "huge":
        inputs.tensors["query"] = (inputs.tensors["query"] / 4).float().double()
    wanted = run(swap, inputs, "dense", torch.float64)
    found = worker(run, swap, inputs, "triton", torch.float32)
    query, key, _ = inputs.tensors.values()
    largest = float((query.flatten(0, 2) @ key.flatten(0, 2).T).abs().max()) / 8
    assert largest > (1e4 if level == "huge" else 100)
    allowed = allowed_error(inputs, level)
    compare(found, wanted, allowed, 4 * allowed, level)


@pytest.mark.thinned(12)
@pytest.mark.parametrize("width", [64, 96, 128, WIDE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("swap", SWAPS, ids=variant_id)
def test_half_precision(worker: Worker, swap: Swap, dtype: torch.dtype, width: int):
    """Inputs of half precision, sums in fp32: within the rounding of weights and outputs."""
    long = 70 * LARGE
    case = Case(batch=1, kv_heads=1, queries=long, keys=long, width=width, value_width=width, seed=3)
    check(worker, swap, case, dtype)


def test_the_whole_vocabulary(worker: Worker):
    check(worker, EveryWord(), Case(batch=1, queries=9, keys=70, width=16, value_width=16, seed=4))


@pytest.mark.parametrize("ramp", [0.25, torch.tensor([0.25, 1.0, 0.5, 0.75])], ids=["number", "per head"])
def test_the_ramp_of_softpick_and_its_gradient(worker: Worker, ramp: Any):
    case = Case(batch=1, queries=9, keys=70, width=16, value_width=16, seed=6)
    check(worker, attnswap.Softpick(), case, ramp=ramp)


def test_a_wrong_sign_is_caught(worker: Worker):
    """The comparison must fail where the printed maths is not the swap's."""
    case = Case(batch=1, queries=9, keys=20, width=16, value_width=16)
    with pytest.raises(AssertionError, match="is off by"):
        check(worker, Broken(), case)
    check(worker, Softmax(), case)


def test_a_wrong_sign_in_a_slope_is_caught(worker: Worker):
    """The output is right and every gradient that passes through a score is not."""
    case = Case(batch=1, queries=9, keys=20, width=16, value_width=16)
    inputs = draw(Softmax(), case).rounded(torch.float32)
    wanted = run(attnswap.Softpick(), inputs)
    found = worker(negated, attnswap.Softpick(), inputs, "weight_slope")
    compare({"output": found["output"]}, {"output": wanted["output"]}, 4e-6, 4e-6, "output")
    for name in ("query", "key"):
        name = f"gradient of {name}"
        with pytest.raises(AssertionError, match="is off by"):
            compare({name: found[name]}, {name: wanted[name]}, 4e-6, 8e-6, name)


# --- calls as they come from a model ----------------------------------------------------------------------------------


@pytest.mark.thinned(9)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("swap", [SWAPS[0], SWAPS[2], SWAPS[3], SWAPS[5]], ids=variant_id)
def test_calls_of_a_model(worker: Worker, swap: Swap, kind: str):
    if kind == "bidirectional" and swap.causal_only:
        pytest.skip("the swap is for causal attention alone")
    wanted = solve(swap, "dense", torch.float64, kind)
    found = worker(solve, swap, "triton", torch.float32, kind)
    compare(found, wanted, 4e-6, 1.6e-5, kind)
    if kind == "padding":
        assert not found["output"][1, :, : 70 - 15].any(), "a row without a visible key gives 0"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("swap", [SWAPS[0], SWAPS[5], attnswap.Entmax(alpha="learned")], ids=variant_id)
def test_calls_of_a_model_in_bf16(worker: Worker, swap: Swap, kind: str):
    if kind == "bidirectional" and swap.causal_only:
        pytest.skip("the swap is for causal attention alone")
    wanted = solve(swap, "dense", torch.float64, kind, torch.bfloat16)
    found = worker(solve, swap, "triton", torch.bfloat16, kind, torch.bfloat16)
    allowed = ROUNDING[torch.bfloat16]
    compare(found, wanted, allowed, 3 * allowed, kind)


def strong_decay(keys: int, backend: str) -> Tensor:
    """The last 40 queries of a cache, at log f near -0.7 throughout."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, n, 64, generator=generator) for n in (40, keys, keys))
    log_forget = -0.7 * (1 + 0.1 * torch.rand(1, 1, keys, generator=generator))
    dtype = torch.float64 if backend == "dense" else torch.float32
    query, key, value, log_forget = (x.to(device_of(backend), dtype) for x in (query, key, value, log_forget))
    options = {"is_causal": True, "log_forget": log_forget, "backend": backend}
    return attnswap.attention(query, key, value, "forgetting-gate", **options).cpu()


def test_a_long_decay_keeps_its_precision(worker: Worker):
    """8192 keys: cumulative sums near -6000, whose differences fp32 would know to 2e-4 only."""
    wanted = strong_decay(8192, "dense")
    found = worker(strong_decay, 8192, "triton")
    assert (found.double() - wanted).abs().max() < 2e-6


def test_results_are_the_same_in_every_run(worker: Worker):
    first, second = (worker(solve, SWAPS[0], "triton", torch.float32, "holes") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- as torch sees it -------------------------------------------------------------------------------------------------


def operator_arguments() -> tuple[Any, ...]:
    """What the operator takes for a call of the learned sigmoid."""
    swap = attnswap.Sigmoid(bias="learned", max_positions=16)
    generator, device = torch.Generator().manual_seed(0), torch.device(device_of("triton"))
    query, key, value = (torch.randn(1, n, 20, 16, generator=generator).to(device).requires_grad_() for n in (4, 2, 2))
    features = {"bias": torch.randn(4, generator=generator).to(device).requires_grad_()}
    visibility = Visibility(20, 20, device)
    return triton_backend.operands(Problem(swap, query, key, value, visibility, features, 0.25))


def check_operator() -> None:
    """Checks the operator's schema, shapes without values, and gradients under tracing."""
    torch.library.opcheck(triton_backend.ops.forward, operator_arguments())


def compiled_equals_eager() -> bool:
    """Whether a compiled function of the operator is one graph with the same output and gradients."""
    arguments = operator_arguments()
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]

    def loss(*args: Any) -> Tensor:
        return triton_backend.ops.forward(*args)[0].square().sum()

    eager = loss(*arguments)
    wanted = torch.autograd.grad(eager, leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*arguments)
    found = torch.autograd.grad(compiled, leaves)
    same = all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(found, wanted, strict=True))
    return bool(torch.allclose(eager, compiled)) and same and all(bool(x.any()) for x in wanted[:4])


def test_the_operator_satisfies_torch(worker: Worker):
    worker(check_operator)


def test_torch_compile_takes_the_operator_whole(worker: Worker):
    assert worker(compiled_equals_eager)


def test_importing_attnswap_leaves_triton_alone():
    code = (
        "import sys, importlib.abc\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] == 'triton': raise ImportError('blocked')\n"
        "import torch, transformers\n"
        "before = {k for k in sys.modules if k.split('.')[0] == 'triton'}\n"
        "sys.meta_path.insert(0, Block())\n"
        "import attnswap\n"
        "assert {k for k in sys.modules if k.split('.')[0] == 'triton'} == before\n"
        "x = torch.ones(1, 1, 2, 4)\n"
        "attnswap.attention(x, x, x, 'softpick', backend='dense')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "0"})


# --- compiled for GPUs ------------------------------------------------------------------------------------------------


def committed() -> dict[str, Any]:
    """What the ahead-of-time check found."""
    return json.loads((ROOT / "results/triton/aot.json").read_text(encoding="utf-8"))


def test_the_committed_table_is_of_the_sizes_that_are_launched():
    """Every target, dtype and width is there, fits, uses tensor cores in bf16, and has the launcher's tiles."""
    rows = committed()["rows"]
    found = {(r["target"], r["swap"], r["dtype"], r["width"], r["kernel"]) for r in rows}
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    swaps = dict.fromkeys(("softpick", "sigmoid", "forgetting-gate"), "forward")
    swaps |= dict.fromkeys(("entmax", "entmax (learned alpha)"), "forward_rows")
    assert found == {
        (target, swap, dtype, width, kernel)
        for target, dtype, width in itertools.product(targets, ("bf16", "fp32"), (64, 128))
        for swap, forward in swaps.items()
        for kernel in (forward, "backward_queries", "backward_keys")
    }
    for r in rows:
        tiles = tiles_of(r["kernel"], r["target"], r["width"], {"bf16": 2, "fp32": 4}[r["dtype"]])
        assert r["tile"] == str(tiles)
        assert r["dtype"] == "fp32" or r["kernel"] == "backward_keys" or min(tiles.rows, tiles.keys) >= 64
        assert r["shared"] <= r["shared_limit"]
        assert r["matrix"] or r["dtype"] == "fp32"
        assert bool(r["loop"]["matrix"]) == bool(r["matrix"])
        lanes = tiles.num_warps * (64 if r["target"] == "gfx942" else 32)
        assert r["slots"] == round(sum(r["loop"].values()) * lanes / (tiles.rows * tiles.keys), 1)


@pytest.mark.slow
def test_compiling_a_target_gives_the_committed_row():
    """With the compiler that made the table; another one must still fit and use tensor cores."""
    made = committed()
    code = (
        "import dataclasses, json\n"
        "from attnswap.attention.triton import aot\n"
        "made = [('softpick', 'forward'), ('softpick', 'backward_queries'), ('softpick', 'backward_keys')]\n"
        "made += [('entmax', 'forward_rows')]\n"
        "rows = [aot.compile_one('sm_90', swap, 'bf16', 64, kernel) for swap, kernel in made]\n"
        "print(json.dumps([aot.triton.__version__, [dataclasses.asdict(r) for r in rows]]))\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    version, rows = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        wanted = next(
            r for r in made["rows"] if all(r[k] == row[k] for k in ("target", "swap", "dtype", "width", "kernel"))
        )
        if version == made["triton"]:
            assert row == wanted
        assert "wgmma" in row["matrix"] and row["shared"] <= row["shared_limit"]


def compile_every_part() -> list[int]:
    """Compiles a call that has every part a call may have; gives the sizes of what was made."""
    from attnswap.attention.triton import aot

    problem = aot.causal_call(EveryWord(), torch.bfloat16, 48)
    generator = torch.Generator().manual_seed(0)
    mask = torch.randn(2, 1, 256, 256, generator=generator)
    visibility = replace(problem.visibility, key_valid=mask[:, 0, 0] > -1, dense=mask > -1, bias=mask.bfloat16())
    ramp, sinks = (torch.rand(4, generator=generator).requires_grad_() for _ in range(2))
    problem = replace(problem, visibility=visibility, ramp=ramp, sinks=sinks, softcap=30.0)
    biased = replace(problem, swap=attnswap.ForgettingGate(), features={"log_forget": -torch.rand(2, 4, 256)})
    numbers = {"alpha_logit": torch.rand(4, generator=generator).requires_grad_()}
    row = replace(problem, swap=attnswap.Entmax(alpha="learned"), features=numbers)
    calls = itertools.product(aot.TARGETS, (problem, biased, row), aot.KERNELS)
    kernels = {True: "forward_rows", False: "forward"}
    return [
        aot.compile_kernel(target, call, kernel).registers
        for target, call, kernel in calls
        if kernel.startswith("backward") or kernel == kernels[bool(call.swap.statistics())]
    ]


@pytest.mark.slow
def test_every_part_of_a_call_compiles_for_every_target():
    """The interpreter takes more than the compilers do."""
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0"}):
        pool = ProcessPoolExecutor(1, get_context("spawn"))
        with pool:
            assert all(registers > 0 for registers in pool.submit(compile_every_part).result())


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(
    changes: dict[str, Any], swap: Swap | None = None, width: int = 8, dtype: Any = torch.float32
) -> str | None:
    """What the backend says of a call."""
    x = torch.ones(1, 1, 3, width, dtype=dtype, device=device_of("triton"))
    visibility = Visibility(3, 3, x.device, **changes.pop("visibility", {}))
    problem = Problem(swap or attnswap.Softpick(), x, x, x, visibility, {}, 1.0)
    return triton_backend.refusal(replace(problem, **changes))


@pytest.mark.parametrize(
    ("reason", "arguments"),
    [
        ("dropout", ({"dropout": 0.1},)),
        ("depends on the shift", ({}, attnswap.Softpick(eps_after_max_shift=True))),
        ("at most 256", ({}, None, 257)),
        ("not torch.float64", ({}, None, 8, torch.float64)),
        ("additive mask", ({"visibility": {"bias": torch.zeros(1, 1, 3, 3, requires_grad=True)}},)),
    ],
)
def test_refusals_name_their_cause(worker: Worker, reason: str, arguments: tuple[Any, ...]):
    said = worker(refusal, *arguments)
    assert said is not None and reason in said
    assert worker(refusal, {}) is None


def test_a_cpu_is_refused_without_the_interpreter():
    x = torch.ones(1, 1, 2, 4)
    with (
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0"}),
        pytest.raises(ConfigError, match="CUDA and ROCm devices"),
    ):
        attnswap.attention(x, x, x, "softpick", backend="triton")


def test_a_machine_without_triton_is_refused():
    with (
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),
        mock.patch("importlib.util.find_spec", return_value=None),
    ):
        said = refusal({})
    assert said is not None and "pip install triton" in said


def test_an_old_triton_is_refused():
    with (
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),
        mock.patch.object(triton_backend, "_installed", return_value=True),
        mock.patch.object(triton_backend, "_version", return_value=(3, 4)),
    ):
        said = refusal({})
    assert said is not None and "triton>=3.5" in said
