"""Figures of attention structure equal those computed from the weights, patched or not, and find what is planted."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Exaone4Config,
    FalconConfig,
    GPTNeoConfig,
    Llama4TextConfig,
    MistralConfig,
)

import attnswap
from attnswap.errors import ConfigError, NumericsError, UnsupportedModelError
from attnswap.evaluation.fidelity import measure_fidelity
from attnswap.evaluation.structure import measure_structure
from tests.helpers.training import byte_tokenizer, tiny_gemma2, tiny_gpt2, tiny_llama

TEXT = "The cat sat on the mat, and the dog did not. " * 8


def weights_of(model, ids):
    own = model.config._attn_implementation
    if own != "attnswap":
        model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(ids, output_attentions=True, output_hidden_states=True)
    if own != "attnswap":
        model.set_attn_implementation(own)
    return found


@pytest.mark.parametrize("swap", [None, "softpick", "entmax", {"softpick": [0, 1], "ssmax": [2]}])
def test_figures_are_those_of_the_weights(swap) -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    if swap is not None:
        attnswap.patch(model, swap)
    found = measure_structure(model, tokenizer, text=TEXT, window=100, windows=1)
    ids = torch.tensor([[0, *tokenizer(TEXT, add_special_tokens=False)["input_ids"][:99]]])
    outputs = weights_of(model, ids)
    for layer, weights in enumerate(outputs.attentions):
        rows = weights[0, :, 64:].double()
        np.testing.assert_allclose(found.first[layer], rows[..., 0].mean(-1), atol=1e-6)
        np.testing.assert_allclose(found.row_sum[layer], rows.sum(-1).mean(-1), atol=1e-6)
        share = rows / rows.sum(-1, keepdim=True)
        entropy = torch.where(share > 0, -share * share.clamp(min=1e-300).log(), 0.0).sum(-1).mean(-1)
        np.testing.assert_allclose(found.entropy[layer], entropy, atol=1e-5)
        visible = torch.ones(100, 100).tril().bool()[64:]
        np.testing.assert_allclose(
            found.zeros[layer], ((rows == 0) & visible).double().sum((-1, -2)) / visible.sum(), atol=1e-9
        )
        hidden = outputs.hidden_states[layer + 1][0].double()
        if layer + 1 < len(outputs.attentions):  # the last one is after the final norm
            assert found.largest[layer] == pytest.approx(hidden.abs().max().item(), rel=1e-5)
            centred = hidden - hidden.mean()
            kurtosis = centred.pow(4).mean() / centred.square().mean() ** 2
            assert found.kurtosis[layer] == pytest.approx(kurtosis.item(), rel=1e-4)
    assert model.config._attn_implementation == ("sdpa" if swap is None else "attnswap")
    assert found.summary()["row_sum"] == pytest.approx(float(found.row_sum.mean()))


def test_a_sink_and_a_dead_head_are_found() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    attnswap.patch(model, "softpick")
    found = measure_structure(model, tokenizer, text=TEXT, window=100, windows=2)
    assert found.dead_rate == 1.0, "scores of 0 attend to nothing"
    attnswap.unpatch(model)
    plain = measure_structure(model, tokenizer, text=TEXT, window=100, windows=2)
    assert (plain.dead_rate, plain.sink_rate) == (0.0, 0.0)
    assert plain.entropy.mean() == pytest.approx(np.mean(np.log(np.arange(65, 101))), abs=1e-4)
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[1:] = model.model.embed_tokens.weight[1:] * 0.01
        model.model.embed_tokens.weight[1:] += model.model.embed_tokens.weight[0]
        model.model.embed_tokens.weight[0] *= -1
    keys = model.model.layers[0].self_attn
    with torch.no_grad():
        keys.k_proj.weight.copy_(-torch.eye(16, 32) * 30)
        keys.q_proj.weight.copy_(torch.cat([torch.eye(16, 32)] * 2) * 30)
    sunk = measure_structure(model, tokenizer, text=TEXT, window=100, windows=1)
    assert (sunk.first[0] > 0.3).any()
    assert sunk.sink_rate >= 0.125


def test_keys_outside_a_window_are_no_zeros_and_nan_is_not_hidden() -> None:
    model = tiny_gemma2()
    before = model.config._attn_implementation
    found = measure_structure(model, byte_tokenizer(), text=TEXT, window=100, windows=1)
    assert found.zeros.max() == 0.0, "softmax gives every visible key some weight"
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="is not finite"):
        measure_structure(model, byte_tokenizer(), text=TEXT, window=100, windows=1)
    assert model.config._attn_implementation == before


def small(config) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 256}


@pytest.mark.parametrize("swap", [None, "ssmax"])
def test_figures_of_a_model_without_an_attention_interface_are_those_of_its_causal_weights(swap) -> None:
    config = FalconConfig(**SIZES, alibi=False, bos_token_id=0, eos_token_id=0)
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    model = small(config)
    eager.load_state_dict(model.state_dict())
    if swap is not None:
        attnswap.patch(model, swap)  # starts as softmax
    assert model.config._attn_implementation == "sdpa"
    found = measure_structure(model, byte_tokenizer(), text=TEXT, window=100, windows=1)
    assert model.config._attn_implementation == "sdpa"
    ids = torch.tensor([[0, *byte_tokenizer()(TEXT, add_special_tokens=False)["input_ids"][:99]]])
    with torch.no_grad():
        weights = eager(ids, output_attentions=True).attentions
    for layer, own in enumerate(weights):
        assert own[0].triu(1).max() == 0.0
        np.testing.assert_allclose(found.first[layer], own[0, :, 64:, 0].mean(-1), atol=1e-6)


def test_local_layers_count_the_keys_that_they_see() -> None:
    config = GPTNeoConfig(
        hidden_size=32, num_heads=4, num_layers=2, vocab_size=256, attention_types=[[["global", "local"], 1]],
        window_size=80, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = small(config)
    found = measure_structure(model, byte_tokenizer(), text=TEXT, window=100, windows=1)
    assert found.zeros.max() == 0.0
    ids = torch.tensor([[0, *byte_tokenizer()(TEXT, add_special_tokens=False)["input_ids"][:99]]])
    outputs = weights_of(model, ids)
    seeing = outputs.attentions[1][0, :, 64:80, 0]  # queries from 80 on see no first token
    np.testing.assert_allclose(found.first[1], seeing.mean(-1), atol=1e-6)
    assert found.largest[0] == pytest.approx(outputs.hidden_states[1].abs().max().item(), rel=1e-5)
    mistral = small(MistralConfig(**SIZES, num_key_value_heads=2, intermediate_size=64, sliding_window=80))
    assert measure_structure(mistral, byte_tokenizer(), text=TEXT, window=100, windows=1).zeros.max() == 0.0


def test_keys_of_other_chunks_are_no_zeros() -> None:
    config = Llama4TextConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, intermediate_size=64, intermediate_size_mlp=64, num_local_experts=2,
        attention_chunk_size=80, no_rope_layers=[1, 0], pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    assert config.layer_types == ["chunked_attention", "full_attention"]
    found = measure_structure(small(config), byte_tokenizer(), text=TEXT, window=100, windows=1)
    assert found.zeros.max() == 0.0


def test_a_window_that_a_layer_names_and_does_not_use_is_no_reach() -> None:
    config = Exaone4Config(
        **SIZES, num_key_value_heads=2, intermediate_size=64, sliding_window=80, sliding_window_pattern=2,
    )  # fmt: skip
    assert config.layer_types == ["sliding_attention", "full_attention"]
    model = small(config)
    assert all(layer.self_attn.sliding_window == 80 for layer in model.model.layers)
    found = measure_structure(model, byte_tokenizer(), text=TEXT, window=100, windows=1)
    ids = torch.tensor([[0, *byte_tokenizer()(TEXT, add_special_tokens=False)["input_ids"][:99]]])
    weights = weights_of(model, ids).attentions[1][0, :, 64:, 0]
    np.testing.assert_allclose(found.first[1], weights.mean(-1), atol=1e-6)


def test_weights_of_later_keys_are_refused() -> None:
    config = BertConfig(**SIZES, intermediate_size=64, bos_token_id=0)
    with pytest.raises(UnsupportedModelError, match="keys after the query"):
        measure_structure(small(config), byte_tokenizer(), text=TEXT, window=100, windows=1)


def test_learned_positions_work_and_short_texts_are_refused() -> None:
    assert measure_structure(tiny_gpt2(), byte_tokenizer(), text=TEXT, window=80, windows=1).first.shape == (2, 4)
    with pytest.raises(ConfigError, match="too few"):
        measure_structure(tiny_llama(), byte_tokenizer(), text="short", window=80)
    with pytest.raises(ConfigError, match="learned positions"):
        measure_structure(tiny_gpt2(), byte_tokenizer(), text=TEXT, window=200)
    with pytest.raises(ConfigError, match="more than 64"):
        measure_structure(tiny_llama(), byte_tokenizer(), text=TEXT, window=64)


def test_fidelity_is_the_divergence_of_the_predictions() -> None:
    original, model, tokenizer = tiny_llama(), tiny_llama(), byte_tokenizer()
    same = measure_fidelity(model, original, tokenizer, text=TEXT, context=64, windows=2)
    assert same.kl == pytest.approx(0.0, abs=1e-9)
    assert same.top1 == 1.0
    attnswap.patch(model, "softpick")
    found = measure_fidelity(model, original, tokenizer, text=TEXT, context=64, windows=1)
    ids = torch.tensor([[0, *tokenizer(TEXT, add_special_tokens=False)["input_ids"][:63]]])
    with torch.no_grad():
        p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (original, model))
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert found.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found.tokens == 64
    with pytest.raises(ConfigError, match="vocabularies"):
        measure_fidelity(model, tiny_llama(vocab_size=300), tokenizer, text=TEXT, context=64)
