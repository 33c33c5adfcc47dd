"""The chunked loss is the model's own loss, gradients included, without the logits of a whole window."""

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import attnswap
from attnswap.errors import ConfigError, UnsupportedModelError
from attnswap.training import chunked_loss
from tests.helpers.training import VOCABULARY, tiny_gemma2, tiny_gpt2, tiny_llama

MODELS = [tiny_llama, tiny_gemma2, tiny_gpt2, lambda: tiny_llama(tie_word_embeddings=True)]
NAMES = ["llama", "gemma2", "gpt2", "tied"]


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (3, 40))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    labels[2] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(25), torch.arange(15)]).expand(3, -1),
    }


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", MODELS, ids=NAMES)
@pytest.mark.parametrize("items", [None, 100])
def test_loss_and_gradients_equal_the_full_ones(make: Callable[[], PreTrainedModel], items: int | None) -> None:
    model, inputs = make(), batch()
    extra = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    full = model(**inputs, **extra, use_cache=False)
    expected = gradients(model, full.loss)
    with chunked_loss(model, chunk=7):
        output = model(**inputs, **extra)
        actual = gradients(model, output.loss)
    assert output.loss.item() == pytest.approx(full.loss.item(), abs=1e-6)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-4, msg=name)

    own = torch.log_softmax(full.logits[:, :-1].float(), -1)
    targets = inputs["labels"][:, 1:]
    rows = -own.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets == -100, 0).sum(1)
    torch.testing.assert_close(output.nll, rows.detach(), atol=1e-4, rtol=1e-5)
    assert output.tokens.tolist() == (targets != -100).sum(1).tolist()


def test_a_patched_model_in_bfloat16_keeps_its_loss() -> None:
    model, inputs = tiny_llama().to(torch.bfloat16), batch()
    attnswap.patch(model, "ssmax")
    full = model(**inputs, use_cache=False).loss
    with chunked_loss(model, chunk=16):
        assert model(**inputs).loss.item() == pytest.approx(full.item(), abs=1e-5)


def test_the_head_never_sees_more_than_a_chunk() -> None:
    model, sizes = tiny_llama(), []
    with chunked_loss(model, chunk=8):
        model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:-1].numel()))
        model(**batch()).loss.backward()
    learned = int((batch()["labels"][:, 1:] != -100).sum())
    assert max(sizes) == 8
    assert sum(sizes) == learned, "each label once, nothing else"


@pytest.mark.parametrize("make", MODELS, ids=NAMES)
def test_the_form_for_sharded_models_is_the_same_loss(
    make: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = make(), batch()
    with chunked_loss(model, chunk=7):
        plain = model(**inputs)
        expected = gradients(model, plain.loss)
        monkeypatch.setattr("attnswap.training.loss.FSDPModule", torch.nn.Embedding)  # every model has one
        output = model(**inputs)
        actual = gradients(model, output.loss)
    assert output.loss.item() == pytest.approx(plain.loss.item(), abs=1e-6)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_without_any_label_every_parameter_still_gets_a_gradient() -> None:
    model, inputs = tiny_llama(), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    with chunked_loss(model):
        output = model(**inputs)
        found = gradients(model, output.loss)
    assert output.loss.item() == 0
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.abs().max() == 0 for gradient in found.values())


def test_it_leaves_no_trace_and_no_labels_means_no_change() -> None:
    model, inputs = tiny_llama(), batch()
    before = set(model.__dict__)
    expected = model(inputs["input_ids"]).logits
    with chunked_loss(model):
        assert torch.equal(model(inputs["input_ids"]).logits, expected)
    assert set(model.__dict__) == before
    model.forward = own = model.forward  # what a device hook would do
    with pytest.raises(RuntimeError), chunked_loss(model):
        raise RuntimeError
    assert model.__dict__["forward"] == own


def test_a_head_that_needs_more_than_the_hidden_states_is_refused() -> None:
    class Odd(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **kwargs: object) -> object:  # type: ignore[override]
            output = super().forward(input_ids=input_ids, **kwargs)
            output.logits = output.logits + input_ids[..., None]
            return output

    model = Odd(tiny_llama().config)
    with pytest.raises(UnsupportedModelError, match="gives other logits then"), chunked_loss(model):
        pass

    class Earlier(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **kwargs: object) -> object:  # type: ignore[override]
            states = self.model(input_ids, output_hidden_states=True).hidden_states
            return CausalLMOutputWithPast(logits=self.lm_head(states[-2]))

    with pytest.raises(UnsupportedModelError, match="cannot:"), chunked_loss(Earlier(tiny_llama().config)):
        pass
    model = tiny_llama()
    model.config.output_router_logits = True
    with pytest.raises(ConfigError, match="output_router_logits"), chunked_loss(model):
        pass
