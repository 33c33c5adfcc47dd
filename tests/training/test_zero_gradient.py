"""A control that learns from itself alone: the steps that cannot move it are not computed, all others are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from attnswap.healing.run import same_weights
from attnswap.training import SwapTrainer, parse_config, train
from attnswap.training.zero_gradient import CHECKED_STEPS
from tests.helpers.healing import run, written
from tests.helpers.training import recipe

TWO = [
    {"name": "outputs", "share": 0.1, "loss": {"transfer": 1.0, "ce": 0.0}, "train": "attention"},
    {"name": "logits", "share": 0.5, "loss": {"kl": 1.0, "ce": 0.0}, "train": "attention"},
    {"name": "long", "share": 0.4, "loss": {"kl": 1.0, "ce": 0.0}, "sequence_length": 100},
]
MIXED = {"bf16": True, "weight_decay": 0.0, "eval_strategy": "no"}


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({}, 9 - 2 * CHECKED_STEPS),
        ({"stages": [{"name": "logits", "share": 1.0, "loss": {"kl": 0.9, "ce": 0.1}}]}, 0),
        ({"training": MIXED | {"bf16": False}}, 9 - 2 * CHECKED_STEPS),
        ({"training": MIXED | {"weight_decay": 0.1}}, 0),
        ({"swap": "softpick"}, 0),
    ],
    ids=["mixed precision", "cross entropy", "float32", "weight decay", "with a swap"],
)
def test_steps_are_left_out_only_where_none_can_move_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], left: int
) -> None:
    computed: list[int] = []
    loss = SwapTrainer.compute_loss

    def note(self: SwapTrainer, *args: Any, **kwargs: Any) -> Any:
        computed.append(self.state.global_step)
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(SwapTrainer, "compute_loss", note)
    values: dict[str, Any] = {"swap": "none", "stages": TWO, "training": MIXED} | changes
    result = train(parse_config(recipe(tmp_path, **values)))
    assert result.summary["steps_at_rest"] == left
    assert len(computed) == result.summary["steps"] - left
    assert result.summary["skipped_steps"] == []
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(result.output_dir / "model.safetensors")
    same = all(torch.equal(before[name], after[name]) for name in before)
    assert same == (left > 0)


def test_a_control_at_rest_is_the_original_and_not_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, stages=TWO, training=MIXED)
    assert run(tmp_path) == 0, capsys.readouterr().err
    assert "measuring control\n" not in capsys.readouterr().out
    folder = tmp_path / "out" / "result"
    result = json.loads((folder / "result.json").read_text())
    assert result["control_steps"] == {"steps": 9, "steps_at_rest": 9 - 2 * CHECKED_STEPS}
    assert [entry["control_to_original"]["ratio"] for entry in result["contexts"]] == [1.0, 1.0]
    assert "3 of its 9 steps were skipped" in (folder / "result.md").read_text()
    model, control, healed = (str(tmp_path / name) for name in ("model", "out/control", "out/healed"))
    assert same_weights(control, model)
    assert not same_weights(healed, model)


def test_where_only_swaps_are_trained_the_control_is_the_original(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [{"name": "swaps", "share": 1.0, "loss": {"kl": 1.0, "ce": 0.0}, "train": "swap"}]
    written(tmp_path, swap="ssmax", stages=stages, training=MIXED)
    assert run(tmp_path) == 0, capsys.readouterr().err
    assert not (tmp_path / "out" / "control").exists()
    result = json.loads((tmp_path / "out" / "result" / "result.json").read_text())
    assert [entry["control_to_original"]["ratio"] for entry in result["contexts"]] == [1.0, 1.0]
    assert set(result["seconds"]) == {"healed"}
    written(tmp_path, swap="ssmax", training=MIXED, optimizer={"freeze": "all_but_swap"})
    assert run(tmp_path, "--control", str(tmp_path / "out" / "healed")) == 2
    assert "trains nothing" in capsys.readouterr().err
