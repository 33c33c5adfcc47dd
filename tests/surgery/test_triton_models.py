"""Patched models on the Triton kernels, on a GPU or in Triton's interpreter, against the dense reference in fp64."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

import attnswap
from attnswap.attention.dispatch import BACKENDS
from attnswap.swaps import resolve
from tests.helpers.calls import compare
from tests.helpers.devices import device_of
from tests.helpers.patched_models import LENGTH, layout, move_away
from tests.helpers.tiny_models import ARCHITECTURES, SWAPS, tiny
from tests.helpers.triton_calls import Worker

ON_GPU = device_of("triton") == "cuda"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="takes long without a GPU, where test_compile has the same checks")
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.slow,
]

KERNEL_SWAPS = [name for name in SWAPS if resolve(name).traits.route != "folded"]


@contextmanager
def only(backend: str) -> Iterator[None]:
    """Makes every call of the swaps run on one backend, or raise."""
    chosen = {backend: replace(BACKENDS[backend], fast=lambda problem: True)}
    with mock.patch.dict(BACKENDS, chosen, clear=True):
        yield


def patched(kind: str, swap: str, backend: str) -> PreTrainedModel:
    """A tiny patched model where a backend runs: in fp64 for the reference, else in fp32."""
    model = tiny(kind)
    if kind == "gpt_oss":
        model.set_experts_implementation("eager")  # the others have no fp64
    attnswap.patch(model, swap)
    move_away(model, LENGTH)
    return model.to(device_of(backend), torch.float64 if backend == "dense" else torch.float32)


def step(kind: str, swap: str, rows: str, backend: str) -> dict[str, Tensor]:
    """The logits of the visible tokens, and the gradient of every parameter."""
    model = patched(kind, swap, backend)
    given, mask, _ = layout(rows)
    given = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in given.items()}
    with only(backend):
        logits = model(**(given | {"use_cache": False})).logits[torch.from_numpy(mask).to(model.device)]
        logits.square().sum().backward()
    gradients = {f"gradient of {n}": p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return {"output": logits.detach().cpu(), **gradients}


@pytest.mark.parametrize("rows", ["left", "packed"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("swap", SWAPS)
def test_logits_and_gradients(worker: Worker, swap: str, kind: str, rows: str) -> None:
    found, wanted = worker(step, kind, swap, rows, "triton"), step(kind, swap, rows, "dense")
    assert found.keys() == wanted.keys()
    compare(found, wanted, 2e-5, 1e-4, f"{kind}, {swap}, {rows}")


@torch.no_grad()
def decode(kind: str, swap: str, cache: str, backend: str) -> Tensor:
    """Logits of a prompt in two pieces and of six more tokens, one at a time; without a cache those of one forward."""
    model = patched(kind, swap, backend)
    tokens = layout("plain")[0]["input_ids"].to(model.device)
    with only(backend):
        if cache == "none":
            return model(tokens, use_cache=False).logits.cpu()
        made = StaticCache(config=model.config, max_cache_len=LENGTH + 4)
        past = DynamicCache(config=model.config) if cache == "dynamic" else made
        edges = [0, 9, *range(14, LENGTH + 1)]
        parts = [model(tokens[:, start:stop], past_key_values=past).logits for start, stop in pairwise(edges)]
    return torch.cat(parts, 1).cpu()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["mistral", "gpt_oss"])
@pytest.mark.parametrize("swap", SWAPS)
def test_decoding_equals_one_forward(worker: Worker, swap: str, kind: str, cache: str) -> None:
    found, wanted = worker(decode, kind, swap, cache, "triton"), decode(kind, swap, "none", "dense")
    compare({"output": found}, {"output": wanted}, 2e-5, 0.0, f"{kind}, {swap}, {cache}")


# --- on a GPU alone ---------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("swap", KERNEL_SWAPS)
def test_a_gpu_takes_the_kernels_by_itself(swap: str) -> None:
    model, kernels = patched("llama", swap, "triton"), BACKENDS["triton"]
    counted = replace(kernels, attend=mock.Mock(wraps=kernels.attend))
    with mock.patch.dict(BACKENDS, {"triton": counted}):
        model(torch.ones(1, 8, dtype=torch.long, device="cuda"))
    assert counted.attend.call_count == model.config.num_hidden_layers


@needs_gpu
@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
@pytest.mark.parametrize("swap", SWAPS)
def test_a_compiled_model_is_one_graph(swap: str, kind: str) -> None:
    """The code of Inductor around the kernels, forward and backward."""
    torch.compiler.reset()
    model = patched(kind, swap, "triton")
    tokens = layout("plain")[0]["input_ids"].cuda()
    found = []
    for forward in (torch.compile(model, fullgraph=True), model):
        model.zero_grad(set_to_none=True)
        logits = forward(input_ids=tokens, use_cache=False).logits
        logits.square().mean().backward()
        found.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("swap", SWAPS)
@torch.no_grad()
def test_generation_with_a_compiled_static_cache(swap: str) -> None:
    torch.compiler.reset()
    model = patched("llama", swap, "triton")
    tokens = layout("plain")[0]["input_ids"].cuda()
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    how = CompileConfig(fullgraph=True)
    made = model.generate(tokens, cache_implementation="static", compile_config=how, **options)
    right = model(made.sequences[:, :-1], use_cache=False).logits[:, LENGTH - 1 :]
    assert (torch.stack(made.logits, 1) - right).abs().max() < 1e-4


def smollm2() -> LlamaForCausalLM:
    """A random Llama of the shape of SmolLM2-135M, in fp32 on the GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("cuda"):
        return LlamaForCausalLM(config).eval()


def deviation(found: Tensor, wanted: Tensor) -> float:
    """The norm of a difference relative to the norm of what is right."""
    return float((found.float() - wanted).norm() / wanted.norm())


@needs_gpu
@pytest.mark.parametrize("swap", SWAPS)
def test_bf16_is_as_exact_as_that_of_the_unpatched_model(swap: str) -> None:
    """2048 tokens through 30 layers: the rounding of bf16 moves the patched model as far as it moves the original."""
    tokens = torch.randint(3, 49152, (1, 2048), generator=torch.Generator().manual_seed(0)).cuda()
    model = smollm2()
    with torch.no_grad():
        exact = model(tokens).logits
        allowed = 2 * deviation(model.bfloat16()(tokens).logits, exact)
        del exact
        model = smollm2()
        attnswap.patch(model, swap)
        with only("chunked"):
            exact = model(tokens).logits
        assert deviation(model.bfloat16()(tokens).logits, exact) <= max(allowed, 0.02)
    model.train()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
