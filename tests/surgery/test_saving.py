"""A model is saved only under a config that names what its modules compute, and refused before anything is written."""

import copy
import gc
import io
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import attnswap
from attnswap.errors import CheckpointError
from tests.helpers.tiny_models import tiny, tiny_config


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


def _lost_entry(model):
    del model.config.attnswap
    return model


def _stock_config(model):
    model.config = tiny().config
    return model


def _body_moved(model):
    other = tiny(seed=3)
    other.model = model.model
    return other


def _layer_moved(model):
    other = tiny(seed=3)
    other.model.layers[1] = model.model.layers[0]
    return other


def _attention_moved(model):
    other = tiny(seed=3)
    other.model.layers[1].self_attn = model.model.layers[0].self_attn
    return other


def _config_of_another(model):
    other = tiny(seed=3)
    other.config = model.config
    return other


def _modules_replaced(model):
    for layer, fresh in zip(model.model.layers, tiny().model.layers, strict=True):
        layer.self_attn = fresh.self_attn
    return model


MISTAKES = {
    "entry removed": _lost_entry,
    "config replaced": _stock_config,
    "body in another model": _body_moved,
    "layer in another model": _layer_moved,
    "attention in another model": _attention_moved,
    "config at a stock model": _config_of_another,
    "patched modules replaced": _modules_replaced,
}


@pytest.mark.parametrize("given", ["whole", "state_dict"])
@pytest.mark.parametrize("swap", ["softpick", "ssmax"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_refused_save_leaves_the_checkpoint_as_it_was(mistake, swap, given, tokens, tmp_path):
    model = tiny()
    attnswap.patch(model, swap)
    model.save_pretrained(tmp_path)
    right = logits(model, tokens)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    state = copy.deepcopy(model.state_dict())
    wrong = MISTAKES[mistake](model)
    with pytest.raises(CheckpointError):
        wrong.save_pretrained(tmp_path, **({"state_dict": state} if given == "state_dict" else {}))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert torch.equal(logits(attnswap.from_pretrained(tmp_path), tokens), right)


def _deeper(model):
    layer = copy.deepcopy(model.model.layers[1])
    layer.self_attn.layer_idx, layer.self_attn.config = 2, model.config
    model.model.layers.append(layer)
    model.config.num_hidden_layers = 3
    return model


def _shallower(model):
    del model.model.layers[1]
    model.config.num_hidden_layers = 1
    return model


@pytest.mark.parametrize("change", [_deeper, _shallower])
@pytest.mark.parametrize("swap", ["softpick", "ssmax", "forgetting-gate"])
def test_models_with_layers_added_or_taken_out_are_saved_as_they_are(change, swap, tokens, tmp_path):
    model = tiny()
    attnswap.patch(model, swap)
    right = logits(change(model), tokens)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(attnswap.from_pretrained(tmp_path), tokens), right)
    attnswap.set_ramp(model, 0.0)
    assert torch.equal(logits(model, tokens), logits(change(tiny()), tokens))


def _frozen(model):
    gc.freeze()
    return model


def _unpickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "origin", [lambda model: model, _frozen, copy.deepcopy, _unpickled], ids=["built", "frozen", "copied", "unpickled"]
)
def test_a_part_is_patched_and_the_whole_is_saved(origin, tokens, tmp_path):
    """Saved with the swap, or refused with a way out that works."""
    whole = origin(LlamaForCausalLM(tiny_config("llama")).eval())
    attnswap.patch(whole.model, "softpick")
    right = logits(whole, tokens)
    try:
        whole.save_pretrained(tmp_path)
    except CheckpointError as error:
        assert "model.config = model.model.config" in str(error)
        assert not list(tmp_path.iterdir())
        whole.config = whole.model.config
        whole.save_pretrained(tmp_path)
    assert torch.equal(logits(attnswap.from_pretrained(tmp_path), tokens), right)
    attnswap.unpatch(whole.model)
    assert not torch.equal(logits(whole, tokens), right)


def test_a_model_that_was_built_before_the_import(tmp_path):
    code = f"""
        from transformers import LlamaConfig, LlamaForCausalLM
        sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
        model = LlamaForCausalLM(LlamaConfig(**sizes))
        import attnswap
        attnswap.patch(model.model, "softpick")
        try:
            model.save_pretrained({str(tmp_path)!r})
        except attnswap.CheckpointError as error:
            print("refused")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "refused"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("swap", ["softpick", "ssmax"])
def test_an_entry_that_names_less_than_the_weights_hold_is_refused(swap, tmp_path):
    """By every class: the entry gone, empty, of other layers, or another config given."""
    base, patched = tmp_path / "base", tmp_path / "patched"
    model = tiny()
    model.save_pretrained(base)
    attnswap.patch(model, swap)
    model.save_pretrained(patched)
    values = json.loads((patched / "config.json").read_text())
    one = {**values["attnswap"], "swaps": [{**values["attnswap"]["swaps"][0], "layers": [0]}]}
    changes = [None, {}, {**values["attnswap"], "swaps": []}, one]
    for change in changes:
        changed = {name: x for name, x in values.items() if name not in ("attnswap", "attn_implementation")}
        (patched / "config.json").write_text(json.dumps(changed | ({} if change is None else {"attnswap": change})))
        for load in (AutoModelForCausalLM, LlamaForCausalLM):
            with pytest.raises(CheckpointError):
                load.from_pretrained(patched)
    (patched / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="its own config"):
        AutoModelForCausalLM.from_pretrained(patched, config=tiny_config("llama"))


def test_a_config_that_asks_for_attention_weights(tokens, tmp_path):
    """transformers takes that wish with "eager" attention alone; it comes back with the model, and without the swap."""
    config = tiny_config("llama")
    config._attn_implementation = "eager"
    config.output_attentions = True
    model = LlamaForCausalLM(config).eval()
    attnswap.patch(model, "softpick")
    right = model(tokens).attentions
    model.save_pretrained(tmp_path)
    again = attnswap.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again(tokens).attentions, right, strict=True))
    attnswap.unpatch(again)
    assert len(again(tokens).attentions) == 2
    assert again.config.output_attentions
    assert again.config._attn_implementation == "eager"


def test_saving_a_stock_model_is_as_before(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    assert "attnswap" not in (tmp_path / "config.json").read_text()


def test_what_could_not_be_loaded_is_not_saved(tokens, tmp_path):
    """Layers taken out whose layer_idx stays behind; a state of another lambda, or without one."""
    model = tiny(layers=3)
    attnswap.patch(model, "softpick")
    state = model.state_dict()
    lacking = {name: x for name, x in state.items() if not name.endswith("ramp")}
    moved = {name: torch.tensor(0.5) if name.endswith("ramp") else x for name, x in state.items()}
    for given in (lacking, moved):
        with pytest.raises(CheckpointError, match="state_dict given"):
            model.save_pretrained(tmp_path, state_dict=given)
    del model.model.layers[0]
    model.config.num_hidden_layers = 2
    with pytest.raises(CheckpointError, match="layer"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert torch.equal(logits(attnswap.from_pretrained(tmp_path), tokens), logits(model, tokens))


def test_a_layer_with_a_config_of_its_own_is_refused_by_name(tmp_path):
    model = tiny()
    attnswap.patch(model, "softpick")
    model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    with pytest.raises(CheckpointError, match="cannot be saved with its swaps"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_swaps_among_the_modules_that_plain_peft_trains(tokens, tmp_path):
    model = tiny()
    attnswap.patch(model, "softpick", ramp=0.5)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["attnswap"]))
    base = adapted.get_base_model()
    for name, buffer in base.named_buffers():
        if name.endswith("default.softpick.ramp"):
            buffer.fill_(0.75)
    assert "0.75" in str(attnswap.describe(base))
    with pytest.raises(CheckpointError, match="peft adapters"):
        base.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_saving_draws_no_random_number(tmp_path):
    model = tiny()
    attnswap.patch(model, "forgetting-gate")
    before = torch.get_rng_state()
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_code_that_comes_with_a_checkpoint_is_trusted_when_the_user_says_so(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    base, out = tmp_path / "base", tmp_path / "out"
    tiny().save_pretrained(base)
    (base / "mine.py").write_text(CODE)
    values = json.loads((base / "config.json").read_text())
    values |= {"model_type": "mine", "architectures": ["MineForCausalLM"]}
    values["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    (base / "config.json").write_text(json.dumps(values))
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    attnswap.patch(model, "softpick")
    model.save_pretrained(out)
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        attnswap.from_pretrained(out)
    again = attnswap.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
