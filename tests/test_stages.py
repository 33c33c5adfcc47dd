"""Stages of healing: what is learned is what the formula says, from the right teacher, at the right lambda."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_saves import Tokens
from torch import Tensor
from training_helpers import VOCABULARY, logged, recipe, tiny_gemma2, tiny_gpt2, tiny_llama, write_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

import attnswap
from attnswap.errors import ConfigError
from attnswap.surgery.attach import patched_modules
from attnswap.swaps.base import Call, Observed
from attnswap.training import (
    Distillation,
    LossSection,
    RampSchedule,
    RampSection,
    Stages,
    StageSection,
    chunked_loss,
    fit,
    parse_config,
    plan_stages,
    teacher_of,
    train,
)
from attnswap.training.config import LoraSection
from attnswap.training.lora import add_lora
from attnswap.training.ramp import ramps
from attnswap.training.stages import StagedWindows, staged_schedule, without_swaps
from attnswap.training.trainer import StepLog


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (3, 40))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(40).expand(3, -1)}


def inputs_of(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values[name] for name in ("input_ids", "position_ids")}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- logit distillation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tie_word_embeddings=True), tiny_gemma2])
@pytest.mark.parametrize(("kl", "ce", "temperature"), [(1.0, 0.0, 1.0), (0.9, 0.1, 1.0), (0.5, 0.25, 3.0)])
def test_distillation_is_kl_and_cross_entropy(make: Any, kl: float, ce: float, temperature: float) -> None:
    teacher = teacher_of(make(), dtype=torch.float32)
    model, values = make(), batch()
    attnswap.patch(model, "softpick")
    ours = model(**inputs_of(values), use_cache=False).logits[:, :-1].float()
    theirs = make()(**inputs_of(values), use_cache=False).logits[:, :-1].float()
    targets = values["labels"][:, 1:]
    kept = targets != -100
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (theirs, ours))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)[kept].sum() * temperature**2
    nll = -ours.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0][kept].sum()
    expected = (kl * divergence + ce * nll) / kept.sum()
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()

    objective = Distillation(teacher, LossSection(kl=kl, ce=ce, temperature=temperature))
    model.train()
    with chunked_loss(model, chunk=7, objective=objective):
        output = model(**values)
        output.loss.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-3, msg=name)
    means = objective.means()
    assert means["kl"] == pytest.approx(divergence.item() / kept.sum().item(), rel=1e-4)
    assert means["ce"] == pytest.approx(nll.item() / kept.sum().item(), rel=1e-4)
    assert objective.means() == {}


def test_in_evaluation_the_loss_is_the_cross_entropy_alone() -> None:
    model, values = tiny_llama(), batch()
    plain = model(**values, use_cache=False).loss.item()
    with chunked_loss(model, objective=Distillation(teacher_of(model), LossSection(kl=1, ce=0))):
        assert model.eval()(**values).loss.item() == pytest.approx(plain, abs=1e-6)


def test_a_divergence_without_a_teacher_is_refused() -> None:
    model = tiny_llama().train()
    with (
        chunked_loss(model, objective=Distillation(None, LossSection(kl=1))),
        pytest.raises(ConfigError, match="need a teacher"),
    ):
        model(**batch())


# --- teachers -------------------------------------------------------------------------------------------------------


def test_bypassed_is_the_model_as_it_was_and_leaves_no_trace() -> None:
    model, ids = tiny_llama(), batch()["input_ids"]
    before = model(ids).logits
    attnswap.patch(model, "softpick")
    swapped = model(ids).logits
    with attnswap.bypassed(model):
        assert torch.equal(model(ids).logits, before)
        with attnswap.bypassed(model):
            assert torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, swapped)
    with pytest.raises(RuntimeError), attnswap.bypassed(model):
        raise RuntimeError
    assert torch.equal(model(ids).logits, swapped)
    with pytest.raises(ConfigError, match="not patched"), attnswap.bypassed(tiny_llama()):
        pass


def test_frozen_weights_teach_without_a_copy() -> None:
    model, values = tiny_llama(attention_dropout=0.5), batch()
    expected = model(**inputs_of(values)).logits
    attnswap.patch(model, "forgetting-gate")
    tuner = add_lora(model, LoraSection(r=2, dropout=0.5))
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    teacher = teacher_of(model)
    assert teacher.shared
    assert teacher.model is model
    hidden = teacher.hidden(inputs_of(values))
    torch.testing.assert_close(teacher.logits(hidden[0]), expected[0], atol=1e-6, rtol=0)
    assert model.training
    assert not torch.allclose(model(**inputs_of(values)).logits, expected, atol=1e-2)
    tuner.unload()


def test_weights_that_are_trained_teach_as_a_frozen_copy() -> None:
    model, values = tiny_llama(), batch()
    expected = model(**inputs_of(values)).logits
    attnswap.patch(model, "softpick")
    teacher = teacher_of(model)
    assert not teacher.shared
    kinds = {name.split(".")[-2]: p.dtype for name, p in teacher.model.named_parameters()}
    assert kinds["q_proj"] == kinds["down_proj"] == torch.bfloat16
    assert kinds["norm"] == kinds["embed_tokens"] == torch.float32
    assert not any(p.requires_grad for p in teacher.model.parameters())
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1.0)
    logits = teacher.logits(teacher.hidden(inputs_of(values))[0])
    torch.testing.assert_close(logits.float(), expected[0], atol=2e-2, rtol=0)


def test_a_teacher_follows_its_student_to_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, values = tiny_llama(), inputs_of(batch())
    teacher = teacher_of(model, dtype=torch.float32)

    class Elsewhere(Exception):
        """The teacher was sent where the inputs are, which only a machine with two devices can do for real."""

    def to(self: PreTrainedModel, device: torch.device) -> None:
        assert self is teacher.model
        raise Elsewhere(device.type)

    monkeypatch.setattr(PreTrainedModel, "to", to)
    with pytest.raises(Elsewhere, match="meta"):
        teacher.hidden({name: value.to("meta") for name, value in values.items()})


def gpt2_without_dropout() -> PreTrainedModel:
    model = tiny_gpt2()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize(
    "make", [tiny_llama, lambda: tiny_llama(tie_word_embeddings=True), tiny_gemma2, gpt2_without_dropout]
)
def test_in_mixed_precision_a_model_has_nothing_to_learn_from_itself(make: Any) -> None:
    model, values = make(), batch()
    objective = Distillation(teacher_of(model), LossSection(kl=1.0, ce=0.0))
    model.train()
    with chunked_loss(model, objective=objective), torch.autocast("cpu", torch.bfloat16):
        loss = model(**values).loss
    loss.backward()
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


# --- attention-output transfer --------------------------------------------------------------------------------------


def test_transfer_compares_each_layer_on_the_teachers_input() -> None:
    model, values = tiny_llama(num_hidden_layers=3), batch()
    teacher = teacher_of(model, dtype=torch.float32)
    attnswap.patch(model, "softpick")
    seen: dict[int, tuple[Tensor, Tensor, dict[str, Any]]] = {}
    handles = [
        module.register_forward_hook(
            lambda m, args, kwargs, output, layer=layer: seen.update(
                {layer: (kwargs["hidden_states"], output[0], kwargs["position_embeddings"])}
            ),
            with_kwargs=True,
        )
        for layer, (_, module) in patched_modules(teacher.model).items()
    ]
    teacher.hidden(inputs_of(values))
    for handle in handles:
        handle.remove()
    expected = []
    visible = torch.ones(40, 40).tril().bool()[None, None]
    for layer, (_, module) in patched_modules(model).items():
        hidden, output, rotary = seen[layer]
        ours = module(hidden_states=hidden, position_embeddings=rotary, attention_mask=visible)[0]
        expected.append((ours - output).square().sum() / output.square().sum())
    assert len(set(expected)) == 3

    objective = Distillation(teacher, LossSection(ce=0, kl=0, transfer=2.0))
    model.train()
    with chunked_loss(model, objective=objective):
        loss = model(**values).loss
    assert loss.item() == pytest.approx(2 * torch.stack(expected).mean().item(), rel=1e-5)
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {name for name, _ in model.named_parameters() if "self_attn" in name}, "attention alone"


def test_transfer_teaches_a_swap_what_attention_did() -> None:
    model, values = tiny_llama(), batch()
    teacher = teacher_of(model, dtype=torch.float32)
    attnswap.patch(model, "softpick")
    objective = Distillation(teacher, LossSection(ce=0, kl=0, transfer=1.0))
    own = [p for name, p in model.named_parameters() if "self_attn" in name]
    optimizer, losses = torch.optim.Adam(own, lr=3e-3), []
    model.train()
    with chunked_loss(model, objective=objective):
        for _ in range(30):
            loss = model(**values).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_sections_that_say_nothing_sensible_are_refused() -> None:
    for values, words in (
        ({"ce": 0.0}, "must be positive"),
        ({"kl": -1.0}, "not be negative"),
        ({"transfer": 1.0}, "stands alone"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(ConfigError, match=words):
            LossSection(**values)
    with pytest.raises(ConfigError, match="train: attention"):
        StageSection("x", 1.0, LossSection(ce=0, kl=0, transfer=1))
    with pytest.raises(ConfigError, match="never gets to 0"):
        RampSection(1.0, 0.0)


# --- ramps ----------------------------------------------------------------------------------------------------------


def test_a_geometric_ramp_multiplies_and_ends_at_its_end() -> None:
    model = tiny_llama()
    attnswap.patch(model, "softpick", ramp=0.0)
    section = RampSection(least=1e-2)
    values = [ramps(section, step / 4, model) for step in range(6)]
    assert values == pytest.approx([0.0, 10**-1.5, 10**-1.0, 10**-0.5, 1.0, 1.0])
    assert ramps(RampSection(0.2, 0.8, shape="linear"), 0.5, model) == pytest.approx(0.5)
    assert ramps(RampSection(0.0, 1.0, shape="cosine"), 0.25, model) == pytest.approx((1 - 2**-0.5) / 2)


def test_layers_and_heads_may_take_turns() -> None:
    model = tiny_llama(num_hidden_layers=3)
    attnswap.patch(model, "softpick", ramp=0.0)
    linear = {"shape": "linear", "spread": 0.5}
    up = ramps(RampSection(layers="first to last", **linear), 0.5, model)
    assert up == pytest.approx({0: 1.0, 1: 0.5, 2: 0.0})
    down = ramps(RampSection(layers="last to first", **linear), 0.75, model)
    assert down == pytest.approx({0: 0.5, 1: 1.0, 2: 1.0})
    heads = ramps(RampSection(heads="one by one", **linear), 0.5, model)
    assert heads == dict.fromkeys(range(3), (1.0, 1.0, 0.0, 0.0)), "two query heads share one key head"
    both = ramps(RampSection(layers="first to last", heads="one by one", **linear), 0.5, model)
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
    assert [(s.section.name, s.first, s.steps) for s in without_swaps(plan)] == [("kl", 0, 5)]
    assert [stage.index for stage in without_swaps(plan)] == [1], "whose windows are those of the healed run"
    assert without_swaps(plan[:1]) == []


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

    late = Trainer(model=model, args=args, train_dataset=Tokens())
    late.add_callback(Stages(plan, Distillation(None, KL)))
    with pytest.raises(ConfigError, match="when it is made"):
        late.train()


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
    assert log[6]["kl"] > 0
    assert log[6]["ce"] > 0
    model = attnswap.from_pretrained(whole.output_dir)
    assert model.config.attnswap["swaps"][0]["ramp"] == 1.0
    assert whole.summary["steps"] == 20
    assert whole.summary["tokens"] == 16 * 2 * 64 + 4 * 2 * 100

    part = recipe(tmp_path, **changes, output_dir=str(tmp_path / "part"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stages, "on_log", _stop_at(12, Stages.on_log))
        with pytest.raises(KeyboardInterrupt):
            train(parse_config(part))
    part["training"] = {**part["training"], "resume_from_checkpoint": "latest"}
    train(parse_config(part))
    ours, theirs = (attnswap.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "part"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _log(directory: Path) -> list[dict[str, Any]]:
    return json.loads((directory / "training_log.json").read_text())


def _stop_at(step: int, original: Any) -> Any:
    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    return stop


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
        ({"stages": STAGES, "ramp": 0.5}, "stages move it"),
        (
            {"stages": STAGES, "training": {"max_steps": 20, "gradient_checkpointing": True}},
            "leave it out for transfer",
        ),
        ({"stages": STAGES[:1], "swap": "none", "training": {"max_steps": 20}}, "no control"),
        ({"stages": STAGES, "training": {"max_steps": 20, "activation_checkpointing": True}}, "training.activation_ch"),
        ({"stages": [{"name": "a", "share": 1.0, "ramp": {"end": 0.5}}]}, "must end at 1"),
        ({"stages": STAGES, "training": {"max_steps": -1}}, "max_steps"),
        ({"stages": STAGES, "training": {"load_best_model_at_end": True}}, "load_best_model_at_end"),
        ({"stages": [{"name": "a", "share": 1.0, "loss": {"kl": 1.0, "hl": 1}}]}, "nearest|Did you mean|unknown key"),
        ({"teacher": "embedded"}, "goes with stages"),
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


def test_losses_that_look_at_layers_refuse_to_see_them_twice() -> None:
    model = tiny_llama()
    attnswap.patch(model, "softpick")
    objective = Distillation(teacher_of(model), LossSection(ce=0.0, transfer=1.0))
    model.activation_checkpointing_enable()
    model.train()
    with chunked_loss(model, objective=objective), pytest.raises(ConfigError, match="runs twice"):
        model(**batch())


def test_a_stage_whose_windows_no_document_fills_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "long", tiny_llama(max_position_embeddings=8192))
    stages = [{"name": "a", "share": 1.0, "sequence_length": 4096}]
    values = recipe(tmp_path, model={"reference": str(tmp_path / "long")}, stages=stages)
    with pytest.raises(ConfigError, match="no document"):
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


def test_a_resumed_run_logs_each_step_once_and_counts_all_of_its_seconds(tmp_path: Path) -> None:
    values = recipe(tmp_path, training={"save_strategy": "steps", "save_steps": 4, "eval_strategy": "no"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepLog, "on_log", _stop_at(6, StepLog.on_log))
        with pytest.raises(KeyboardInterrupt):
            train(parse_config(values))
    log = tmp_path / "out.partial" / "steps.jsonl"
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 6
    with log.open("a") as file:  # what a run that is stopped in order leaves
        file.write(json.dumps({"train_runtime": 1000.0, "step": 6}) + "\n")
    values["training"]["resume_from_checkpoint"] = "latest"
    result = train(parse_config(values))
    lines = [json.loads(line) for line in (result.output_dir / "steps.jsonl").open()]
    assert [entry["step"] for entry in lines if "loss" in entry] == list(range(1, 11))
    assert 1000 < result.summary["seconds"] < 1100


# --- calibration ----------------------------------------------------------------------------------------------------


def test_a_fitted_sigmoid_knows_most_of_the_logsumexp() -> None:
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
    plain = tiny_llama()
    attnswap.patch(plain, "ssmax")
    with pytest.raises(ConfigError, match="can be fitted"):
        fit(plain, [{"input_ids": ids}])
    with pytest.raises(ConfigError, match="not patched"):
        fit(tiny_llama(), [{"input_ids": ids}])
    with pytest.raises(ConfigError, match="no text"):
        fit(model, [])


def test_a_network_finds_what_a_linear_map_of_the_hidden_state_cannot() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(6000, 8, generator=generator)
    n = torch.randint(1, 100, (6000,), generator=generator).float()
    query = hidden @ torch.randn(8, 2, generator=generator)
    logsumexp = (query + 0.02 * query.square() + n.log()[:, None]).T
    left = {}
    for units in (0, 32):
        swap = attnswap.Sigmoid(bias="predicted", units=units)
        with torch.no_grad():
            found, missed = swap.fit(Observed(hidden[:5000], {1.0: logsumexp[:, :5000]}, n[:5000]))
            assert set(found) == {*swap.gate_parameters(), "offset", "slope"}
            features = swap.gates(hidden[None, 5000:], found) | {k: found[k][:, None] for k in ("offset", "slope")}
        call = Call(n[None, None, 5000:], features, 1.0, torch.arange(1000), logsumexp=logsumexp[None, :, 5000:])
        error = swap.regression(call)
        assert error is not None
        left[units] = float(error.mean())
        assert missed == pytest.approx(left[units] ** 0.5, rel=0.2)
    assert left[32] < 0.1 * left[0]


def test_what_a_swap_predicts_is_regressed_in_the_loss() -> None:
    model, values = tiny_llama(), batch()
    attnswap.patch(model, {"name": "sigmoid", "bias": "predicted"})
    objective = Distillation(None, LossSection(ce=1.0, regression=0.5))
    model.train()
    with chunked_loss(model, objective=objective):
        loss = model(**values).loss
    loss.backward()
    means = objective.means()
    assert means["regression"] > 0
    assert loss.item() == pytest.approx(means["ce"] + 0.5 * means["regression"], rel=1e-5)
    slot = model.model.layers[0].self_attn.attnswap.sigmoid
    assert slot.offset.grad.abs().min() > 0
    assert slot.weight.grad.abs().max() > 0
