"""The proof of a patch: cheap where that shows enough, and the whole model's otherwise."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import attnswap
from attnswap.attention.dispatch import BACKENDS, Backend
from attnswap.attention.problem import Problem
from attnswap.errors import UnsupportedModelError
from attnswap.surgery.probe import _sees_offsets
from tests.helpers.tiny_models import tiny


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[nn.Linear]:
    """The linear layers that multiplied, in order."""
    found: list[nn.Linear] = []
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: found.append(self) or original(self, x))
    return found


def outside(model: nn.Module) -> list[nn.Linear]:
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "self_attn" not in name]


def test_nothing_is_multiplied_outside_of_attention(ran: list[nn.Linear]):
    model = tiny("llama")
    attnswap.patch(model, "softpick")
    assert ran and not {id(m) for m in ran} & {id(m) for m in outside(model)}
    assert not any("forward" in vars(m) for m in model.modules())


class Exact(nn.Module):
    """A block that takes nothing but the products of its matrix."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        if not torch.allclose(out, x @ self.inner.weight.T, atol=1e-5):
            raise ValueError("these are not the products")
        return out


def test_a_model_that_does_not_run_without_its_products_is_proved_whole(ran: list[nn.Linear], tokens: Tensor):
    model, stock = tiny("llama"), tiny("llama")
    model.model.layers[1].mlp.up_proj = Exact(model.model.layers[1].mlp.up_proj)
    attnswap.patch(model, "softpick", ramp=0.0)
    assert {id(m) for m in ran} >= {id(m) for m in outside(model)}
    assert torch.equal(model(tokens).logits, stock(tokens).logits)


class Mixing(nn.Linear):
    """Stands for a product of another kind, which runs as it is."""


def test_only_plain_linear_layers_are_left_out(ran: list[nn.Linear]):
    model = tiny("llama")
    model.lm_head.__class__ = Mixing
    hooked = model.model.layers[0].mlp.up_proj
    hooked.forward = lambda x: nn.functional.linear(x, hooked.weight)  # as a library that offloads does
    kept = hooked.forward
    attnswap.patch(model, "softpick")
    assert any(m is model.lm_head for m in ran) and vars(hooked)["forward"] is kept


@pytest.mark.parametrize("biased", [False, True])
def test_tokens_that_are_all_alike_prove_nothing(biased: bool, ran: list[nn.Linear]):
    """No mask could be seen to be wrong, so the whole model runs."""
    model = tiny("llama")
    model.model.embed_tokens = nn.Sequential(model.model.embed_tokens, Flat(), nn.Linear(32, 32))
    for layer in model.model.layers:
        layer.self_attn.v_proj.bias = nn.Parameter(torch.linspace(-1, 1, 16) * biased)
    attnswap.patch(model, "softpick")
    assert {id(m) for m in ran} >= {id(m) for m in outside(model)}


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("swap", ["softpick", "output-gate", "stick-breaking", "ssmax"])
@pytest.mark.parametrize("broken", [True, False], ids=["broken", "sound"])
def test_a_swap_that_is_computed_as_something_else_is_refused(swap: str, broken: bool, monkeypatch: pytest.MonkeyPatch):
    """The seam alone would be proven by softmax: here each backend drops what makes the swap another one."""
    model = tiny("llama")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    if not broken:
        attnswap.patch(model, swap)
        return

    def plain(self: Backend, problem: Problem) -> Tensor:
        if problem.swap.name == "softmax" or problem.dtype == torch.float64:
            return real(self, problem)
        softmax = replace(problem, swap=attnswap.Softmax(), features={}, ramp=1.0)
        return real(BACKENDS["chunked"], softmax) * 1.01  # also for swaps that start as softmax

    real = Backend.attend
    monkeypatch.setattr(Backend, "attend", plain)
    with pytest.raises(UnsupportedModelError, match=f'"{swap}" comes out'):
        attnswap.patch(model, swap)
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    ("swap", "sees"),
    [
        ("softmax", False),
        ("entmax", False),
        ("elastic-softmax", False),
        ("top-k", False),
        ("gumbel-softmax", False),
        ("softpick", True),
        ("sigmoid", True),
        ("stick-breaking", True),
        ("scale-invariant", True),
        ("lssa", True),
        ("swat", True),
    ],
)
def test_what_a_constant_in_a_row_of_scores_changes(swap: str, sees: bool):
    ready = attnswap.swaps.resolve(swap).bind(attnswap.swaps.ModelInfo(1, 1, 8, 16, 4))
    assert _sees_offsets(ready) == sees
