"""What healing learns from: the losses are what their formulas say, and the teacher is the right one."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedModel

import attnswap
from attnswap.errors import ConfigError
from attnswap.surgery.body import body_of
from attnswap.surgery.patched import stacks_of
from attnswap.training import (
    Distillation,
    LossSection,
    chunked_loss,
    teacher_of,
)
from attnswap.training.config import LoraSection
from attnswap.training.lora import add_lora
from attnswap.training.transfer import transferring
from tests.helpers.training import VOCABULARY, tiny_gemma2, tiny_gpt2, tiny_llama


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


@pytest.mark.parametrize(
    "make", [tiny_llama, lambda: tiny_llama(tie_word_embeddings=True), tiny_gemma2], ids=["llama", "tied", "gemma2"]
)
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
    "make",
    [tiny_llama, lambda: tiny_llama(tie_word_embeddings=True), tiny_gemma2, gpt2_without_dropout],
    ids=["llama", "tied", "gemma2", "gpt2"],
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
        for layer, (_, module) in stacks_of(teacher.model)[0].modules.items()
    ]
    teacher.hidden(inputs_of(values))
    for handle in handles:
        handle.remove()
    expected = []
    visible = torch.ones(40, 40).tril().bool()[None, None]
    lasts = [max((i for i, label in enumerate(row) if label != -100), default=-1) for row in values["labels"].tolist()]
    text = torch.tensor([[i <= last for i in range(40)] for last in lasts])
    for layer, (_, module) in stacks_of(model)[0].modules.items():
        hidden, output, rotary = seen[layer]
        ours = module(hidden_states=hidden, position_embeddings=rotary, attention_mask=visible)[0]
        expected.append((ours - output)[text].square().sum() / output[text].square().sum())
    assert len(set(expected)) == 3

    objective = Distillation(teacher, LossSection(ce=0, kl=0, transfer=2.0))
    model.train()
    with chunked_loss(model, objective=objective):
        loss = model(**values).loss
    assert loss.item() == pytest.approx(2 * torch.stack(expected).mean().item(), rel=1e-5)
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {name for name, _ in model.named_parameters() if "self_attn" in name}, "attention alone"


def tiny_bart() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, vocab_size=VOCABULARY, d_model=32, dropout=0.0))


@pytest.mark.parametrize(
    ("make", "part", "idle"),
    [
        (tiny_llama, None, "mlp"),
        (tiny_gpt2, None, "mlp"),
        (tiny_bart, None, "final_layer_norm"),
        (tiny_bart, "cross", "final_layer_norm"),
    ],
)
def test_a_transfer_leaves_out_what_stands_between_attention(
    make: Any, part: str | None, idle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes nothing: neither what attention is given (an encoder's states too) nor what it learns."""
    model, values = make(), inputs_of(batch())
    values = values if model.config.model_type != "bart" else {"input_ids": values["input_ids"]}
    teacher = teacher_of(model, dtype=torch.float32)
    attnswap.patch(model, "softpick", part=part)
    beside = [module for name, module in model.named_modules() if name.endswith(idle) and "encoder" not in name]
    called: list[torch.nn.Module] = []
    for module in beside:
        own = type(module).forward
        module.forward = lambda *args, m=module, own=own: called.append(m) or own(m, *args)  # type: ignore[func-returns-value]
    before = [module.forward for module in beside]

    def learned() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        with transferring(teacher, model, values, torch.ones_like(values["input_ids"])) as transfer:
            body_of(model)(**values, use_cache=False)
        loss = transfer.distance()
        loss.backward()
        return loss, gradients(model)

    loss, gradient = learned()
    assert beside
    assert not called
    assert [module.forward for module in beside] == before
    monkeypatch.setattr("attnswap.training.transfer._returning_zeros", lambda module: contextlib.nullcontext())
    whole_loss, whole_gradient = learned()
    assert len(called) == len(beside)
    assert torch.equal(loss, whole_loss)
    assert gradient.keys() == whole_gradient.keys()
    assert all(torch.equal(gradient[name], whole_gradient[name]) for name in gradient)


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


def test_a_regression_alone_calibrates_a_swap_that_is_not_there_yet() -> None:
    model, values = tiny_llama(), batch()
    with torch.no_grad():
        expected = model(values["input_ids"]).logits
    attnswap.patch(model, {"name": "sigmoid", "bias": "predicted", "units": 0}, ramp=0.0)
    model.requires_grad_(False)
    own = attnswap.swap_parameters(model)
    for name, parameter in own.items():
        parameter.requires_grad_(True)
        parameter.data += 1.0 if name.endswith("offset") else 0.0  # a start that is off
    optimizer = torch.optim.Adam(own.values(), lr=0.05)
    objective = Distillation(None, LossSection(ce=0.0, regression=1.0))
    errors = []
    model.train()
    with chunked_loss(model, objective=objective):
        for _ in range(20):
            optimizer.zero_grad()
            model(**values).loss.backward()
            optimizer.step()
            errors.append(objective.means()["regression"])
    assert errors[-1] < 0.2 * errors[0]
    with torch.no_grad():
        assert torch.equal(model(values["input_ids"]).logits, expected)

    attnswap.unpatch(model)
    attnswap.patch(model, "softpick")
    with chunked_loss(model, objective=objective), pytest.raises(ConfigError, match="no swap of this model"):
        model(**values)


@pytest.mark.parametrize("loss", [{"transfer": 1.0}, {"regression": 1.0}, {"ce": 1.0, "sinks": 50.0}])
def test_nothing_is_learned_from_padding(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnswap.training.sinks.QUERIES", 1000)  # all queries
    monkeypatch.setattr("attnswap.training.sinks.FREE_WEIGHT", 0.0)
    model = tiny_llama()
    teacher = teacher_of(model, dtype=torch.float32)
    attnswap.patch(model, {"name": "sigmoid", "bias": "predicted"})
    model.train()
    torch.manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (1, 80))
    text = {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(80)[None]}
    text["labels"][:, :9] = -100  # a prompt that is read all the same
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(1, 100, dtype=torch.long)], 1),
        "labels": torch.cat([text["labels"], torch.full((1, 100), -100)], 1),
        "position_ids": torch.cat([torch.arange(80), torch.arange(100)])[None],
    }
    with chunked_loss(model, objective=Distillation(teacher, LossSection(**{"ce": 0.0} | loss))):
        expected, found = model(**text).loss, model(**padded).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected > 1e-6


def test_losses_that_look_at_layers_refuse_to_see_them_twice() -> None:
    model = tiny_llama()
    attnswap.patch(model, "softpick")
    objective = Distillation(teacher_of(model), LossSection(ce=0.0, transfer=1.0))
    model.activation_checkpointing_enable()
    model.train()
    with chunked_loss(model, objective=objective), pytest.raises(ConfigError, match="runs twice"):
        model(**batch())
