"""Stages of healing: each has its steps, windows, rates and lambda, alone and in a recipe that is cut off."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import attnswap
from attnswap.errors import ConfigError
from attnswap.training import (
    Distillation,
    LossSection,
    RampSchedule,
    RampSection,
    Stages,
    StageSection,
    SwapTrainer,
    chunked_loss,
    parse_config,
    plan_stages,
    teacher_of,
    train,
)
from attnswap.training.ramp import ramp_at
from attnswap.training.stages import StagedWindows, control_stages, staged_schedule
from tests.helpers.kill_saves import Tokens
from tests.helpers.paths import ROOT
from tests.helpers.training import cut_off, logged, recipe, stop_at, tiny_llama, write_model


def test_sections_that_say_nothing_sensible_are_refused() -> None:
    for values, words in (
        ({"ce": 0.0}, "must be positive"),
        ({"kl": -1.0}, "not be negative"),
        ({"transfer": 1.0}, "cannot be combined"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(ConfigError, match=words):
            LossSection(**values)
    with pytest.raises(ConfigError, match="train: attention"):
        StageSection("x", 1.0, LossSection(ce=0, kl=0, transfer=1))
    with pytest.raises(ConfigError, match="cannot end at 0"):
        RampSection(1.0, 0.0)


# --- ramps ----------------------------------------------------------------------------------------------------------


def test_a_geometric_ramp_multiplies_and_ends_at_its_end() -> None:
    model = tiny_llama()
    attnswap.patch(model, "softpick", ramp=0.0)
    section = RampSection(least=1e-2)
    values = [ramp_at(section, step / 4, model) for step in range(6)]
    assert values == pytest.approx([0.0, 10**-1.5, 10**-1.0, 10**-0.5, 1.0, 1.0])
    assert ramp_at(RampSection(0.2, 0.8, shape="linear"), 0.5, model) == pytest.approx(0.5)
    assert ramp_at(RampSection(0.0, 1.0, shape="cosine"), 0.25, model) == pytest.approx((1 - 2**-0.5) / 2)


def test_layers_and_heads_may_take_turns() -> None:
    model = tiny_llama(num_hidden_layers=3)
    attnswap.patch(model, "softpick", ramp=0.0)
    linear = {"shape": "linear", "spread": 0.5}
    up = ramp_at(RampSection(layers="first to last", **linear), 0.5, model)
    assert up == pytest.approx({0: 1.0, 1: 0.5, 2: 0.0})
    down = ramp_at(RampSection(layers="last to first", **linear), 0.75, model)
    assert down == pytest.approx({0: 0.5, 1: 1.0, 2: 1.0})
    heads = ramp_at(RampSection(heads="one by one", **linear), 0.5, model)
    assert heads == dict.fromkeys(range(3), (1.0, 1.0, 0.0, 0.0)), "two query heads share one key head"
    both = ramp_at(RampSection(layers="first to last", heads="one by one", **linear), 0.5, model)
    assert [both[layer] for layer in range(3)] == [
        pytest.approx(x) for x in ((1.0, 1.0, 0.8, 0.8), (0.6, 0.6, 0.4, 0.4), (0.2, 0.2, 0.0, 0.0))
    ]
    attnswap.set_ramp(model, both)
    assert model.model.layers[1].self_attn.attnswap.softpick.ramp.tolist() == pytest.approx([0.6, 0.6, 0.4, 0.4])
    attnswap.set_ramp(model, {2: 1.0})
    assert model.model.layers[2].self_attn.attnswap.softpick.ramp.item() == 1.0
    assert model.model.layers[0].self_attn.attnswap.softpick.ramp.ndim == 1
    with pytest.raises(ConfigError, match="not both"):
        attnswap.set_ramp(model, {0: 1.0}, layers=[0])


def test_a_schedule_of_a_plain_trainer_takes_turns_too() -> None:
    model = tiny_llama()
    attnswap.patch(model, "softpick", ramp=0.0)
    assert RampSchedule(4, layers="first to last").at(2, model) == pytest.approx({0: 1.0, 1: 0.0})


# --- stages ---------------------------------------------------------------------------------------------------------

KL = LossSection(ce=0.0, kl=1.0)
TRANSFER = LossSection(ce=0.0, kl=0.0, transfer=1.0)


def test_stages_share_the_steps_of_a_run() -> None:
    sections = [StageSection(name, share) for name, share in (("a", 0.25), ("b", 0.5), ("c", 0.25))]
    assert [(s.first, s.steps) for s in plan_stages(sections, 10)] == [(0, 2), (2, 6), (8, 2)]
    tiny = [StageSection("a", 0.98), StageSection("b", 0.01), StageSection("c", 0.01)]
    assert [s.steps for s in plan_stages(tiny, 10)] == [8, 1, 1]
    with pytest.raises(ConfigError, match="too few"):
        plan_stages(sections, 2)
    plan = plan_stages([StageSection("t", 0.5, TRANSFER, train="attention"), StageSection("kl", 0.5, KL)], 10)
    assert [(s.section.name, s.first, s.steps) for s in control_stages(plan)] == [("kl", 0, 5)]
    assert [stage.index for stage in control_stages(plan)] == [1], "whose windows are those of the healed run"
    assert control_stages(plan[:1]) == []


def test_each_stage_draws_from_its_own_windows_and_has_its_own_rates() -> None:
    drawn = list(StagedWindows([3, 4], [7, 2], [0, 1]))
    assert len(drawn) == 9
    assert set(drawn[:3]) == set(drawn[3:6]) == {0, 1, 2}
    assert set(drawn[7:]) <= {3, 4, 5, 6}
    assert drawn == list(StagedWindows([3, 4], [7, 2], [0, 1])) != list(StagedWindows([3, 4], [7, 2], [1, 2]))
    assert [window - 3 for window in drawn[7:]] == list(StagedWindows([4], [2], [1])), "without the stage before"

    plan = plan_stages([StageSection("a", 0.5), StageSection("b", 0.5, learning_rate=0.2)], 20)
    args = TrainingArguments("x", learning_rate=0.1, warmup_steps=2, lr_scheduler_type="linear", use_cpu=True)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = staged_schedule(optimizer, plan, args)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.0, 0.05, 0.1, 0.0875])
    assert rates[10:14] == pytest.approx([0.0, 0.1, 0.2, 0.175])

    kind = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.01}, "use_cpu": True}
    factors = staged_schedule(optimizer, plan, TrainingArguments("x", learning_rate=0.1, **kind)).lr_lambdas[0]
    assert [0.1 * factors(step) for step in (0, 10)] == pytest.approx([0.1, 0.2])
    late = 0.01 + (0.2 - 0.01) * (1 + math.cos(math.pi * 0.9)) / 2
    assert 0.1 * factors(19) == pytest.approx(late), "a least rate is a rate, not a factor"
    args = TrainingArguments("x", lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch", use_cpu=True)
    with pytest.raises(ConfigError, match="reduce_lr_on_plateau"):
        staged_schedule(optimizer, plan, args)


def test_stages_work_as_a_callback_of_a_plain_trainer(tmp_path: Path) -> None:
    model = tiny_llama()
    attnswap.patch(model, "softpick", ramp=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = plan_stages(
        [
            StageSection("transfer", 0.5, TRANSFER, RampSection(over=1.0), train="attention"),
            StageSection("logits", 0.5, KL),
        ],
        6,
    )
    options = {"max_steps": 6, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(str(tmp_path), learning_rate=1e-2, save_strategy="no", **options)
    stages = Stages(plan, Distillation(teacher_of(model), KL))
    trainer = Trainer(model=model, args=args, train_dataset=Tokens(), callbacks=[stages])
    moved: list[set[str]] = []

    def note(*args: Any) -> None:
        moved.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})

    model.register_forward_pre_hook(note)
    forward = type(model).forward
    trainer.train()
    assert all("self_attn" in name for name in moved[3]), "the transfer trains the attention alone"
    assert moved[3]
    assert any("mlp" in name for name in moved[-1])
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["stage"] for entry in log] == ["transfer"] * 3 + ["logits"] * 3
    assert [entry["lambda"] for entry in log] == pytest.approx([1e-2, 1e-1, 1.0, 1.0, 1.0, 1.0], rel=1e-6)
    assert all(entry["transfer"] == pytest.approx(entry["loss"], rel=1e-2) for entry in log[:3])
    assert all(entry["kl"] == pytest.approx(entry["loss"], rel=1e-2) for entry in log[3:])
    assert "forward" not in model.__dict__ or model.forward.__func__ is forward
    assert all(p.requires_grad for p in model.parameters())

    wrong = Stages(plan_stages([StageSection("logits", 1.0, KL)], 9), Distillation(None, KL))
    with pytest.raises(ConfigError, match="planned for 9 steps, but the trainer takes 6"):
        Trainer(model=model, args=args, train_dataset=Tokens(), callbacks=[wrong]).train()
    wrong.close()
    with pytest.warns(UserWarning, match="the run ends after 6"):
        RampSchedule(9).on_train_begin(args, trainer.state, trainer.control)
    late = Trainer(model=model, args=args, train_dataset=Tokens())
    late.add_callback(Stages(plan, Distillation(None, KL)))
    with pytest.raises(ConfigError, match="cannot be added"):
        late.train()
    plan = plan_stages([StageSection("logits", 1.0, KL, learning_rate=1e-3)], 6)
    plain = Trainer(model=model, args=args, train_dataset=Tokens(), callbacks=[Stages(plan, Distillation(None, KL))])
    with pytest.raises(ConfigError, match="SwapTrainer"):
        plain.train()


def test_the_example_of_the_page_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "healing.md").read_text(), re.DOTALL)
    options = {"max_steps": 300, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path), remove_unused_columns=False, logging_steps=1, **options)
    names: dict[str, Any] = {"model": tiny_llama(), "args": args, "rows": Tokens()}
    exec(code, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stages, "on_log", stop_at(3, Stages.on_log))
        with pytest.raises(KeyboardInterrupt):
            names["trainer"].train()
    log = names["trainer"].state.log_history
    assert [entry["stage"] for entry in log] == ["ramp"] * 3
    assert 0 < log[0]["lambda"] < log[2]["lambda"] < 1
    assert log[2]["kl"] > 0


STAGES = [
    {"name": "transfer", "share": 0.3, "loss": {"ce": 0.0, "transfer": 1.0}, "train": "attention"},
    {"name": "ramp", "share": 0.5, "loss": {"ce": 0.1, "kl": 0.9}, "ramp": {"over": 0.5}},
    {"name": "long", "share": 0.2, "loss": {"ce": 0.1, "kl": 0.9}, "sequence_length": 100, "learning_rate": 1e-3},
]


def test_a_recipe_with_stages_ends_at_the_swap_and_resumes(tmp_path: Path) -> None:
    changes = {
        "swap": "softpick",
        "stages": STAGES,
        "training": {"max_steps": 20, "save_steps": 5, "learning_rate": 1e-3, "eval_strategy": "no"},
    }
    whole = train(parse_config(recipe(tmp_path, **changes, output_dir=str(tmp_path / "whole"))))
    log = [entry for entry in _log(whole.output_dir) if "loss" in entry]
    assert [entry["stage"] for entry in log] == ["transfer"] * 6 + ["ramp"] * 10 + ["long"] * 4
    assert [entry["lambda"] for entry in log[:6]] == [0.0] * 6
    assert log[10]["lambda"] == log[-1]["lambda"] == 1.0
    assert log[10]["kl"] > 0
    assert log[6]["ce"] > 0
    model = attnswap.from_pretrained(whole.output_dir)
    assert model.config.attnswap["swaps"][0]["ramp"] == 1.0
    assert whole.summary["steps"] == 20
    assert whole.summary["tokens"] == 16 * 2 * 64 + 4 * 2 * 100
    stages = whole.summary["stages"]
    assert [(s["name"], s["steps"], s["sequence_length"]) for s in stages] == [
        ("transfer", 6, 64), ("ramp", 10, 64), ("long", 4, 100),
    ]  # fmt: skip
    assert all(stage["seconds_per_step"] > 0 for stage in stages)

    part = recipe(tmp_path, **changes, output_dir=str(tmp_path / "part"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stages, "on_log", stop_at(12, Stages.on_log))
        with pytest.raises(KeyboardInterrupt):
            train(parse_config(part))
    part["training"] = {**part["training"], "resume_from_checkpoint": "latest"}
    train(parse_config(part))
    ours, theirs = (attnswap.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "part"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_entry_of_the_log_speaks_of_one_stage(tmp_path: Path) -> None:
    training = {"max_steps": 20, "learning_rate": 1e-3, "eval_strategy": "no", "logging_steps": 8}
    done = train(parse_config(recipe(tmp_path, swap="softpick", stages=STAGES, training=training)))
    log = [entry for entry in _log(done.output_dir) if "loss" in entry]
    assert [(entry["step"], entry["stage"]) for entry in log] == [
        (6, "transfer"), (8, "ramp"), (16, "ramp"), (20, "long"),
    ]  # fmt: skip
    assert log[0]["loss"] == pytest.approx(log[0]["transfer"], rel=1e-2)
    for entry in log[1:]:
        assert entry["loss"] == pytest.approx(0.1 * entry["ce"] + 0.9 * entry["kl"], rel=1e-2)


def _log(directory: Path) -> list[dict[str, Any]]:
    return json.loads((directory / "training_log.json").read_text())


def test_frozen_weights_teach_themselves_in_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnswap.training.teacher.frozen_teacher", None)  # no copy
    stages = [
        {"name": "outputs", "share": 0.6, "loss": {"ce": 0.0, "transfer": 1.0}, "train": "attention"},
        {"name": "logits", "share": 0.4, "loss": {"ce": 0.0, "kl": 1.0}},
    ]
    adapters = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    training = {"max_steps": 40, "learning_rate": 0.02, "eval_strategy": "no"}
    done = train(parse_config(recipe(tmp_path, swap="softpick", lora=adapters, stages=stages, training=training)))
    transfer, kl = logged(done.output_dir, "transfer"), logged(done.output_dir, "kl")
    assert len(transfer) == 24
    assert sum(transfer[-4:]) < 0.7 * sum(transfer[:4])
    assert len(kl) == 16
    assert min(kl) > 0
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(done.output_dir / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".self_attn." in name for name in moved)


def test_the_control_leaves_out_what_only_swaps_learn(tmp_path: Path) -> None:
    changes = {"swap": "none", "stages": STAGES, "training": {"max_steps": 20, "eval_strategy": "no"}}
    result = train(parse_config(recipe(tmp_path, **changes)))
    log = [entry for entry in _log(result.output_dir) if "loss" in entry]
    assert [entry["stage"] for entry in log] == ["ramp"] * 10 + ["long"] * 4
    assert "lambda" not in log[0]
    assert logged(result.output_dir, "kl")[0] < 1e-3, "the control starts as its teacher"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": STAGES, "ramp": 0.5}, "since stages have ramps"),
        (
            {"stages": STAGES, "training": {"max_steps": 20, "gradient_checkpointing": True}},
            "runs each layer twice",
        ),
        ({"stages": STAGES[:1], "swap": "none", "training": {"max_steps": 20}}, "without a swap none of them"),
        ({"stages": STAGES, "training": {"max_steps": 20, "activation_checkpointing": True}}, "training.activation_ch"),
        ({"stages": [{"name": "a", "share": 1.0, "ramp": {"end": 0.5}}]}, "must end at 1"),
        ({"stages": STAGES, "training": {"max_steps": -1}}, "max_steps"),
        ({"stages": STAGES, "training": {"load_best_model_at_end": True}}, "load_best_model_at_end"),
        ({"stages": [{"name": "a", "share": 1.0, "loss": {"kl": 1.0, "hl": 1}}]}, "nearest|Did you mean|unknown key"),
        ({"teacher": "embedded"}, "only stages use a teacher"),
        ({"stages": STAGES, "training": {"max_steps": 20, "learning_rate": 0.0}}, "since the rates of long"),
    ],
)
def test_recipes_whose_stages_make_no_sense_are_refused(tmp_path: Path, changes: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(parse_config(recipe(tmp_path, **{"swap": "softpick", **changes})))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_teacher_computes_in_the_dtype_of_a_student_without_mixed_precision(tmp_path: Path, dtype: str) -> None:
    stages = [{"name": "logits", "share": 1.0, "loss": {"ce": 0.0, "kl": 1.0}}]
    model = {"reference": str(tmp_path / "model"), "dtype": dtype}
    training = {"max_steps": 2, "eval_strategy": "no"}
    result = train(parse_config(recipe(tmp_path, model=model, stages=stages, training=training)))
    assert logged(result.output_dir, "kl") == [0.0, 0.0]


def test_a_stage_whose_windows_no_document_fills_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "long", tiny_llama(max_position_embeddings=8192))
    stages = [{"name": "a", "share": 1.0, "sequence_length": 4096}]
    values = recipe(tmp_path, model={"reference": str(tmp_path / "long")}, stages=stages)
    with pytest.raises(ConfigError, match="no training document"):
        train(parse_config(values))


def test_a_model_saved_with_swaps_needs_a_named_teacher(tmp_path: Path) -> None:
    model = tiny_llama()
    attnswap.patch(model, "softpick")
    write_model(tmp_path / "healed", model)
    changes = {
        "model": {"reference": str(tmp_path / "healed")},
        "stages": [{"name": "more", "share": 1.0, "loss": {"ce": 0.0, "kl": 1.0}}],
        "training": {"max_steps": 2, "eval_strategy": "no"},
    }
    with pytest.raises(ConfigError, match="saved with swaps"):
        train(parse_config(recipe(tmp_path, **changes)))
    result = train(parse_config(recipe(tmp_path, **changes, teacher=str(tmp_path / "model"))))
    assert logged(result.output_dir, "kl")[0] > 1e-6

    partly = tiny_llama()
    attnswap.patch(partly, "softpick", layers="0:1")
    write_model(tmp_path / "partly", partly)
    rest = {
        **changes,
        "output_dir": str(tmp_path / "more"),
        "model": {"reference": str(tmp_path / "partly")},
        "swap": "softpick",
        "layers": "1:",
    }
    with pytest.raises(ConfigError, match="saved with swaps"):
        train(parse_config(recipe(tmp_path, **rest)))
    ramped = [{**changes["stages"][0], "ramp": {"over": 0.5}}]
    with pytest.raises(ConfigError, match="a ramp would change their lambda"):
        train(parse_config(recipe(tmp_path, **{**rest, "stages": ramped}, teacher=str(tmp_path / "model"))))


def test_a_model_saved_with_swaps_goes_through_every_stage(tmp_path: Path) -> None:
    model = tiny_llama()
    attnswap.patch(model, "softpick")
    write_model(tmp_path / "healed", model)
    changes = {"swap": "none", "stages": STAGES, "training": {"max_steps": 20, "eval_strategy": "no"}}
    values = recipe(tmp_path, **changes, model={"reference": str(tmp_path / "healed")}, teacher=str(tmp_path / "model"))
    result = train(parse_config(values))
    assert [stage["name"] for stage in result.summary["stages"]] == ["transfer", "ramp", "long"]
    assert result.summary["steps"] == 20


def test_a_trainer_evaluates_and_trains_again_after_its_stages(tmp_path: Path) -> None:
    model = tiny_llama()
    attnswap.patch(model, "softpick")
    plan = plan_stages([StageSection("logits", 1.0, KL)], 2)
    options = {"max_steps": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    args = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=1, label_names=["labels"], remove_unused_columns=False, **options
    )
    callback = Stages(plan, Distillation(teacher_of(model), KL))
    rows = [Tokens()[index] for index in range(3)]
    trainer = SwapTrainer(model, args, train_dataset=Tokens(), eval_dataset=rows, callbacks=[callback], stages=plan)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert not callback.installed
    after = trainer.evaluate()["eval_loss"]
    assert after != before
    with torch.no_grad(), chunked_loss(model):
        outputs = [model.eval()(**{k: torch.as_tensor(v)[None] for k, v in row.items()}) for row in rows]
    wanted = sum(o.nll.sum() for o in outputs) / sum(o.tokens.sum() for o in outputs)
    assert after == pytest.approx(float(wanted), rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != after


def test_stages_that_cannot_be_are_refused_before_the_first_step(tmp_path: Path) -> None:
    model = tiny_llama()
    attnswap.patch(model, "softpick")
    options = {"max_steps": 4, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(str(tmp_path), save_strategy="no", **options)
    ran: list[int] = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    for later, changes, words in (
        (StageSection("swap", 0.5, KL, train="swap"), {}, "nothing to train"),
        (
            StageSection("outputs", 0.5, TRANSFER, train="attention"),
            {"activation_checkpointing": True},
            "switch it off for such stages",
        ),
        (StageSection("ramp", 0.5, KL, RampSection()), {"load_best_model_at_end": True}, "lambda below 1"),
    ):
        plan = plan_stages([StageSection("first", 0.5, KL), later], 4)
        stages = Stages(plan, Distillation(teacher_of(model), KL))
        trainer = Trainer(model=model, args=replace(args, **changes), train_dataset=Tokens(), callbacks=[stages])
        ran.clear()  # the loss was tried on a few tokens
        with pytest.raises(ConfigError, match=words):
            trainer.train()
        assert not ran
        stages.close()
        model.activation_checkpointing_disable()


def test_a_resumed_run_logs_each_step_once_and_counts_all_of_its_seconds(tmp_path: Path) -> None:
    values = recipe(tmp_path, training={"save_strategy": "steps", "save_steps": 4, "eval_strategy": "no"})
    cut_off(values, 6)
    log = tmp_path / "out.partial" / "steps.jsonl"
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 6
    with log.open("a") as file:  # what a run that is stopped in order leaves
        file.write(json.dumps({"train_runtime": 1000.0, "step": 6}) + "\n")
    values["training"]["resume_from_checkpoint"] = "latest"
    result = train(parse_config(values))
    lines = [json.loads(line) for line in (result.output_dir / "steps.jsonl").open()]
    assert [entry["step"] for entry in lines if "loss" in entry] == list(range(1, 11))
    assert 1000 < result.summary["seconds"] < 1100
    losses = [entry["loss"] for entry in lines if "loss" in entry]
    assert result.summary["train_loss"] == pytest.approx(sum(losses) / 10, rel=1e-6)


def test_a_run_is_not_resumed_by_another_number_of_processes(tmp_path: Path) -> None:
    values = recipe(tmp_path, training={"save_strategy": "steps", "save_steps": 4, "eval_strategy": "no"})
    cut_off(values, 6)
    values["training"] |= {"resume_from_checkpoint": "latest", "gradient_accumulation_steps": 2}
    with pytest.raises(ConfigError, match="2 windows per step and would now read 4"):
        train(parse_config(values))
    assert (tmp_path / "out.partial" / "checkpoint-4").is_dir()
