"""An experiment trains what is missing, measures every control, and says what the losses say."""

import io
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from attnswap import swap_parameters
from attnswap.errors import ConfigError
from attnswap.evaluation.bootstrap import Comparison
from attnswap.healing import speed
from attnswap.healing.experiment import Experiment
from attnswap.healing.measurements import CachedMeasurements
from attnswap.healing.report import rows_of, table, title
from attnswap.healing.result import proof_of_use, recovered
from attnswap.training import Stages, parse_config
from tests.helpers.healing import TEXT, run, written
from tests.helpers.paths import ROOT
from tests.helpers.training import byte_tokenizer, recipe, tiny_gpt2, write_model


@pytest.mark.slow
def test_an_experiment_measures_every_control_and_is_not_done_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path)
    assert run(tmp_path) == 0, capsys.readouterr().err
    out = tmp_path / "out"
    result = json.loads((out / "result" / "result.json").read_text())
    assert {path.name for path in (out / "result").iterdir()} == {
        "result.json", "result.md", "result.png", "recipe.yaml", "steps.jsonl",
    }  # fmt: skip
    assert [entry["context"] for entry in result["contexts"]] == [32, 96]
    for entry in result["contexts"]:
        ppl = entry["perplexity"]
        assert set(ppl) == {"original", "control", "unhealed", "healed", "bypassed"}
        assert entry["ratio_to_control"]["ratio"] == pytest.approx(ppl["healed"] / ppl["control"], rel=1e-6)
        assert entry["ratio_to_original"]["ratio"] == pytest.approx(ppl["healed"] / ppl["original"], rel=1e-6)
        assert entry["unhealed_to_original"]["ratio"] == pytest.approx(ppl["unhealed"] / ppl["original"], rel=1e-6)
        assert entry["bypassed_to_healed"]["ratio"] == pytest.approx(ppl["bypassed"] / ppl["healed"], rel=1e-6)
        assert entry["ratio_to_control"]["lo"] <= entry["ratio_to_control"]["ratio"] <= entry["ratio_to_control"]["hi"]
    assert result["tokens"] == 7 * 2 * 64 + 3 * 2 * 100
    assert result["data"]["sha256"] == json.loads((out / "healed" / "summary.json").read_text())["data"]["sha256"]
    assert {"original", "unhealed", "healed"} == set(result["structure"])
    assert result["structure"]["original"]["row_sum"] == pytest.approx(1.0, abs=1e-5)
    assert result["structure"]["healed"]["row_sum"] < 1
    assert result["fidelity"]["kl"] > 0
    read = {point["step"]: point["tokens"] for point in result["curve"]}
    assert (read[7], read[10]) == (7 * 2 * 64, result["tokens"]), "windows of the second stage are longer"
    seen = result["held_out"]
    assert [(point["step"], point["tokens"]) for point in seen] == [(0, 0), (5, 5 * 2 * 64), (10, result["tokens"])]
    control = json.loads((out / "control" / "summary.json").read_text())["held_out_loss"]
    assert len({control, *(point["nll"] for point in seen)}) == 4
    assert all(point["ratio"] == pytest.approx(math.exp(point["nll"] - control)) for point in seen)
    assert result["structure_tokens"] == 2 * 96
    assert result["recipe"]["swap"] == {"name": "softpick"} or result["recipe"]["swap"] == "softpick"
    assert "attnswap" in json.loads((out / "healed" / "config.json").read_text())
    assert "attnswap" not in json.loads((out / "control" / "config.json").read_text())

    stamp = (out / "healed" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert run(tmp_path) == 0
    said = capsys.readouterr().out
    assert "training" not in said
    assert "measuring" not in said
    assert (out / "healed" / "model.safetensors").stat().st_mtime_ns == stamp

    (tmp_path / "held-out.txt").write_text("a cat sat on the mat. " * 60)
    assert run(tmp_path) == 0
    said = capsys.readouterr().out
    assert "training" not in said
    for name in ("original", "original-structure", "healed-structure", "healed-fidelity"):
        assert f"measuring {name}\n" in said, "measured on another text"

    written(tmp_path, output_dir=str(tmp_path / "second"), swap={"name": "softpick", "eps": 1e-3})
    assert run(tmp_path, "--control", str(out / "control")) == 0
    assert not (tmp_path / "second" / "control").exists()
    second = json.loads((tmp_path / "second" / "result" / "result.json").read_text())
    assert second["contexts"][0]["perplexity"]["control"] == result["contexts"][0]["perplexity"]["control"]

    written(tmp_path, output_dir=str(tmp_path / "third"), training={"eval_strategy": "no", "learning_rate": 0.02})
    assert run(tmp_path, "--control", str(out / "control")) == 2
    assert "training.learning_rate" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_one_of_another_recipe_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt

    steps: list[int] = []
    original = Stages.on_step_begin

    def note(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps.append(state.global_step)
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(Stages, "on_step_begin", note)
    for rate, begun in ((0.01, 5), (0.02, 0)):
        written(tmp_path, training={"eval_strategy": "no", "save_strategy": "steps", "save_steps": 5})
        with monkeypatch.context() as patch:
            patch.setattr(Stages, "on_step_end", stop)
            assert run(tmp_path) != 0
        written(
            tmp_path, training={"eval_strategy": "no", "save_strategy": "steps", "save_steps": 5, "learning_rate": rate}
        )
        steps.clear()
        if not begun:
            assert run(tmp_path) == 2
            assert "unfinished run of a recipe with other values of training.learning_rate" in capsys.readouterr().err
            assert (tmp_path / "out" / "healed.partial" / "checkpoint-5").is_dir()
        asked = ["training.resume_from_checkpoint=latest"] if begun else ["overwrite=true"]
        assert run(tmp_path, *asked) == 0, capsys.readouterr().err
        assert steps[0] == begun
        assert "resume" not in (tmp_path / "out" / "healed" / "recipe.yaml").read_text()
        folder = tmp_path / "out" / "result"
        assert "resume" not in (folder / "recipe.yaml").read_text()
        result = json.loads((folder / "result.json").read_text())
        assert yaml.safe_load((folder / "recipe.yaml").read_text()) == result["recipe"]
        if begun:
            shutil.rmtree(tmp_path / "out")
    written(tmp_path, training={"eval_strategy": "no", "learning_rate": 0.03})
    assert run(tmp_path) == 2
    assert "the result of a recipe with other values of training.learning_rate" in capsys.readouterr().err
    steps.clear()
    assert run(tmp_path, "overwrite=true") == 0, capsys.readouterr().err
    assert steps[0] == 0
    assert json.loads((folder / "result.json").read_text())["recipe"]["training"]["learning_rate"] == 0.03


@pytest.mark.parametrize("method", ["on_step_begin", "on_evaluate", "on_save"])
def test_a_signal_in_the_last_step_of_a_run_ends_the_experiment(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends by itself then, and what comes after it must not begin."""
    original = getattr(Stages, method)

    def killed(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 10 - (method == "on_step_begin"):
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, args, state, control, **kwargs)

    written(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Stages, method, killed)
        assert run(tmp_path) == 143
    assert "stopped by SIGTERM after the training of healed" in capsys.readouterr().err
    assert (tmp_path / "out" / "healed" / "summary.json").is_file()
    assert not list((tmp_path / "out").glob("control*"))


@pytest.mark.slow
def test_a_control_by_other_batches_or_of_other_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path)
    assert run(tmp_path) == 0, capsys.readouterr().err
    shutil.rmtree(tmp_path / "out" / "result")
    summary = tmp_path / "out" / "control" / "summary.json"
    right = json.loads(summary.read_text())
    for wrong, words in (
        ({"windows_per_step": 16}, "windows per step: 2 and 16"),
        ({"data": {**right["data"], "sha256": "0" * 64}}, "sha256 of the text"),
    ):
        summary.write_text(json.dumps(right | wrong))
        assert run(tmp_path) == 2
        assert words in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out" / "result").exists()


def test_contexts_too_short_to_see_attention_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path)
    assert run(tmp_path, "--contexts", "32,64") == 2
    assert "more than 64 tokens" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_swap_alone_is_the_model_that_training_started_from(tmp_path: Path) -> None:
    written(tmp_path)
    swap = {"name": "selective-temperature", "init": "paper"}
    experiment = Experiment(parse_config(recipe(tmp_path, swap=swap)), tmp_path / "out", text=TEXT)
    measurements = CachedMeasurements(experiment, byte_tokenizer())
    ours, theirs = (swap_parameters(measurements.unhealed()) for _ in range(2))
    assert any(p.std() > 0 for p in ours.values()), "it starts from noise"
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())


def test_a_swap_that_overflows_untrained_is_left_out_of_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = CachedMeasurements.unhealed

    def overflowing(self: CachedMeasurements, *args: Any, **kwargs: Any) -> Any:
        model = original(self, *args, **kwargs)
        model.get_output_embeddings().weight.data.fill_(math.nan)
        return model

    monkeypatch.setattr(CachedMeasurements, "unhealed", overflowing)
    written(tmp_path)
    assert run(tmp_path) == 0, capsys.readouterr().err
    assert "unhealed is left out of the result" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result" / "result.json").read_text())
    for entry in result["contexts"]:
        assert entry["recovered_fraction"] is None
        assert set(entry["perplexity"]) == {"original", "control", "healed", "bypassed"}
    shown = (tmp_path / "out" / "result" / "result.md").read_text()
    assert "nan" not in shown
    assert "nothing lost" not in shown
    assert "unhealed overflows" in shown
    assert title({**result, "heads": [0, 1], "layers": 0}).startswith("softpick, heads [0, 1] of layers 0 of")


@pytest.mark.slow
def test_a_recipe_that_fits_its_swap_first_is_measured_fitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, swap={"name": "sigmoid", "bias": "predicted"}, fit={"tokens": 300})
    assert run(tmp_path) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "out" / "result" / "result.json").read_text())
    for entry in result["contexts"]:
        assert entry["perplexity"]["fitted"] != entry["perplexity"]["unhealed"]
    assert (tmp_path / "out" / "healed" / "fitted.safetensors").is_file()


@pytest.mark.slow
def test_a_recipe_without_stages_is_healed_by_its_cross_entropy_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, stages=[])
    assert run(tmp_path) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "out" / "result" / "result.json").read_text())
    assert [point["step"] for point in result["curve"]] == list(range(1, 11))
    assert [point["tokens"] for point in result["curve"]] == [128 * step for step in range(1, 11)]
    assert "ce" not in result["curve"][0], "no stage has split the loss"


def test_what_cannot_be_measured_is_refused_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path)
    assert run(tmp_path, "--contexts", "32,4k") == 2
    assert "largest context needs at least 4096" in capsys.readouterr().err
    write_model(tmp_path / "learned", tiny_gpt2())
    assert run(tmp_path, "model.reference=" + str(tmp_path / "learned"), "--contexts", "32,256") == 2
    assert "cannot read windows of 256 tokens" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


FOUND = sorted((ROOT / "results").glob("*/result.json"))


@pytest.mark.parametrize("width", [80, 60, 30])
def test_no_number_of_the_closing_table_is_cut(width: int) -> None:
    """Whatever was measured, in a terminal of any width."""
    wanted = {True: "the swap is used", False: "the swap is not used", None: "starts as softmax"}
    seen = set()
    for file in FOUND:
        result = json.loads(file.read_text())
        for entry in result["contexts"]:
            entry["perplexity"]["unhealed"] = 1.5e10  # the widest of numbers
        console = Console(width=width, file=io.StringIO())
        console.print(table(result))
        printed = console.file.getvalue()  # type: ignore[attr-defined]
        assert "…" not in printed
        words = " ".join(printed.split())
        assert wanted[result["proof_of_use"]["used"]] in words
        assert f"{min(result['proof_of_use']['cost_of_bypass'].values()):+.1%} perplexity" in words
        seen.add(result["proof_of_use"]["used"])
        if width == 80:
            for cell in (cell for row in rows_of(result) for cell in row):
                assert cell in printed
    assert len(FOUND) > 5
    assert seen == {True, False, None}


def test_a_swap_is_needed_to_be_healed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="heals a swap"):
        Experiment(config=parse_config(recipe(tmp_path, swap="none")), out=tmp_path / "out")
    with pytest.raises(ConfigError, match="at a lambda of 1, not"):
        Experiment(config=parse_config(recipe(tmp_path, swap="softpick", ramp=0.05)), out=tmp_path / "out")


def test_what_was_recovered_is_null_where_nothing_was_lost() -> None:
    ppl = {"unhealed": 1e10, "control": 10.0, "healed": 100.0}
    hurt = Comparison(512, 1e9, math.log(1e9), 20.0, 21.0, 0.05)
    assert recovered(hurt, ppl) == pytest.approx(8 / 9), "a model at ten times its control is not whole"
    assert recovered(Comparison(512, 1.0, 0.0, -0.01, 0.01, 0.005), ppl) is None
    assert recovered(hurt, ppl | {"control": 2e10}) is None, "the control is no measure of what there was"


def test_proof_of_use_asks_for_five_percent_at_every_context() -> None:
    contexts = [{"context": n, "bypassed_to_healed": {"ratio": r}} for n, r in ((512, 1.2), (8192, 1.04))]
    moved = {"a.scale": {"largest": 0.5, "rms": 0.1}, "b.scale": {"largest": 0.7, "rms": 0.1}}
    found = proof_of_use(contexts, moved, identity=False)
    assert found["used"] is False
    assert found["cost_of_bypass"]["512"] == pytest.approx(0.2)
    assert found["movement"] == {"scale": 0.7}
    assert proof_of_use(contexts[:1], {}, identity=False)["used"] is True
    assert proof_of_use(contexts, moved, identity=True)["used"] is None


def test_a_step_of_each_stage_is_timed_beside_plain_distillation(tmp_path: Path) -> None:
    stages = [
        {"name": "outputs", "share": 0.5, "loss": {"transfer": 1.0, "ce": 0.0}, "train": "attention"},
        {"name": "logits", "share": 0.5, "loss": {"kl": 1.0, "ce": 0.0}, "sequence_length": 48},
    ]
    found = speed.measure(parse_config(recipe(tmp_path, swap="softpick", stages=stages)), rounds=3)
    assert [(entry["stage"], entry["length"]) for entry in found] == [("outputs", 64), ("logits", 48)]
    for entry in found:
        assert 0 < entry["least"] <= entry["ratio"] <= entry["largest"]
        assert min(entry["plain_seconds"], entry["healing_seconds"]) > 0
        assert entry["rounds"] == 3
    assert "| softpick | outputs | 64 |" in speed.table({"recipes": {"softpick": found}})


def test_recipes_are_timed_with_overrides(tmp_path: Path) -> None:
    stage = {"name": "logits", "share": 1.0, "loss": {"kl": 1.0, "ce": 0.0}}
    file = tmp_path / "short.yaml"
    file.write_text(yaml.safe_dump(recipe(tmp_path, swap="softpick", stages=[stage])))
    speed.main(str(tmp_path / "speed"), [str(file), "data.sequence_length=24"])
    found = json.loads((tmp_path / "speed" / "speed.json").read_text())
    assert [entry["length"] for entry in found["recipes"]["short"]] == [24]
    assert found["command"].endswith("short.yaml data.sequence_length=24")
    assert "| short | logits | 24 |" in (tmp_path / "speed" / "speed.md").read_text()
