"""Calls and patched models on a device that is not the CPU: none of our tensors may stay behind.

torch's meta device computes shapes and dtypes alone, and refuses operands of two devices as a GPU does. The Triton
kernels stand in for all backends, as their operators say what they return.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import attnswap
from attnswap.attention.dispatch import BACKENDS
from attnswap.attention.visibility import Visibility
from attnswap.swaps import ModelInfo, resolve
from tests.helpers.tiny_models import ARCHITECTURES, SWAPS, tiny

META = torch.device("meta")


class NoAutocast(contextlib.nullcontext):
    """Autocast does not know the meta device."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__()


@contextlib.contextmanager
def meta_serves() -> Iterator[None]:
    """Gives the meta device what GPUs have: autocast, answers to yes-or-no questions, and the kernels."""
    real = Tensor.__bool__
    kernels = replace(BACKENDS["triton"], kernel_refusal=lambda problem: None, fast=lambda problem: True)
    with (
        mock.patch.object(Tensor, "__bool__", lambda x: True if x.device == META else real(x)),
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
        mock.patch.object(torch, "autocast", NoAutocast),
        mock.patch.dict(BACKENDS, {"triton": kernels}, clear=True),
    ):
        yield


def call(swap: str, dtype: torch.dtype, mask: str = "none") -> Tensor:
    """Runs a call forward and backward on the meta device and returns its output."""
    query, key, value = (torch.randn(2, n, 64, 32, device=META, dtype=dtype, requires_grad=True) for n in (4, 2, 2))
    bound = resolve(swap).bind(ModelInfo(4, 2, 64, 64))
    features = {}
    for name, feature in bound.features().items():
        heads = 4 if feature.heads == "query" else 2
        shape = feature.shape(2, heads, 64, 64, 32)
        features[name] = torch.zeros(shape, device=META, requires_grad=True)
    seen = {"bool": torch.bool, "additive": torch.float32}.get(mask)
    given = {} if seen is None else {"attn_mask": torch.ones(2, 1, 64, 64, device=META, dtype=seen)}
    with meta_serves():
        out = attnswap.attention(query, key, value, bound, is_causal=True, enable_gqa=True, **features, **given)
        out.sum().backward()
    assert all(x.grad is not None and x.grad.device == META for x in (query, key, value))
    return out


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("swap", SWAPS)
def test_a_call(swap: str, dtype: torch.dtype, mask: str) -> None:
    out = call(swap, dtype, mask)
    assert (out.device, out.dtype, out.shape) == (META, dtype, (2, 4, 64, 32))


def test_a_tensor_left_on_the_cpu_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Visibility, "key_index", lambda self: torch.arange(self.q_length))
    with pytest.raises(RuntimeError, match="device"):
        call("ssmax", torch.float32)


@pytest.mark.thinned(6)
@pytest.mark.parametrize("mode", ["plain", "left padding", "packed", "dynamic cache", "static cache"])
@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind != "gpt_oss"])  # its experts look at values
@pytest.mark.parametrize("swap", SWAPS)
def test_a_model(swap: str, kind: str, mode: str) -> None:
    model = tiny(kind)
    attnswap.patch(model, swap)
    model = model.to(META)
    tokens = torch.zeros(2, 20, dtype=torch.long, device=META)
    options = {
        "left padding": lambda: {"attention_mask": torch.ones_like(tokens)},
        "packed": lambda: {"position_ids": torch.arange(20, device=META).expand(2, -1), "use_cache": False},
        "dynamic cache": lambda: {"past_key_values": DynamicCache(config=model.config)},
        "static cache": lambda: {"past_key_values": StaticCache(config=model.config, max_cache_len=32)},
    }.get(mode, dict)()
    with meta_serves():
        logits = model(tokens, **options).logits
        logits.sum().backward()
        if "cache" in mode:
            with torch.no_grad():
                logits = model(tokens[:, :1], **options).logits
    assert logits.device == META
    assert all(p.grad is None or p.grad.device == META for p in model.parameters())
