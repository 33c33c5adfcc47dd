"""Calibration by least squares: initial values that are fitted to the original attention."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import attnswap
from attnswap.errors import ConfigError
from attnswap.swaps import predicted
from attnswap.swaps.base import Call, Observed
from attnswap.training import fit, parse_config, train
from attnswap.training.run import FITTED
from tests.helpers.training import VOCABULARY, cut_off, recipe, tiny_llama


@pytest.mark.slow
def test_a_fitted_sigmoid_is_nearer_to_what_the_model_was() -> None:
    model = tiny_llama(hidden_size=64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(6)
            layer.self_attn.k_proj.weight.mul_(6)
    ids = torch.randint(4, VOCABULARY, (8, 100), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    attnswap.patch(model, {"name": "sigmoid", "bias": "predicted"})
    raw = (model(ids).logits - expected).square().mean()
    errors = fit(model, [{"input_ids": ids[:6]}])
    assert set(errors) == {"0.sigmoid", "1.sigmoid"}
    assert all(0 < error < 1 for error in errors.values())
    assert model.model.layers[0].self_attn.attnswap.sigmoid.ramp.item() == 1.0, "lambda is where it was"
    held_out = (model(ids[6:]).logits - expected[6:]).square().mean()
    assert held_out < 0.7 * raw
    attnswap.set_ramp(model, {0: 0.25, 1: (0.0, 0.0, 1.0, 1.0)})
    spec = copy.deepcopy(model.config.attnswap)
    fit(model, [{"input_ids": ids[:6]}])
    assert model.config.attnswap == spec, "of each head"
    plain = tiny_llama()
    attnswap.patch(plain, "ssmax")
    with pytest.raises(ConfigError, match="can be fitted"):
        fit(plain, [{"input_ids": ids}])
    with pytest.raises(ConfigError, match="not patched"):
        fit(tiny_llama(), [{"input_ids": ids}])
    with pytest.raises(ConfigError, match="no text"):
        fit(model, [])


def call_of(n: torch.Tensor, features: dict[str, torch.Tensor]) -> Call:
    """A call of which n and the features alone are read."""
    unread = torch.empty(0)
    return Call(n, features, 1.0, torch.arange(n.shape[-1]), unread, unread, unread, 1.0)


def test_a_network_finds_what_a_linear_map_of_the_hidden_state_cannot() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(6000, 8, generator=generator)
    n = torch.randint(1, 100, (6000,), generator=generator).float()
    query = hidden @ torch.randn(8, 2, generator=generator)
    logsumexp = (query + 0.02 * query.square() + n.log()[:, None]).T
    left = {}
    for units in (0, 32):
        with torch.no_grad():
            found, missed = predicted.fit(Observed(hidden[:5000], {}, n[:5000]), logsumexp[:, :5000], units)
            assert set(found) == {*predicted.gate_parameters(units), "offset", "slope"}
            features = predicted.gates(hidden[None, 5000:], found) | {k: found[k][:, None] for k in ("offset", "slope")}
        told = predicted.predicted(call_of(n[None, None, 5000:], features))
        left[units] = float((told[0] - logsumexp[:, 5000:]).square().mean())
        assert missed == pytest.approx(left[units] ** 0.5, rel=0.2)
    assert left[32] < 0.1 * left[0]


@pytest.mark.parametrize(("units", "bound"), [(0, 0.2), (16, 0.05)])  # at the least squares it is 0.38
@pytest.mark.parametrize("limit", [None, 2.0])
def test_a_fitted_sigmoid_gives_rows_the_sum_they_had(units: int, bound: float, limit: float | None) -> None:
    """A key that has its row for itself wants a level far below the logsumexp, one of four ln 3 / 4 of it above."""
    hidden = torch.eye(2).repeat_interleave(600, 0)
    n = torch.full((1200,), 9.0)
    logsumexp = torch.cat([torch.full((1, 600), 3.0), torch.full((1, 600), 5.0)], 1)
    squares = torch.cat([torch.full((1, 600), 6.0), torch.full((1, 600), 10 - math.log(4))], 1)
    swap = attnswap.Sigmoid(bias="predicted", units=units, row_limit=limit)
    with torch.no_grad():
        found, missed = swap.fit(Observed(hidden, {1.0: logsumexp, 2.0: squares}, n))
        features = swap.gates(torch.eye(2)[None], found) | {k: found[k][:, None] for k in ("offset", "slope")}
    level = predicted.predicted(call_of(torch.full((1, 1, 2), 9.0), features))[0, 0]
    sums = torch.stack([torch.sigmoid(3.0 - level[0]), 4 * torch.sigmoid(5 - math.log(4) - level[1])])
    if limit is not None:
        sums = sums / (1 + (sums - 1) / limit)
    assert missed == pytest.approx(float((sums - 1).square().mean().sqrt()), rel=1e-3)
    assert missed < bound


@pytest.mark.slow
def test_a_resumed_run_begins_where_it_was_fitted_without_fitting_again(tmp_path: Path) -> None:
    steps = {"max_steps": 10, "save_steps": 5, "save_strategy": "steps", "eval_strategy": "no"}
    values = recipe(
        tmp_path, swap={"name": "sigmoid", "bias": "predicted"}, fit={"tokens": 300}, ramp=1.0, training=steps
    )
    whole = train(parse_config({**values, "output_dir": str(tmp_path / "whole")}))

    cut_off(values, 7)
    values["training"] = {**values["training"], "resume_from_checkpoint": "latest"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnswap.training.run.fit_swaps", None)
        resumed = train(parse_config(values))
    assert resumed.movement == whole.movement
    assert resumed.summary["fit_tokens"] == whole.summary["fit_tokens"] == 320
    log = [json.loads(line) for line in (resumed.output_dir / "steps.jsonl").open()]
    spent = [entry["fit_runtime"] for entry in log if "fit_runtime" in entry]
    assert len(spent) == 1
    assert resumed.summary["seconds"] > spent[0] > 0
    assert (resumed.output_dir / FITTED).read_bytes() == (whole.output_dir / FITTED).read_bytes()


def test_a_fit_looks_at_as_many_tokens_of_each_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def look(model: Any, batches: Any) -> dict[str, float]:
        seen.extend(tuple(batch["input_ids"].shape) for batch in batches)
        return {}

    monkeypatch.setattr("attnswap.training.run.fit", look)
    values = recipe(
        tmp_path,
        swap={"name": "sigmoid", "bias": "predicted"},
        fit={"tokens": 1000, "sequence_lengths": [64, 100]},
        ramp=1.0,
        training={"max_steps": 1, "eval_strategy": "no"},
    )
    assert train(parse_config(values)).summary["fit_tokens"] == 8 * 64 + 5 * 100
    assert seen == [(1, 64)] * 8 + [(1, 100)] * 5
    values["fit"] = {"sequence_lengths": [64, 129]}
    with pytest.raises(ConfigError, match=r"fit.sequence_lengths: must be at most 128"):
        train(parse_config({**values, "output_dir": str(tmp_path / "other")}))
    values["fit"] = {"sequence_lengths": []}
    with pytest.raises(ConfigError, match="must be positive"):
        parse_config(values)
