"""Saving, reloading and refusing checkpoints."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BartForConditionalGeneration,
    LlamaConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

import attnswap
from attnswap.errors import CheckpointError
from attnswap.surgery.inputs import tiny_inputs
from attnswap.surgery.patched import spec_of
from attnswap.surgery.spec import FORMAT
from tests.helpers.paths import FIXTURES
from tests.helpers.tiny_models import ARCHITECTURES, SWAPS, tiny

FIXTURE = FIXTURES / "format1"


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.thinned(2)
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_round_trip_is_exact(kind, swap, patched, tokens, tmp_path):
    """Both ways of loading give the same logits, and a second save is the same again."""
    model = patched(kind, swap, ramp=0.75)
    model.save_pretrained(tmp_path / "a")
    expected = logits(model, tokens)
    ours = attnswap.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(ours, tokens), expected)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    plain.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(logits(again, tokens), expected)
    assert spec_of(again) == spec_of(model)
    assert attnswap.describe(again) == attnswap.describe(model)


def test_mixed_heads_sharded_and_ramped(patched, tokens, tmp_path):
    model = patched("llama", {"forgetting-gate": [0, 1], attnswap.SSMax(form="scale"): [3]}, layers="1:")
    attnswap.patch(model, "softpick", heads=[2], layers=[0], ramp=0.0)
    attnswap.set_ramp(model, 0.3, layers=1)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(attnswap.from_pretrained(tmp_path), tokens), logits(model, tokens))


@pytest.mark.parametrize("swap", SWAPS)
def test_bf16(swap, patched, tokens, tmp_path):
    """A model saved in bf16 keeps its swap's tensors in fp32, and loads exactly."""
    patched("llama", swap).save_pretrained(tmp_path / "fp32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for name, parameter in attnswap.swap_parameters(loaded).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, attnswap.swap_parameters(model)[name])
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    narrowed = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert all(p.dtype == torch.float32 for p in attnswap.swap_parameters(narrowed).values())


def test_base_model_and_other_implementation(patched, tokens, tmp_path):
    model = patched("llama", "ssmax", layers=[0])
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(tokens).last_hidden_state, hidden)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert attnswap.describe(eager).before == "eager"
    assert torch.allclose(logits(eager, tokens), logits(model, tokens), atol=1e-5)
    attnswap.unpatch(eager)
    assert eager.config._attn_implementation == "eager"


def test_unpatch_after_reload(patched, tokens, tmp_path):
    stock = tiny("llama")
    model = patched("llama", "forgetting-gate")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    attnswap.unpatch(loaded)
    assert torch.equal(logits(loaded, tokens), logits(stock, tokens))
    loaded.save_pretrained(tmp_path / "stock")
    assert "attnswap" not in (tmp_path / "stock" / "config.json").read_text()


def test_from_config_starts_afresh(patched, tokens, tmp_path):
    """A config with a spec builds a model whose swap has its initial values, not uninitialised memory."""
    patched("llama", "forgetting-gate").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    for name, parameter in attnswap.swap_parameters(model).items():
        assert parameter.abs().max() < 1, name
    assert torch.isfinite(logits(model, tokens)).all()


def test_pipeline(patched, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(97)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="w1", eos_token="w2", pad_token="w0")
    patched("llama", "forgetting-gate").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    text = generate("w5 w6 w7", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("w5 w6 w7w")


def test_a_process_without_attnswap_refuses(patched, tmp_path):
    patched("llama", "ssmax").save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['attnswap'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "attnswap" in done.stderr


def test_fixture_of_format_1_loads(tokens):
    """A checkpoint written by version 1 of the format must load for ever."""
    model = attnswap.from_pretrained(FIXTURE)
    expected = torch.tensor(json.loads((FIXTURE / "logits.json").read_text()))
    assert torch.allclose(logits(model, tokens[:1, :6])[0, -1, :8], expected, atol=1e-4)


@torch.no_grad()
def test_format_2_stays_readable():
    """A checkpoint whose cross-attention is patched, saved before an entry could name several parts."""
    model = attnswap.from_pretrained(FIXTURES / "format2", auto_class=BartForConditionalGeneration)
    expected = torch.tensor(json.loads((FIXTURES / "format2" / "logits.json").read_text()))
    assert torch.allclose(model(**tiny_inputs(model)).logits[0, -1, :8], expected, atol=1e-4)
    saved = json.loads((FIXTURES / "format2" / "config.json").read_text())["attnswap"]
    assert model.config.attnswap == saved


@torch.no_grad()
def test_a_saved_adapter_stays_readable():
    base = attnswap.from_pretrained(FIXTURE)
    attnswap.unpatch(base)
    model = PeftModel.from_pretrained(base, FIXTURES / "adapter").eval()
    ids = (torch.arange(6)[None] * 7 + 3) % base.config.vocab_size
    expected = torch.tensor(json.loads((FIXTURES / "adapter" / "logits.json").read_text()))
    assert torch.allclose(model(ids).logits[0, -1, :8], expected, atol=1e-4)


def edit_config(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def test_newer_format_and_damaged_spec(patched, tmp_path):
    patched("llama", "ssmax").save_pretrained(tmp_path)
    edit_config(tmp_path, lambda c: c["attnswap"].update(format=FORMAT + 1))
    with pytest.raises(CheckpointError, match="upgrade attnswap"):
        attnswap.from_pretrained(tmp_path)
    edit_config(tmp_path, lambda c: c["attnswap"].update(format=1, swaps=[{"slot": "x"}]))
    with pytest.raises(CheckpointError, match="damaged"):
        attnswap.from_pretrained(tmp_path)
    swap = {"slot": "x", "swap": {"name": "ssmx"}, "layers": [0], "heads": None, "ramp": 1.0}
    edit_config(tmp_path, lambda c: c["attnswap"].update(swaps=[swap]))
    with pytest.raises(CheckpointError, match="ssmax"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_layer_that_does_not_exist(patched, tmp_path):
    patched("llama", "ssmax").save_pretrained(tmp_path)
    edit_config(tmp_path, lambda c: c["attnswap"]["swaps"][0].update(layers=[0, 7]))
    with pytest.raises(CheckpointError, match="layer 7"):
        attnswap.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "load", [attnswap.from_pretrained, AutoModelForCausalLM.from_pretrained], ids=["attnswap", "transformers"]
)
def test_missing_swap_parameters(load, patched, tmp_path):
    """Swap parameters that are not in the file are an error, never fresh values."""
    from safetensors.torch import load_file, save_file

    patched("llama", "ssmax").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if not k.endswith("attnswap.ssmax.scale")}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="scale"):
        load(tmp_path)


def test_truncated_file(patched, tmp_path):
    patched("llama", "ssmax").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()[:-500]
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="complete"):
        attnswap.from_pretrained(tmp_path)
    assert file.read_bytes() == content


def test_not_a_patched_checkpoint(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"attnswap\.patch"):
        attnswap.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="config"):
        attnswap.from_pretrained(tmp_path / "nothing")


def test_only_safetensors_are_written(patched, tmp_path):
    patched("llama", "forgetting-gate").save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".safetensors", ".json"}


def test_a_state_brings_its_lambda(patched, tokens):
    """Also one per head, where the model has one for all."""
    source, model = patched("llama", "softpick", ramp=0.5), patched("llama", "softpick")
    for ramp in (0.5, [0.0, 0.25, 0.5, 1.0]):
        attnswap.set_ramp(source, ramp)
        model.load_state_dict(source.state_dict())
        assert torch.equal(logits(model, tokens), logits(source, tokens))
        assert spec_of(model) == spec_of(source)


def test_the_whole_model_pickled_by_torch(patched, tokens, tmp_path):
    """Hooks travel with a copied or pickled model, so it stays what it was."""
    model = patched("llama", "forgetting-gate")
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_lora_on_a_patched_model(patched, tokens):
    """Adapters of peft go beside the swap; merged, they leave it in place."""
    from peft import LoraConfig, get_peft_model

    model = patched("llama", "forgetting-gate")
    expected = logits(model, tokens)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["attnswap"])
    adapted = get_peft_model(model, config)
    assert torch.allclose(logits(adapted, tokens), expected, atol=1e-6)
    merged = adapted.merge_and_unload()
    assert torch.allclose(logits(merged, tokens), expected, atol=1e-5)


def test_a_ramp_moves_in_every_copy_that_peft_keeps(patched, tokens):
    """modules_to_save keeps a frozen and a trained copy of the swaps; both have the new lambda."""
    from peft import LoraConfig, get_peft_model

    model = patched("llama", "softpick", ramp=0.0)
    expected = logits(patched("llama", "softpick"), tokens)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["attnswap"]))
    attnswap.set_ramp(model, 1.0)
    assert torch.allclose(logits(adapted, tokens), expected, atol=1e-6)


def test_a_patched_inner_model_is_saved_by_the_model_around_it(tokens, tmp_path):
    model = tiny("llama")
    attnswap.patch(model.model, "softpick")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    attnswap.unpatch(model)
    assert torch.equal(logits(model, tokens), logits(tiny("llama"), tokens))


@pytest.mark.parametrize("load", [attnswap.loading.load_model, attnswap.from_pretrained])
def test_swap_parameters_without_their_config(load, patched, tmp_path):
    """Replacing the config after patching must not end in a plain softmax model that looks loaded."""
    patched("llama", "ssmax").save_pretrained(tmp_path)
    if load is attnswap.from_pretrained:  # it asks for a spec, so leave it one of two layers
        edit_config(tmp_path, lambda c: c["attnswap"]["swaps"][0].update(layers=[0]))
    else:
        edit_config(tmp_path, lambda c: [c.pop(k) for k in ("attnswap", "attn_implementation")])
    with pytest.raises(CheckpointError, match=r"layers\.[01]\.self_attn\.attnswap.*names no swap"):
        load(tmp_path)


def test_assigned_half_precision_state_stays_fp32(patched, tokens):
    model = patched("llama", "forgetting-gate")
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert all(p.dtype == torch.float32 for p in attnswap.swap_parameters(model).values())
    assert torch.isfinite(logits(model, tokens)).all()


def test_a_cache_with_gates_can_be_pickled(patched, tokens):
    model = patched("llama", "forgetting-gate")
    with torch.no_grad():
        cache = model(tokens[:, :12], use_cache=True).past_key_values
        twin = pickle.loads(pickle.dumps(cache))
        expected = model(tokens[:, 12:], past_key_values=cache).logits
        assert torch.equal(model(tokens[:, 12:], past_key_values=twin).logits, expected)


@pytest.mark.parametrize("change", [{"ramp": 0.5}, {"ramp": 7}, {"heads": [9]}, {"ramp": [1.0, 1.0]}])
def test_a_spec_edited_by_hand(change, patched, tokens, tmp_path):
    """lambda stands in config.json and in the weights; where they differ neither is believed."""
    patched("llama", "softpick").save_pretrained(tmp_path)
    edit_config(tmp_path, lambda c: c["attnswap"]["swaps"][0].update(change))
    with pytest.raises(CheckpointError):
        attnswap.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(tmp_path)(tokens)


def test_servers_that_go_by_architecture_names_find_none(patched, tokens, tmp_path):
    model = patched("llama", "softpick")
    model.save_pretrained(tmp_path / "patched")
    written = json.loads((tmp_path / "patched/config.json").read_text())
    assert written["architectures"] == ["AttnSwapLlamaForCausalLM"]
    assert not hasattr(transformers, written["architectures"][0])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert again.config.architectures == ["LlamaForCausalLM"]
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text()) == written
    for read in (AutoConfig, LlamaConfig):  # trainers look up the class to load with by what a config says
        config = read.from_pretrained(tmp_path / "patched")
        assert config.architectures == type(config)(**config.to_dict()).architectures == ["LlamaForCausalLM"]
        config.save_pretrained(tmp_path / "config")
        assert json.loads((tmp_path / "config/config.json").read_text())["architectures"] == written["architectures"]
    attnswap.unpatch(again)
    again.save_pretrained(tmp_path / "stock")
    assert json.loads((tmp_path / "stock/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
