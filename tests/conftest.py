"""Tiny models of every tested architecture, and a way to move a swap's parameters away from identity."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

import attnswap
from attnswap import swaps
from attnswap.surgery.module import child_of
from attnswap.surgery.stacks import find_stack

ARCHITECTURES = ["llama", "mistral", "qwen3", "gemma2", "gpt_oss", "gpt2", "gpt_neox"]
SWAPS = swaps.names()
VOCABULARY = 97
WINDOW = 6

settings.register_profile(
    "whole", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), max_examples=40
)
settings.register_profile("quick", settings.get_profile("whole"), max_examples=10)
settings.load_profile("quick")  # --hypothesis-profile=whole comes after this


@pytest.hookimpl(tryfirst=True)  # before what is slow is left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves all but one of n of a grid's cases to make test-all, so that each value of each axis stays."""
    for item in items:
        mark = item.get_closest_marker("thinned")
        if mark is not None and sum(item.callspec.indices.values()) % mark.args[0]:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.slow)


def tiny_config(kind: str, layers: int = 2) -> PreTrainedConfig:
    """A two-layer config of an architecture; sliding windows are ``WINDOW`` long."""
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        return GPT2Config(n_embd=32, n_layer=layers, n_head=4, n_positions=128, **tokens)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        **tokens,
    }
    if kind == "gpt_neox":
        return GPTNeoXConfig(**shape)
    shape |= {"num_key_value_heads": 2, "head_dim": 8}
    if kind == "llama":
        return LlamaConfig(**shape)
    if kind == "mistral":
        return MistralConfig(sliding_window=WINDOW, **shape)
    if kind == "qwen3":
        return Qwen3Config(**shape)
    if kind == "gemma2":
        return Gemma2Config(sliding_window=WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, **shape)
    if kind == "gpt_oss":
        return GptOssConfig(num_local_experts=2, num_experts_per_tok=1, sliding_window=WINDOW, **shape)
    raise ValueError(kind)


def tiny(kind: str = "llama", layers: int = 2, seed: int = 0) -> PreTrainedModel:
    """A random model of an architecture whose attention is far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, layers)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.25)
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            parameter.data.normal_(0, 1)
    return model


@torch.no_grad()
def move_away(model: nn.Module, length: int, seed: int = 1) -> None:
    """Moves every swap parameter away from identity.

    Per-token features get a standard deviation near 1 and the forgetting gate a half-life near half the length;
    ln n gets a coefficient that makes a wrong n visible.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, scale: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * scale

    for _, module in find_stack(model).modules.values():
        child = child_of(module)
        if child is None:
            continue
        for slot in child.children():
            for name, p in slot.named_parameters():
                if name == "gain":  # log f = gain * logsigmoid(x): about ln(1/2) after half the length
                    p.copy_(0.69 / (length / 2) / 0.69 * (1 + noise(p, 0.2).abs()))
                elif name.endswith("weight"):
                    p.copy_(noise(p, 1 / p.shape[-1] ** 0.5))
                elif name in ("scale", "position_gain"):
                    p.copy_(0.7 + noise(p, 0.2))
                else:
                    p.copy_(p + noise(p, 0.5))


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    """Two rows of twenty random tokens."""
    return torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def patched():
    """Builds a tiny patched model away from identity."""

    def build(kind: str = "llama", swap="ssmax", length: int = 20, **options) -> PreTrainedModel:
        model = tiny(kind)
        attnswap.patch(model, swap, **options)
        move_away(model, length)
        return model

    return build


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process whose Triton interprets kernels on the CPU."""
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}):
        pool = ProcessPoolExecutor(1, get_context("spawn"))
        pool.submit(torch.set_num_threads, 1).result()
    with pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def pytest_collection_finish() -> None:
    """Keeps what was imported out of searches through living objects, of which every patch makes several."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Lets what was kept out be freed in the end: libraries report as leaked what is not."""
    gc.unfreeze()
