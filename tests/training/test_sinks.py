"""The weight on the first token as a loss: beyond what is spared, and learning takes it away."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTJConfig, GPTJForCausalLM

import attnswap
from attnswap.attention.problem import Problem
from attnswap.evaluation.structure import FIRST_QUERY
from attnswap.surgery.call import LayerCall
from attnswap.training import Distillation, LossSection, chunked_loss, sinks
from attnswap.training.observing import observing
from attnswap.training.regression import RegressionLoss
from attnswap.training.sinks import SinkLoss
from tests.helpers.training import VOCABULARY, tiny_llama

TINY_GPTJ = GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=128)


def all_of(values: Any) -> Tensor:
    """Every position is text."""
    ids = values if isinstance(values, Tensor) else values["input_ids"]
    return torch.ones_like(ids, dtype=torch.bool)


def windows(lengths: list[int]) -> dict[str, Tensor]:
    """One window packed from documents of such lengths."""
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions}


def inputs_of(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values[name] for name in ("input_ids", "position_ids")}


@pytest.mark.parametrize("swap", ["softpick", {"name": "softpick", "anchor": 16, "keep_lone": True}, "ssmax", "entmax"])
@pytest.mark.parametrize("lengths", [[100], [90, 80]])
def test_it_is_the_weight_on_each_documents_first_token(
    monkeypatch: pytest.MonkeyPatch, swap: Any, lengths: list[int]
) -> None:
    monkeypatch.setattr(sinks, "QUERIES", 1000)  # all queries
    monkeypatch.setattr(sinks, "FREE_WEIGHT", 0.013)  # near the mean, so that some heads cost and others do not
    model, values = tiny_llama(), windows(lengths)
    attnswap.patch(model, swap, heads=[0, 2])
    with observing(model, SinkLoss(all_of(values))) as found:
        weights = model(**inputs_of(values), use_cache=False, output_attentions=True).attentions
    expected = []
    for layer in (0, 1):
        rows, start = [], 0
        for length in lengths:
            rows.append(weights[layer][0, [0, 2], start + FIRST_QUERY : start + length, start])
            start += length
        expected.append((torch.cat(rows, 1).mean(1) - 0.013).clamp(min=0).mean())
    assert torch.stack(found.means).tolist() == pytest.approx(torch.stack(expected).tolist(), rel=1e-4)


def test_some_queries_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "FREE_WEIGHT", 0.0)
    model, values = tiny_llama(), windows([400])
    attnswap.patch(model, "ssmax")
    draws = []
    for _ in range(60):
        with observing(model, SinkLoss(all_of(values))) as found, torch.no_grad():
            model(**inputs_of(values), use_cache=False)
        draws.append(found.mean())
    monkeypatch.setattr(sinks, "QUERIES", 1000)
    with observing(model, SinkLoss(all_of(values))) as found, torch.no_grad():
        model(**inputs_of(values), use_cache=False)
    assert len({float(draw) for draw in draws}) > 10
    assert float(torch.stack(draws).mean()) == pytest.approx(float(found.mean()), rel=0.25)


def test_short_texts_have_no_sinks() -> None:
    model, values = tiny_llama(), windows([FIRST_QUERY, FIRST_QUERY])
    attnswap.patch(model, "ssmax")
    with observing(model, SinkLoss(all_of(values))) as found:
        model(**inputs_of(values), use_cache=False)
    assert found.mean() == 0


def test_heads_that_are_no_sinks_cost_nothing() -> None:
    model, values = tiny_llama(), windows([200])
    attnswap.patch(model, "ssmax")
    with observing(model, SinkLoss(all_of(values))) as found:
        model(**inputs_of(values), use_cache=False)
    total = found.mean()
    assert total is not None
    total.backward()
    assert total == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_learning_takes_the_weight_away_and_the_log_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "FREE_WEIGHT", 0.0)
    model, values = tiny_llama(), windows([160])
    attnswap.patch(model, "ssmax")
    objective = Distillation(None, LossSection(ce=1.0, sinks=100.0))
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "self_attn" in n], lr=1e-2)
    model.train()
    logged = []
    with chunked_loss(model, objective=objective):
        for _ in range(25):
            optimizer.zero_grad()
            loss = model(**values).loss
            loss.backward()
            optimizer.step()
            means = objective.means()
            assert loss.item() == pytest.approx(means["ce"] + 100 * means["sinks"], rel=1e-4)
            logged.append(means["sinks"])
    assert logged[-1] < 0.2 * logged[0]


def test_observers_stand_side_by_side() -> None:
    model, values = tiny_llama(), windows([80])
    attnswap.patch(model, "ssmax")
    seen: list[str] = []

    def note(word: str) -> Any:
        def observe(call: LayerCall, slot: str, problem: Problem) -> None:
            seen.append(f"{word}{call.layer}")

        return observe

    with observing(model, note("a")):
        with observing(model, note("b")):
            model(**inputs_of(values), use_cache=False)
        assert seen == ["a0", "b0", "a1", "b1"]
        model(**inputs_of(values), use_cache=False)
    model(**inputs_of(values), use_cache=False)
    assert seen == ["a0", "b0", "a1", "b1", "a0", "a1"]


@pytest.mark.parametrize("make", [tiny_llama, lambda: GPTJForCausalLM(TINY_GPTJ)], ids=["llama", "gptj"])
def test_a_slot_at_lambda_0_is_seen_and_costs_nothing(make: Any) -> None:
    model = make().eval()
    ids = torch.randint(0, 100, (1, 20), generator=torch.Generator().manual_seed(0))
    expected = model(ids, use_cache=False).logits
    attnswap.patch(model, {"name": "sigmoid", "bias": "predicted"}, ramp=0.0)
    seen: list[tuple[int, float]] = []

    def observe(call: LayerCall, slot: str, problem: Problem) -> None:
        seen.append((call.layer, float(torch.as_tensor(problem.ramp).max())))

    looks = SinkLoss(all_of(ids)), RegressionLoss(all_of(ids))
    with observing(model, observe), observing(model, looks[0]) as found, observing(model, looks[1]) as errors:
        assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert seen == [(0, 0.0), (1, 0.0)]
    assert found.mean() is None
    assert errors.mean() > 0
