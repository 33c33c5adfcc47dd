"""torch.compile over the function and over patched models: one graph, equal results, and no check lost on the way.

``aot_eager`` traces everything that inductor traces and then runs the operations one by one, so results must agree to
rounding; a few calls go through inductor's own C++ as well.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

import attnswap
from attnswap.attention import chunked, native
from attnswap.attention.autograd import DIFFERENTIABLE
from attnswap.attention.checks import ensure
from attnswap.attention.native import build
from attnswap.attention.problem import Problem
from attnswap.attention.visibility import Visibility
from attnswap.errors import CheckpointError, UnsupportedModelError
from attnswap.swaps import Swap
from tests.helpers.calls import MASKS, Case, backends_of, bound, draw, variants
from tests.helpers.ids import variant_id
from tests.helpers.patched_models import move_away
from tests.helpers.tiny_models import VOCABULARY, tiny

SWAPS = [
    attnswap.SSMax(init="paper"),
    attnswap.Softpick(),
    attnswap.Sigmoid(bias="learned"),
    attnswap.SelectiveTemperature(init="paper"),
    attnswap.Entmax(),
    attnswap.ForgettingGate(init="paper"),
]
BACKENDS = ("folded", "native", "chunked", "dense")
TOKENS = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(5))
PADDING = torch.ones_like(TOKENS)
PADDING[1, :5] = 0
needs_compiler = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before counts towards a test's recompiles."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(function: Any, backend: str = "aot_eager") -> tuple[Any, CompileCounterWithBackend]:
    """Compiles without graph breaks; the counter's ``frame_count`` is how often."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def results(function: Callable[..., Tensor], tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """The output of a function, and the gradients of every floating point tensor it takes."""
    leaves = {k: x.detach().clone().requires_grad_(x.is_floating_point()) for k, x in tensors.items()}
    out = function(**leaves, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves.values() if x.grad is not None)]


def assert_equal(found: list[Tensor], wanted: list[Tensor], allowed: float = 1e-5) -> None:
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=allowed, atol=allowed)


def check_call(swap: Swap, backend: str, case: Case, compiler: str = "aot_eager", **options: Any) -> None:
    """One call of the function, compiled, against eager mode."""
    swap = bound(swap, case)
    inputs = draw(swap, case)
    options = {**inputs.options, **options}
    mask = options.pop("attn_mask", None)
    tensors = {k: x.float() for k, x in {**inputs.tensors, **inputs.features}.items()}

    def call(mask: Tensor | None = mask, **tensors: Tensor) -> Tensor:
        return attnswap.attention(swap=swap, backend=backend, attn_mask=mask, **options, **tensors)

    compiled, counter = whole(call, compiler)
    found = results(compiled, tensors)
    assert counter.frame_count == 1
    assert_equal(found, results(call, tensors))


# --- the function -----------------------------------------------------------------------------------------------------


@pytest.mark.thinned(5)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("swap", SWAPS, ids=variant_id)
def test_a_call_is_one_graph(swap: Swap, backend: str):
    if backend not in backends_of(swap):
        pytest.skip("refused by the backend")
    check_call(swap, backend, Case(queries=7, keys=9))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("backend", ["folded", "chunked"])
def test_blocks_that_are_computed_again_are_part_of_the_graph(backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 2 * 4 * 9 * 3)
    for swap in (attnswap.Entmax(),) if backend == "chunked" else (attnswap.ForgettingGate(),):
        check_call(swap, backend, Case(queries=9, keys=9))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("mask", ["bool", "additive", "causal and bool"])
def test_masks_are_part_of_the_graph(mask: str):
    check_call(attnswap.Softpick(), "auto", Case(mask=mask))
    check_call(attnswap.SelectiveTemperature(init="paper"), "dense", Case(mask=mask))


@pytest.mark.parametrize(
    ("swap", "backend"),
    [
        pytest.param(attnswap.Entmax(), "dense", marks=pytest.mark.slow, id="dense"),
        pytest.param(attnswap.Entmax(alpha="learned"), "native", id="native"),
    ],
)
def test_inductor_computes_the_same(swap: Swap, backend: str):
    if backend not in backends_of(swap):
        pytest.skip("refused by the backend")
    check_call(swap, backend, Case(queries=20, keys=20, width=8, value_width=8), "inductor")


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "ramp",
    [0.0, 0.5, torch.tensor(0.3), torch.tensor([0.1, 0.2, 0.3, 0.4])],
    ids=["0", "0.5", "tensor", "tensor per head"],
)
def test_every_ramp_is_one_graph(ramp: Any):
    for swap in (attnswap.Softpick(), attnswap.Sigmoid(bias=-1.5)):
        torch._dynamo.reset()
        check_call(swap, "auto", Case(), ramp=ramp)


def test_a_swap_can_be_named_or_made_inside_the_function():
    """A swap made there reaches the kernels with its own options."""
    case = Case(width=8)
    tensors = {k: x.float() for k, x in draw(attnswap.Softpick(), case).tensors.items()}
    for make in (lambda: {"name": "sigmoid", "bias": -2.0}, lambda: attnswap.Softpick(eps=0.5)):

        def call(make: Any = make, **tensors: Tensor) -> Tensor:
            return attnswap.attention(swap=make(), is_causal=True, enable_gqa=True, **tensors)

        assert_equal(results(whole(call)[0], tensors), results(call, tensors))


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("softpick", "auto"),
        ("ssmax", "auto"),
        pytest.param("softpick", "dense", marks=pytest.mark.slow),
        pytest.param("entmax", "dense", marks=pytest.mark.slow),
        pytest.param("entmax", "auto", marks=pytest.mark.slow),
        pytest.param("ssmax", "dense", marks=pytest.mark.slow),
    ],
)
def test_a_second_length_compiles_once_more_and_others_never(name: str, backend: str):
    def call(**tensors: Tensor) -> Tensor:
        return attnswap.attention(swap=name, is_causal=True, backend=backend, **tensors)

    compiled, counter = whole(call)
    for length in (16, 24, 31):
        generator = torch.Generator().manual_seed(length)
        tensors = {k: torch.randn(1, 2, length, 8, generator=generator) for k in ("query", "key", "value")}
        assert_equal(results(compiled, tensors), results(call, tensors))
    assert counter.frame_count == 2


def test_a_length_marked_as_dynamic_is_compiled_once():
    compiled, counter = whole(lambda x: attnswap.attention(x, x, x, "softpick", is_causal=True))
    for length in (16, 24, 31):
        x = torch.randn(1, 2, length, 8)
        torch._dynamo.mark_dynamic(x, 2)
        assert_equal([compiled(x)], [attnswap.attention(x, x, x, "softpick", is_causal=True)])
    assert counter.frame_count == 1


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_checks_of_values_go_with_the_graph(compiler: str):
    x = torch.randn(1, 2, 6, 8)

    def call(mask: Tensor, ramp: Tensor) -> Tensor:
        return attnswap.attention(x, x, x, "softpick", attn_mask=mask, ramp=ramp, backend="dense")

    compiled, _ = whole(call, compiler)
    mask, ramp = torch.zeros(6, 6), torch.tensor(0.5)
    torch.testing.assert_close(compiled(mask, ramp), call(mask, ramp))
    for bad, what in ((-1e4, "only nearly"), (torch.nan, r"NaN or \+inf")):
        with pytest.raises(RuntimeError, match=what):
            compiled(mask + bad, ramp)
    with pytest.raises(RuntimeError, match="ramp must be in"):
        compiled(mask, ramp + 1)


def test_messages_go_into_generated_code_whatever_they_quote():
    """Inductor writes them into a string of C++ as they stand."""

    def call(x: Tensor) -> Tensor:
        ensure((x >= 0).all(), 'the swap "a" in C:\\swaps\nis below 0')
        return x + 1

    compiled, _ = whole(call, "inductor")
    assert torch.equal(compiled(torch.zeros(3)), torch.ones(3))
    with pytest.raises(RuntimeError, match="the swap 'a' in C:/swaps is below 0"):
        compiled(-torch.ones(3))


def test_a_gate_over_time_still_refuses_to_see_the_future():
    x, gate = torch.randn(1, 2, 6, 8), -torch.rand(1, 2, 6)

    def call(mask: Tensor) -> Tensor:
        return attnswap.attention(x, x, x, "forgetting-gate", attn_mask=mask, log_forget=gate, backend="dense")

    compiled, _ = whole(call)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(compiled(causal), call(causal))
    with pytest.raises(RuntimeError, match="queries see later keys"):
        compiled(torch.ones(6, 6, dtype=torch.bool))


def test_heads_that_share_a_value_still_need_one_ramp():
    x, kv, u = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6)
    swap = attnswap.SelectiveTemperature(init="paper", query=False)

    def call(ramp: Tensor) -> Tensor:
        return attnswap.attention(x, kv, kv, swap, enable_gqa=True, is_causal=True, ramp=ramp, value_temperature=u)

    compiled, _ = whole(call)
    fitting = torch.tensor([0.2, 0.2, 0.7, 0.7])
    torch.testing.assert_close(compiled(fitting), call(fitting))
    with pytest.raises(RuntimeError, match="share"):
        compiled(torch.tensor([0.2, 0.3, 0.7, 0.7]))


def test_the_tiled_backend_says_that_it_is_not_traced():
    x = torch.randn(1, 2, 6, 8)
    compiled, _ = whole(lambda x: attnswap.attention(x, x, x, "softpick", backend="tiled"))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r'it is not traced.*use backend="auto"'):
        compiled(x)


TRITON = """
import torch, attnswap
def call(q, k, v):
    return attnswap.attention(q, k, v, swap, is_causal=True, backend="triton")
for swap in (attnswap.Softpick(), attnswap.Sigmoid(bias="learned", max_positions=9), attnswap.SSMax(init="paper")):
    torch._dynamo.reset()
    leaves = [torch.randn(1, 2, 9, 16).requires_grad_() for _ in range(3)]
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    wanted = call(*leaves)
    slopes = zip(*(torch.autograd.grad(out.sum(), leaves) for out in (found, wanted)))
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in [(found, wanted), *slopes])
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_call_of_the_triton_kernels_is_one_graph():
    """In Triton's interpreter, which is chosen when a process starts."""
    subprocess.run([sys.executable, "-c", TRITON], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})


# --- the operator -----------------------------------------------------------------------------------------------------


def operator_arguments(swap: Swap, dtype: torch.dtype, layout: str) -> tuple[Any, ...]:
    """What the native operator takes for a call of two heads of keys and four of queries."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    query, key, value = (normal(2, heads, 9, 8, dtype=dtype) for heads in (4, 2, 2))
    features = {
        name: normal(4) if f.per == "head" else (-normal(2, 4, 9).detach().abs()).requires_grad_()
        for name, f in swap.features().items()
    }
    visibility = Visibility(9, 9, query.device)
    if layout == "mask":
        seen = torch.rand(2, 1, 9, 9, generator=generator) < 0.7
        visibility = replace(visibility, dense=seen, bias=torch.randn(1, 1, 9, 9, generator=generator))
    if layout == "padding":
        visibility = replace(visibility, key_valid=torch.rand(2, 9, generator=generator) < 0.6)
    more = {"sinks": normal(4), "softcap": 3.0} if layout == "sinks" else {}
    taken: list[Any] = []
    with mock.patch.object(native.ops, "forward", lambda *arguments: taken.extend(arguments) or query):
        native.attend(Problem(swap, query, key, value, visibility, features, 0.3, **more))
    native.ops._register()
    return tuple(taken)


@needs_compiler
@pytest.mark.parametrize(
    ("swap", "dtype", "layout"),
    [
        (attnswap.Softpick(), torch.float32, "causal"),
        (attnswap.Softpick(), torch.float32, "mask"),
        (attnswap.Softpick(), torch.float32, "sinks"),
        (attnswap.Sigmoid(bias="learned", max_positions=16), torch.float64, "padding"),
        (attnswap.SSMax(init="paper"), torch.float32, "sinks"),
        (attnswap.ForgettingGate(), torch.float32, "causal"),
        (attnswap.ForgettingGate(), torch.bfloat16, "causal"),
        (attnswap.Softpick(), torch.bfloat16, "padding"),
        (attnswap.Entmax(), torch.float32, "causal"),
        (attnswap.Entmax(alpha="learned"), torch.float32, "sinks"),
    ],
)
def test_the_native_operators_satisfy_torch(swap: Swap, dtype: torch.dtype, layout: str):
    arguments = operator_arguments(swap, dtype, layout)
    torch.library.opcheck(torch.ops.attnswap_native.forward.default, (*arguments, True))
    plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    out, shifts, inverses, mean = torch.ops.attnswap_native.forward(*plain, True)
    used = mean if mean.numel() else out
    wanted = [int(plain[native.ops.ORDER.index(name)] is not None) for name in DIFFERENTIABLE]
    given = (torch.randn_like(out), used, shifts, inverses, wanted, *plain, True)
    torch.library.opcheck(
        torch.ops.attnswap_native.backward.default, given, test_utils=("test_schema", "test_faketensor")
    )


# --- patched models ---------------------------------------------------------------------------------------------------


def patched_model(swap: Any, kind: str = "llama", layers_in_all: int = 1, **options: Any) -> PreTrainedModel:
    model = tiny(kind, layers_in_all)
    attnswap.patch(model, swap, **options)
    move_away(model, 20)
    return model


def step(model: PreTrainedModel, forward: Any, mask: Tensor | None = None) -> list[Tensor]:
    """The logits of a forward, and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    logits = forward(input_ids=TOKENS, attention_mask=mask, use_cache=False).logits
    logits = logits if mask is None else logits[mask.bool()]
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def check_model(model: PreTrainedModel, mask: Tensor | None = None, compiler: str = "aot_eager") -> None:
    compiled, counter = whole(model, compiler)
    found = step(model, compiled, mask)
    assert counter.frame_count == 1
    assert_equal(found, step(model, model, mask))


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("kind", "swap", "ramp", "padded"),
    [
        ("llama", "softpick", 1.0, False),
        ("llama", "forgetting-gate", 1.0, True),
        ("qwen3", "entmax", 1.0, False),
        ("gpt_oss", "sigmoid", 0.4, True),
        ("llama", "softpick+output-gate", 1.0, True),
        ("mistral", "elastic-softmax", 0.5, False),
        ("llama", "stick-breaking", 1.0, False),
        ("qwen3", "swat", 1.0, True),
    ],
)
def test_a_patched_model_is_one_graph(kind: str, swap: str, ramp: float, padded: bool):
    check_model(patched_model(swap, kind, ramp=ramp), PADDING if padded else None)


@pytest.mark.slow
def test_a_patched_model_in_inductor():
    check_model(patched_model("softpick"), PADDING, "inductor")


def test_some_layers_and_several_swaps_are_one_graph():
    swaps = {"softpick": [0, 1], "ssmax": [3]}
    check_model(patched_model(swaps, layers_in_all=2, layers=[1]))


@pytest.mark.parametrize("swap", ["softpick", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_moving_lambda_inside_the_ramp_compiles_nothing(swap: str):
    """A phase compiles once: the ramp, lambda 1 and lambda 0."""
    model = patched_model(swap, ramp=0.2)
    compiled, counter = whole(model)
    counts = []
    for ramp in (0.2, 0.3, 0.9, 1.0, 0.0, 0.5):
        attnswap.set_ramp(model, ramp)
        with torch.no_grad():
            found, wanted = (f(input_ids=TOKENS, use_cache=False).logits for f in (compiled, model))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts[:3] == [1, 1, 1]
    assert counts[3:] == [2, 3, 3]


def test_patching_and_unpatching_reach_a_compiled_model():
    model = tiny(layers=1)
    compiled, _ = whole(model)

    def logits(forward: Any) -> Tensor:
        with torch.no_grad():
            return forward(input_ids=TOKENS, use_cache=False).logits

    before = logits(compiled)
    attnswap.patch(model, "softpick")
    swapped = logits(model)
    assert (swapped - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(compiled), swapped, rtol=1e-5, atol=1e-5)
    attnswap.unpatch(model)
    torch.testing.assert_close(logits(compiled), before)


@pytest.mark.parametrize("fullgraph", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_changed_attention_implementation_raises_instead_of_computing_softmax(fullgraph: bool):
    """With ``fullgraph`` the error is torch's, which quotes ours."""
    model = patched_model("softpick")
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    compiled(input_ids=TOKENS, use_cache=False)
    model.config._attn_implementation = "eager"
    error = torch._dynamo.exc.Unsupported if fullgraph else UnsupportedModelError
    with pytest.raises(error, match="attention implementation changed"):
        compiled(input_ids=TOKENS, use_cache=False)


def decode(model: PreTrainedModel, forward: Any, cache: Any) -> Tensor:
    """Logits of six tokens, one at a time, after a prompt of ten that is run without compiling."""
    found = []
    with torch.no_grad():
        model(input_ids=TOKENS[:, :10], past_key_values=cache, use_cache=True)
        for i in range(10, 16):
            positions = torch.full((2, 1), i)
            step = TOKENS[:, i : i + 1]
            found.append(forward(input_ids=step, past_key_values=cache, position_ids=positions, use_cache=True).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    ("swap", "kind"),
    [
        ("forgetting-gate", "static"),
        pytest.param("softpick", "static", marks=pytest.mark.slow),
        pytest.param("entmax", "static", marks=pytest.mark.slow),
        pytest.param("forgetting-gate", "dynamic", marks=pytest.mark.slow),
    ],
)
def test_decoding_is_one_graph(swap: str, kind: str):
    model = patched_model(swap)

    def cache() -> Any:
        return (
            StaticCache(config=model.config, max_cache_len=32)
            if kind == "static"
            else DynamicCache(config=model.config)
        )

    compiled, counter = whole(model)
    found = decode(model, compiled, cache())
    with torch.no_grad():
        wanted = model(input_ids=TOKENS[:, :16], use_cache=False).logits[:, 10:]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= (1 if kind == "static" else 2)


@pytest.mark.slow
def test_a_new_cache_gets_its_gates_outside_of_a_graph():
    """A graph cannot make them: in one piece that is refused, and otherwise that forward runs in eager mode."""
    model = patched_model("forgetting-gate")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile those that follow"), torch.no_grad():
        whole(model)[0](input_ids=TOKENS[:, :10], past_key_values=DynamicCache(config=model.config))
    torch._dynamo.reset()
    found, wanted = (
        forward(input_ids=TOKENS[:, :10], past_key_values=DynamicCache(config=model.config)).logits
        for forward in (torch.compile(model, backend="aot_eager"), model)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_cache_filled_before_patching_is_refused_in_a_graph_too():
    model = tiny(layers=1)
    cache = DynamicCache(config=model.config)
    model(input_ids=TOKENS[:, :8], past_key_values=cache)
    attnswap.patch(model, "forgetting-gate")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="start from an empty cache"):
        whole(model)[0](input_ids=TOKENS[:, 8:9], past_key_values=cache, position_ids=torch.full((2, 1), 8))


def test_the_lambda_that_is_loaded_is_checked(tmp_path: Path):
    patched_model("softpick", ramp=0.5).save_pretrained(tmp_path)
    compiled, _ = whole(AutoModelForCausalLM.from_pretrained(tmp_path))
    compiled(input_ids=TOKENS, use_cache=False)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("ramp"))
    save_file({**weights, name: torch.tensor(0.7)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="one of them was edited"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# --- everything, slowly -----------------------------------------------------------------------------------------------


def traced_backends(swap: Swap) -> list[str]:
    return [name for name in backends_of(swap) if name != "tiled"]


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("swap", SWAPS, ids=variant_id)
def test_every_mask_is_part_of_the_graph(swap: Swap, mask: str):
    for backend in traced_backends(swap):
        torch._dynamo.reset()
        check_call(swap, backend, Case(mask=mask))


@pytest.mark.slow
@pytest.mark.parametrize("swap", variants(), ids=variant_id)
def test_every_config_is_one_graph(swap: Swap):
    """Also of fewer queries than keys, as in decoding, and in every phase of the ramp."""
    for backend in traced_backends(swap):
        for queries, ramp in ((1, 1.0), (6, 0.5)):
            torch._dynamo.reset()
            check_call(swap, backend, Case(queries=queries), ramp=ramp)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma2", "gpt_oss", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("swap", ["ssmax", "softpick", "sigmoid", "entmax", "selective-temperature", "forgetting-gate"])
def test_every_patched_model_is_one_graph(kind: str, swap: str):
    for ramp in (1.0, 0.4):
        for mask in (None, PADDING):
            torch._dynamo.reset()
            check_model(patched_model(swap, kind, 2, ramp=ramp), mask)
