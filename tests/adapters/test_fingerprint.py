"""An adapter's fingerprint tells its base from others, and knows what is random and what is rounded."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    QuantoConfig,
    TorchAoConfig,
)

import attnswap
from attnswap import AttnSwapConfig
from attnswap.adapters.fingerprint import check, fingerprint
from attnswap.errors import ConfigError
from tests.helpers.tiny_models import tiny

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a base."""
    path = tmp_path_factory.mktemp("base")
    tiny("llama").save_pretrained(path)
    return path


def classifier(folder, seed: int, labels: int = 3):
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels).eval()


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("copied", [False, True], ids=["loaded", "copied"])
@pytest.mark.parametrize(
    "options",
    [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["score"]}, {"task_type": "SEQ_CLS", **LORA}],
    ids=["peft's head", "named", "with low rank"],
)
def test_a_head_that_an_adapter_brings_is_random_in_the_base(options, copied, labels, folder, tokens, tmp_path):
    base = classifier(folder, 1, labels)
    model = get_peft_model(copy.deepcopy(base) if copied else base, AttnSwapConfig(swap="softpick", **options)).eval()
    model.save_pretrained(tmp_path)
    right = model(tokens).logits
    assert torch.equal(PeftModel.from_pretrained(classifier(folder, 2, labels), tmp_path).eval()(tokens).logits, right)
    tiny("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="other weights"):
        PeftModel.from_pretrained(classifier(tmp_path / "other", 1, labels), tmp_path)


def test_a_new_head_is_not_compared_and_a_read_one_is(folder):
    model = classifier(folder, 1)
    assert "score.weight" not in fingerprint(model)["weights"]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert "lm_head.weight" in fingerprint(loaded)["weights"]


def test_a_fingerprint_with_a_random_head_in_it_stays_valid(folder):
    """Earlier versions, and models whose weights do not say that they were read, sample the head too."""
    saved = fingerprint(copy.deepcopy(classifier(folder, 1)))
    assert "score.weight" in saved["weights"]
    check(saved, classifier(folder, 2))
    check(saved, copy.deepcopy(classifier(folder, 2)), ["score"])
    with pytest.raises(ConfigError, match=r"score\.weight"):
        check(saved, copy.deepcopy(classifier(folder, 2)))
    check(fingerprint(tiny("llama")), AutoModelForCausalLM.from_pretrained(folder))


class Rounded(torch.Tensor):
    """A tensor that stands for a quantized one and cannot be indexed, as those of quantizers."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            raise NotImplementedError
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize(
    "kind", [lambda w: w.mul(1.05).as_subclass(Rounded), lambda w: w.mul(100).to(torch.int8)], ids=["class", "int8"]
)
def test_what_is_quantized_is_not_compared(kind, folder):
    whole = AutoModelForCausalLM.from_pretrained(folder)
    rounded = AutoModelForCausalLM.from_pretrained(folder)
    for module in list(rounded.model.layers.modules()):
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(kind(module.weight.data), requires_grad=False)
    assert set(fingerprint(rounded)["weights"]) >= {"model.embed_tokens.weight", "lm_head.weight"}
    assert not any("proj" in name for name in fingerprint(rounded)["weights"])
    check(fingerprint(whole), rounded)
    check(fingerprint(rounded), whole)
    with pytest.raises(ConfigError, match="other weights"):
        check(fingerprint(rounded), tiny("llama", seed=1))


def torchao() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTIZERS = {
    "torchao": torchao,
    "optimum.quanto": lambda: QuantoConfig(weights="int8"),
    "bitsandbytes": lambda: BitsAndBytesConfig(load_in_4bit=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("package", QUANTIZERS)
def test_a_quantized_base(package, tokens, tmp_path):
    """Adapted, trained a step, saved, and loaded onto the quantized base, onto the whole one, not onto another."""
    pytest.importorskip(package)
    config = tiny("llama").config
    config.hidden_size, config.head_dim, config.intermediate_size, config.vocab_size = 64, 16, 64, 128
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")

    def base(where="base", whole=False):
        options = {} if whole else {"quantization_config": QUANTIZERS[package]()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_pretrained(tmp_path / where, **options).eval()

    patched = base()
    attnswap.patch(patched, "ssmax")
    assert patched(tokens).logits.isfinite().all()
    model = get_peft_model(base(), AttnSwapConfig(swap="ssmax", **LORA))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        right = model.eval()(tokens).logits
        for options in ({}, {"low_cpu_mem_usage": True}):
            again = PeftModel.from_pretrained(base(), tmp_path / "adapter", **options).eval()
            assert torch.equal(again(tokens).logits, right)
        again = base()
        again.load_adapter(tmp_path / "adapter")
        assert torch.equal(again(tokens).logits, right)
        whole = PeftModel.from_pretrained(base(whole=True), tmp_path / "adapter").eval()
        assert (whole(tokens).logits - right).abs().max() < 0.5 * right.abs().max()
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="other weights"):
        PeftModel.from_pretrained(base("other"), tmp_path / "adapter")
