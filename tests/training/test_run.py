"""A whole run: the loss falls, the result reloads, the swap moves, and two processes train as one does."""

import itertools
import json
import math
import os
import signal
import sys
import timeit
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnswap
from attnswap.cli import main
from attnswap.devices import has_bf16_instructions
from attnswap.errors import ConfigError, NumericsError
from attnswap.loading import load_model
from attnswap.training import (
    SwapTrainer,
    TrainResult,
    latest_checkpoint,
    load_config,
    load_data,
    parse_config,
    train,
)
from attnswap.training.config import to_mapping
from tests.helpers.paths import FIXTURES, ROOT
from tests.helpers.training import accelerate, byte_tokenizer, documents, logged, recipe, tiny_llama, write_model

IDS = torch.arange(4, 44)[None]


def test_an_old_recipe_trains_to_the_same_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages, a ramp head by head, a teacher and a swap's options, all under the names they had at first."""
    fixture = FIXTURES / "recipe"
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(documents()), encoding="utf-8")
    train(load_config(fixture / "recipe.yaml"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = model(IDS).logits[0, -1, :8]
    assert torch.allclose(found, torch.tensor(json.loads((fixture / "logits.json").read_text())), atol=1e-4)


def run(tmp_path: Path, **changes: Any) -> TrainResult:
    return train(parse_config(recipe(tmp_path, **changes)))


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return attnswap.from_pretrained(directory)(IDS).logits


def test_training_lowers_the_loss_and_leaves_a_complete_result(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = {"swap": {"name": "ssmax"}, "data": {"eval_windows": 3}}
    recipe(tmp_path)
    capfd.readouterr()  # what saving the tiny model printed
    result = run(tmp_path, **changes)
    out, summary = result.output_dir, result.summary
    assert out == tmp_path / "out"
    assert not (tmp_path / "out.partial").exists()
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "steps.jsonl"} <= names
    assert not {name for name in names if name.endswith(".bin") or name.startswith("checkpoint")}
    assert json.loads((out / "summary.json").read_text()) == summary

    losses = logged(out, "loss")
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 1
    assert summary["held_out_loss"] < summary["held_out_loss_before"] - 1
    assert json.loads((out / "training_log.json").read_text())[1]["loss"] == losses[0]
    assert to_mapping(load_config(out / "recipe.yaml")) == to_mapping(parse_config(recipe(tmp_path, **changes)))
    assert "%|" not in capfd.readouterr().err, "no progress bar where there is no terminal"

    moved = json.loads((out / "movement.json").read_text())
    assert moved.keys() == result.movement.keys() == attnswap.swap_parameters(attnswap.from_pretrained(out)).keys()
    weights = load_file(out / "model.safetensors")
    for name, value in moved.items():  # SSMax starts at scale 0 and offset 1
        change = weights[name] - (1.0 if name.endswith("offset") else 0.0)
        assert value["largest"] == pytest.approx(change.abs().max().item(), rel=1e-6)
        assert value["largest"] > 1e-3
        assert value["rms"] == pytest.approx(change.square().mean().sqrt().item(), rel=1e-6)
    assert logged(out, "moved_scale")[-1] == pytest.approx(summary["moved"]["scale"]["largest"])
    assert json.loads((out / "config.json").read_text())["use_cache"] is True


def test_the_held_out_loss_is_that_of_every_document_on_its_own(tmp_path: Path) -> None:
    result = run(tmp_path, swap="ssmax", training={"per_device_eval_batch_size": 3})
    config = parse_config(recipe(tmp_path))
    model = attnswap.from_pretrained(result.output_dir)
    nll = tokens = 0.0
    for row in load_data(config.data, AutoTokenizer.from_pretrained(result.output_dir)).held_out:
        borders = [*(row["position_ids"] == 0).nonzero()[:, 0].tolist(), len(row["labels"])]
        for start, end in itertools.pairwise(borders):
            ids, labels = row["input_ids"][None, start:end], row["labels"][start + 1 : end]
            with torch.no_grad():
                each = torch.log_softmax(model(ids).logits[0, :-1].double(), -1).gather(1, ids[0, 1:, None])[:, 0]
            nll -= each[labels != -100].sum().item()
            tokens += int((labels != -100).sum())
    assert result.summary["held_out_tokens"] == tokens
    assert result.summary["held_out_loss"] == pytest.approx(nll / tokens, abs=1e-5)


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    """A huge learning rate makes every step worse than the first, so the first checkpoint must be the result."""
    result = run(tmp_path, training={"learning_rate": 3.0, "eval_steps": 2, "max_steps": 6})
    evaluations = logged(result.output_dir, "eval_loss")[1:]
    assert result.summary["held_out_loss"] == min(evaluations)
    assert result.summary["best_step"] == 2 * (1 + evaluations.index(min(evaluations))) < 6


SCHEDULES = {
    "whole steps beside a share": {"eval_steps": 0.25, "save_steps": 4},
    "rounded shares": {"eval_steps": 0.25, "save_steps": 0.5},
    "saves never come": {"eval_steps": 3, "save_steps": 99},
    "saves of the best": {"eval_steps": 3, "save_strategy": "best"},
    "evaluated late": {"eval_steps": 2, "eval_delay": 5},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_summary_is_of_the_weights_that_were_saved(schedule: str, tmp_path: Path) -> None:
    """A huge learning rate makes the first evaluation the best, whose step may not be one that is saved."""
    training = {"max_steps": 9, "learning_rate": 3.0, "load_best_model_at_end": True} | SCHEDULES[schedule]
    result = run(tmp_path, training=training)
    summary = result.summary
    found = dict(zip(logged_steps(result.output_dir), logged(result.output_dir, "eval_loss"), strict=True))
    found.pop(0)
    assert summary["held_out_loss"] == min(found.values())
    assert found[summary["best_step"]] == summary["held_out_loss"]
    assert summary["best_step"] < 9
    again = run(
        tmp_path,
        output_dir=str(tmp_path / "again"),
        model={"reference": str(result.output_dir)},
        training={"max_steps": 1, "learning_rate": 0.0},
    )
    assert again.summary["held_out_loss_before"] == pytest.approx(summary["held_out_loss"], abs=1e-5)


def logged_steps(directory: Path) -> list[int]:
    """Returns the step of each evaluation."""
    return [entry["step"] for entry in map(json.loads, (directory / "steps.jsonl").open()) if "eval_loss" in entry]


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({"eval_strategy": "no", "save_steps": 2}, [2, 4, 5]),
        ({"eval_strategy": "no"}, []),
        ({"eval_strategy": "no", "save_strategy": "no", "save_steps": 2}, []),
        ({"eval_strategy": "epoch", "save_steps": 2, "load_best_model_at_end": False}, [2, 4, 5]),
        ({"eval_steps": 4}, [4, 5]),
    ],
)
def test_checkpoints_are_saved_when_the_recipe_says(
    training: dict[str, Any], steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(
        "attnswap.training.durable.mark_complete", lambda folder: saved.append(int(folder.name.split("-")[1]))
    )
    run(tmp_path, training={"max_steps": 5, "learning_rate": 1e-3} | training)
    assert saved == steps


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    changes = {"swap": "ssmax", "training": {"gradient_accumulation_steps": 2, "max_steps": 6, "eval_steps": 2}}
    changes["data"] = {"eval_windows": 3}  # of which one process gets two, and the other one and a repeated one
    single = run(tmp_path, **changes)
    changes["training"] |= {"per_device_train_batch_size": 1}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(recipe(tmp_path, **changes)))
    done = accelerate(2, "recipes/train.py", str(tmp_path / "two.yaml"), f"output_dir={tmp_path}/two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("held-out loss") == 1, "the table is printed once"
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["processes"] == 2
    assert summary["windows_per_step"] == single.summary["windows_per_step"] == 4
    for key in ("loss", "eval_loss", "grad_norm"):
        one, two = logged(single.output_dir, key), logged(tmp_path / "two", key)
        assert len(one) == len(two)
        assert one == pytest.approx(two, abs=1e-5 if key != "grad_norm" else 1e-4)
    assert logged(tmp_path / "two", "loss")[-1] < logged(tmp_path / "two", "loss")[0]
    torch.testing.assert_close(logits(tmp_path / "two"), logits(single.output_dir), atol=1e-4, rtol=0)


@pytest.mark.parametrize("swap", ["ssmax", "forgetting-gate"])
def test_frozen_weights_stay_bitwise_and_the_swap_learns(tmp_path: Path, swap: str) -> None:
    result = run(
        tmp_path, swap=swap, optimizer={"freeze": "all_but_swap"}, training={"max_steps": 20, "weight_decay": 0.1}
    )
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "model", result.output_dir))
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert result.summary["parameters_trained"] == result.summary["parameters_of_swap"] > 0
    assert result.summary["held_out_loss"] < result.summary["held_out_loss_before"]
    assert max(moved.largest for moved in result.movement.values()) > 1e-3


def test_a_saved_swap_is_trained_on(tmp_path: Path) -> None:
    first = run(tmp_path, swap="ssmax", output_dir=str(tmp_path / "first"))
    reference = {"reference": str(first.output_dir)}
    second = run(tmp_path, model=reference, swap="none", optimizer={"freeze": "all_but_swap"})
    assert second.summary["held_out_loss_before"] == pytest.approx(first.summary["held_out_loss"], abs=1e-5)
    assert second.summary["held_out_loss"] < second.summary["held_out_loss_before"]
    assert second.movement.keys() == first.movement.keys()


def test_lora_is_merged_and_the_swap_trained_beside_it(tmp_path: Path) -> None:
    caught: dict[str, torch.Tensor] = {}
    save = SwapTrainer.save_model

    def spy(self: SwapTrainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            with torch.no_grad():
                caught["logits"] = self.model.eval()(IDS).logits
        save(self, output_dir, _internal_call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SwapTrainer, "save_model", spy)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(adapter|AttnSwapConfig)")  # none is left behind
            result = run(tmp_path, swap="ssmax", lora={"r": 4}, training={"max_steps": 20})
    assert torch.equal(logits(result.output_dir), caught["logits"])
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(result.output_dir)(IDS).logits, caught["logits"])
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "model", result.output_dir))
    assert not [name for name in after if "lora" in name]
    assert set(after) - set(before) == {name for name in after if ".attnswap." in name}
    assert not torch.equal(after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert min(moved.largest for moved in result.movement.values()) > 1e-3
    assert result.summary["held_out_loss"] < result.summary["held_out_loss_before"]
    for names in (["nowhere"], ["q_proj", "nowhere"], "nowhere", "(", [], ["norm"]):
        with pytest.raises(ConfigError, match=r"lora\.target_modules"):
            run(tmp_path, overwrite=True, lora={"target_modules": names})


def test_a_run_resumed_ends_where_a_straight_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"swap": "ssmax", "training": {"eval_steps": 3}}
    straight = run(tmp_path, **changes, output_dir=str(tmp_path / "straight"))
    step = SwapTrainer.training_step

    def interrupted(self: SwapTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SwapTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, **changes)
    checkpoint = tmp_path / "out.partial" / "checkpoint-6"
    with pytest.raises(ConfigError, match=r"resume it with training\.resume_from_checkpoint=latest"):
        run(tmp_path, **changes)
    changes["training"] |= {"resume_from_checkpoint": str(checkpoint)}
    resumed = run(tmp_path, **changes)
    assert torch.equal(logits(resumed.output_dir), logits(straight.output_dir))
    assert resumed.movement == straight.movement
    with pytest.raises(ConfigError, match="not a checkpoint with an optimizer state"):
        run(tmp_path, overwrite=True, training={"resume_from_checkpoint": str(tmp_path)})


def test_the_optimizer_has_the_swap_in_a_group_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: dict[str, dict[str, Any]] = {}
    create = SwapTrainer.create_optimizer

    def spy(self: SwapTrainer, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = create(self, model)
        groups.update({group["name"]: dict(group) for group in optimizer.param_groups})
        return optimizer

    monkeypatch.setattr(SwapTrainer, "create_optimizer", spy)
    run(tmp_path, swap="ssmax", training={"weight_decay": 0.1, "max_steps": 1}, optimizer={"swap_lr_multiplier": 3.0})
    swap = groups.pop("swap")
    assert swap["lr"] == pytest.approx(0.03)
    assert swap["weight_decay"] == 0
    assert sum(parameter.numel() for parameter in swap["params"]) == 2 * 4 * 2
    assert {group["lr"] for group in groups.values()} == {0.01}
    assert {group["weight_decay"] for group in groups.values()} == {0.0, 0.1}
    with pytest.raises(ConfigError, match=r"training\.optim: You need to install"):
        run(tmp_path, overwrite=True, training={"optim": "lomo"})
    own_groups = staticmethod(lambda args, model: (torch.optim.SGD, {"params": [], "lr": 0.1}))
    monkeypatch.setattr(SwapTrainer, "get_optimizer_cls_and_kwargs", own_groups)
    with pytest.raises(ConfigError, match="makes its own parameter groups"):
        run(tmp_path, overwrite=True)


@pytest.mark.parametrize(
    "training",
    [{"bf16": True}, {"activation_checkpointing": True}, {"eval_strategy": "no"}],
    ids=lambda t: next(iter(t)),
)
def test_training_arguments_are_passed_on(tmp_path: Path, training: dict[str, Any]) -> None:
    plain = run(tmp_path, swap="ssmax", output_dir=str(tmp_path / "plain"))
    result = run(tmp_path, swap="ssmax", training=training)
    tolerance = 0.05 if "bf16" in training else 1e-5
    assert logged(result.output_dir, "loss") == pytest.approx(logged(plain.output_dir, "loss"), abs=tolerance)
    assert (result.summary["held_out_loss"] is None) == ("eval_strategy" in training)
    assert {weight.dtype for weight in load_file(result.output_dir / "model.safetensors").values()} == {torch.float32}


def test_bf16_on_a_processor_without_it_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnswap.devices.has_bf16_instructions", lambda device: False)
    with pytest.warns(UserWarning, match=r"no bf16 instructions .* training\.bf16=false"):
        result = run(tmp_path, swap="ssmax", training={"bf16": True, "max_steps": 1})
    with pytest.warns(UserWarning, match=r"no bf16 instructions .*--dtype fp32"):
        load_model(result.output_dir, dtype=torch.bfloat16, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_model(result.output_dir, dtype=torch.float32, device="cpu")
        load_model(result.output_dir, dtype=torch.bfloat16)  # to be saved, say


def test_a_processor_that_is_not_warned_of_computes_in_bf16_in_good_time() -> None:
    if not has_bf16_instructions("cpu"):
        pytest.skip("this processor has no bf16 instructions")
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(512, 512).to(dtype)
        seconds[dtype] = min(timeit.repeat(lambda a=a: a @ a, number=1, repeat=9))
    assert seconds[torch.bfloat16] < 20 * seconds[torch.float32]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_train_a_tiny_model(tmp_path: Path, path: Path) -> None:
    tiny = recipe(tmp_path)
    overrides = [f"{part}.{key}={json.dumps(value)}" for part in ("model", "data") for key, value in tiny[part].items()]
    overrides += [
        f"output_dir={tmp_path}/out",
        "training.max_steps=3",
        "training.eval_steps=3",
        "training.use_cpu=true",
    ]
    result = train(load_config(path, overrides))
    assert result.summary["steps"] == 3
    assert math.isfinite(result.summary["held_out_loss"])
    swapped = "attnswap" in json.loads((result.output_dir / "config.json").read_text())
    assert swapped == (path.stem != "control")


def test_what_is_there_is_not_touched_by_mistake(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run(tmp_path, training={"max_steps": 2})  # an empty directory is free
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ConfigError, match="is not empty: name another one, or set overwrite=true"):
        run(tmp_path)
    with pytest.raises(NumericsError, match="not finite in 3 steps in a row"):
        run(tmp_path, overwrite=True, training={"learning_rate": 1e30, "max_grad_norm": 0.0})
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    result = run(tmp_path, overwrite=True, swap="softpick", training={"max_steps": 2})
    assert result.movement == {}
    assert not (tmp_path / "out.replaced").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        run(tmp_path, output_dir=str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"sequence_length": 256}}, "must be at most 128, the number of positions"),
        (
            {"stages": [{"name": "long", "share": 1.0, "loss": {"ce": 1.0}, "sequence_length": 256}]},
            "stages.0.sequence_length: must be at most 128",
        ),
        ({"swap": "softpick", "optimizer": {"freeze": "all_but_swap"}}, "has no parameters of its own"),
        ({"swap": "none", "optimizer": {"freeze": "all_but_swap"}}, "has no parameters of its own"),
        (
            {"training": {"eval_steps": 2, "save_steps": 3}},
            "training: --load_best_model_at_end requires the saving steps",
        ),
        ({"training": {"bf16": True, "fp16": True}}, "At most one of fp16 and bf16"),
        ({"model": {"reference": "./no/such/model"}}, "no model at"),
        (
            {
                "swap": "softpick",
                "stages": [{"name": "first", "share": 0.5}, {"name": "second", "share": 0.5, "train": "swap"}],
            },
            'stages: "second" has nothing to train',
        ),
        ({"swap": "ssmax", "layers": [7]}, "layer"),
        ({"swap": "ssmax", "heads": [4]}, "head"),
    ],
)
def test_runs_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, **changes)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_the_command_line_says_one_line_and_exits_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tmp_path)))
    monkeypatch.setattr(sys, "argv", ["attnswap", "train", str(tmp_path / "recipe.yaml"), "swap=ssmx"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        'error: unknown swap "ssmx". Did you mean "ssmax"? Known: ' + ", ".join(s.name for s in attnswap.list_swaps())
    ]
    monkeypatch.setattr(
        sys, "argv", ["attnswap", "train", str(tmp_path / "recipe.yaml"), "training.max_steps=1", "swap=softpick"]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    output = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "softpick on" in output
    assert f"saved to {tmp_path / 'out'}" in output


def test_chat_data_trains_on_the_answers_alone(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ '<a>' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
    )
    write_model(tmp_path / "model", tiny_llama())
    tokenizer.save_pretrained(tmp_path / "model")
    talk = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes " * 3}] for i in range(12)]
    (tmp_path / "text.txt").write_text("")
    (tmp_path / "talk.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in talk))
    result = run(tmp_path, data={"files": [str(tmp_path / "talk.jsonl")], "kind": "chat", "documents": "file"})
    assert result.summary["held_out_tokens"] == 2 * len("yes yes yes </s>".replace("</s>", "#"))
    assert result.summary["held_out_loss"] < result.summary["held_out_loss_before"] - 1


def test_sigterm_ends_the_command_with_its_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A scheduler that sends SIGTERM finds a checkpoint, and the same command goes on from it."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tmp_path, swap="ssmax")))
    step = SwapTrainer.training_step

    def killed(self: SwapTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    command = ["attnswap", "train", str(path), "training.resume_from_checkpoint=latest"]
    monkeypatch.setattr(sys, "argv", command)
    with monkeypatch.context() as patch:
        patch.setattr(SwapTrainer, "training_step", killed)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 143
    assert "stopped by SIGTERM after step 4" in capsys.readouterr().err
    assert latest_checkpoint(tmp_path / "out.partial") == tmp_path / "out.partial" / "checkpoint-4"
    with suppress(SystemExit):
        main()
    straight = run(tmp_path, swap="ssmax", output_dir=str(tmp_path / "straight"))
    assert torch.equal(logits(tmp_path / "out"), logits(straight.output_dir))
