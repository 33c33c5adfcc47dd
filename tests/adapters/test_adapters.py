"""Swaps as peft adapters: round trips, switching, removal, and everything that must not pass unnoticed."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

import attnswap
from attnswap import AttnSwapConfig
from attnswap.errors import ConfigError, UnsupportedModelError
from attnswap.surgery.patched import spec_of
from tests.helpers.patched_models import move_away
from tests.helpers.tiny_models import SWAPS, tiny

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def logits(model, tokens, **options) -> Tensor:
    with torch.no_grad():
        return model(tokens, **options).logits


@pytest.fixture
def stock(tmp_path):
    """The folder of a saved tiny model."""
    tiny("llama").save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def load(stock):
    return AutoModelForCausalLM.from_pretrained(stock).eval()


def disturb(model, seed: int = 3) -> None:
    """Moves an adapter's low-rank weights and swap away from their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.1, generator=generator)
        move_away(model.get_base_model() if isinstance(model, PeftModel) else model, 20, seed)


def adapted(stock, swap="ssmax", **options) -> PeftModel:
    model = get_peft_model(load(stock), AttnSwapConfig(swap=swap, **options)).eval()
    disturb(model)
    return model


@pytest.mark.parametrize("options", [LORA, {}], ids=["lora", "swap only"])
@pytest.mark.parametrize("swap", SWAPS)
def test_the_life_of_an_adapter(swap, options, stock, tokens, tmp_path):
    """Every way to load gives the same logits; disabled, unloaded and merged it is what it should be."""
    before = logits(load(stock), tokens)
    model = adapted(stock, swap, **options)
    with_swap = logits(model, tokens)
    assert (with_swap - before).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), before)
    assert torch.equal(logits(model, tokens), with_swap)

    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("*.bin"))
    again = PeftModel.from_pretrained(load(stock), tmp_path / "adapter")
    assert (logits(again, tokens) - with_swap).abs().max() <= 1e-6
    assert (
        logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), tokens) - with_swap
    ).abs().max() <= 1e-6
    assert (logits(load(tmp_path / "adapter"), tokens) - with_swap).abs().max() <= 1e-6

    plain = again.unload()
    assert torch.equal(logits(plain, tokens), before)
    assert plain.state_dict().keys() == load(stock).state_dict().keys()
    assert spec_of(plain) is None
    merged = model.merge_and_unload()
    assert (logits(merged, tokens) - with_swap).abs().max() <= 1e-5 * with_swap.abs().max()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged"), tokens), logits(merged, tokens))
    assert not any("lora" in name for name in merged.state_dict())


def test_an_unloaded_base_takes_a_patch_again(stock, tokens):
    base = adapted(stock, "softpick", **LORA).unload()
    attnswap.patch(base, "softpick")
    fresh = load(stock)
    attnswap.patch(fresh, "softpick")
    assert torch.equal(logits(base, tokens), logits(fresh, tokens))


def test_a_fresh_identity_adapter_changes_nothing(stock, tokens):
    model = get_peft_model(load(stock), AttnSwapConfig(swap="ssmax", **LORA)).eval()
    assert (logits(model, tokens) - logits(load(stock), tokens)).abs().max() <= 1e-6


@pytest.mark.parametrize("options", [LORA, {}], ids=["lora", "swap only"])
def test_only_the_adapter_is_trained(options, stock, tokens):
    model = get_peft_model(load(stock), AttnSwapConfig(swap="ssmax", **options))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name or ".attnswap." in name for name in trainable)
    assert sum("scale" in name for name in trainable) == 2
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    moved = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # of low-rank weights only one factor has a gradient at the start
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in frozen.items())
    assert not any(torch.equal(now[name], p) for name, p in moved.items())


def test_several_adapters_on_one_base(stock, tokens, tmp_path):
    """Each has its own swap; switching switches it, deleting one leaves the others."""
    before, found = logits(load(stock), tokens), {}
    model = get_peft_model(load(stock), AttnSwapConfig(swap="ssmax", **LORA), adapter_name="a").eval()
    model.add_adapter("b", AttnSwapConfig(swap="softpick", layers=[1], **LORA))
    model.add_adapter("c", AttnSwapConfig(swap="forgetting-gate"))
    for seed, name in enumerate("abc"):
        model.set_adapter(name)
        disturb(model, seed)
    for name in "abc":
        model.set_adapter(name)
        found[name] = logits(model, tokens)
        model.save_pretrained(tmp_path / "all", selected_adapters=[name])
        spec = spec_of(model.get_base_model())
        assert {s.swap.name for slots in spec.layers.values() for s in slots.values()} == {
            model.peft_config[name].swap["name"]
        }
    assert len({float(x.sum()) for x in [before, *found.values()]}) == 4
    for name in "abc":
        alone = PeftModel.from_pretrained(load(stock), tmp_path / "all" / name)
        assert (logits(alone, tokens) - found[name]).abs().max() <= 1e-6
    together = PeftModel.from_pretrained(load(stock), tmp_path / "all" / "a", adapter_name="a")
    together.load_adapter(tmp_path / "all" / "b", "b")
    for name in "ab":
        together.set_adapter(name)
        assert (logits(together, tokens) - found[name]).abs().max() <= 1e-6
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), before)
    model.set_adapter("b")
    model.delete_adapter("b")
    assert model.active_adapters == ["a"]
    assert torch.equal(logits(model, tokens), found["a"])
    model.set_adapter("c")
    assert (logits(model.merge_and_unload(), tokens) - found["c"]).abs().max() <= 1e-5 * found["c"].abs().max()


def test_the_trained_adapter_is_the_active_one(stock):
    model = get_peft_model(load(stock), AttnSwapConfig(swap="ssmax"), adapter_name="a")
    model.add_adapter("b", AttnSwapConfig(swap="forgetting-gate"))
    for active in "ab":
        model.set_adapter(active)
        assert {n.split("modules_to_save.")[1][0] for n, p in model.named_parameters() if p.requires_grad} == {active}


def test_through_the_methods_of_transformers(stock, tokens, tmp_path):
    """add_adapter, set_adapter, disable_adapters, enable_adapters, delete_adapter and save_pretrained of the model."""
    model = load(stock)
    before = logits(model, tokens)
    model.add_adapter(AttnSwapConfig(swap="softpick"), "a")
    model.add_adapter(AttnSwapConfig(swap="ssmax", **LORA), "b")
    model.add_adapter(LoraConfig(**LORA), "plain")
    found = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        disturb(model)
        found[name] = logits(model, tokens)
        assert model.active_adapters() == [name]
    model.set_adapter("a")
    assert torch.equal(logits(model, tokens), found["a"])
    model.disable_adapters()
    assert torch.equal(logits(model, tokens), before)
    model.enable_adapters()
    assert torch.equal(logits(model, tokens), found["a"])
    model.set_adapter("plain")
    assert model.active_adapters() == ["plain"]
    assert (logits(model, tokens) - found["a"]).abs().max() > 1e-3
    model.set_adapter("b")
    model.save_pretrained(tmp_path / "b")
    assert (logits(load(tmp_path / "b"), tokens) - found["b"]).abs().max() <= 1e-6
    model.delete_adapter("b")
    model.set_adapter("a")
    assert torch.equal(logits(model, tokens), found["a"])


@pytest.mark.parametrize("swap", ["softpick", "forgetting-gate"])
def test_generation_and_gradient_checkpointing(swap, stock, tokens):
    model = adapted(stock, swap, **LORA)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(input_ids=tokens, **options)
    assert torch.equal(cached, model.generate(input_ids=tokens, use_cache=False, **options))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    expected = gradients()
    model.train()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        for ours, theirs in zip(gradients(), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


def test_lambda_is_saved_where_it_is(stock, tokens, tmp_path):
    model = adapted(stock, "softpick", ramp=0.25)
    base = model.get_base_model()
    quarter = logits(model, tokens)
    attnswap.set_ramp(base, [0.0, 0.5, 1.0, 0.25], layers=[0])
    moved = logits(model, tokens)
    assert (moved - quarter).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    assert (logits(PeftModel.from_pretrained(load(stock), tmp_path), tokens) - moved).abs().max() <= 1e-6


def test_heads_and_layers(stock, tokens, tmp_path):
    swaps = {"ssmax": [0, 1], "softpick": [2]}
    model = adapted(stock, swaps, layers="1:")
    expected = logits(model, tokens)
    by_hand = load(stock)
    attnswap.patch(by_hand, swaps, layers="1:")
    move_away(by_hand, 20, 3)
    assert (logits(by_hand, tokens) - expected).abs().max() <= 1e-6
    model.save_pretrained(tmp_path)
    assert (logits(PeftModel.from_pretrained(load(stock), tmp_path), tokens) - expected).abs().max() <= 1e-6


def test_a_part_of_an_encoder_decoder(tokens, tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 97, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    BartForConditionalGeneration(BartConfig(**sizes, **heads, init_std=0.3)).save_pretrained(tmp_path / "base")

    def base():
        return BartForConditionalGeneration.from_pretrained(tmp_path / "base").eval()

    inputs = {"input_ids": tokens, "decoder_input_ids": tokens[:, :9]}
    model = get_peft_model(base(), AttnSwapConfig(swap="softpick", part="encoder", task_type="SEQ_2_SEQ_LM")).eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        assert (expected - base()(**inputs).logits).abs().max() > 1e-4
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(base(), tmp_path / "adapter")
        assert torch.equal(again(**inputs).logits, expected)
        with pytest.raises(ConfigError, match="one part"):
            again.add_adapter("b", AttnSwapConfig(swap="ssmax", part="decoder"))
        assert torch.equal(again(**inputs).logits, expected)


def test_copies_are_independent(stock, tokens):
    model = adapted(stock, "forgetting-gate", **LORA)
    expected, twin = logits(model, tokens), copy.deepcopy(model)
    assert torch.equal(logits(twin, tokens), expected)
    attnswap.set_ramp(twin.get_base_model(), 0.5)
    assert (logits(twin, tokens) - expected).abs().max() > 1e-4
    assert torch.equal(twin.unload()(tokens).logits, logits(load(stock), tokens))
    assert torch.equal(logits(model, tokens), expected)


def refuse(error, match, model, act, tokens) -> None:
    """Checks that an act raises and leaves the model as it was, down to what is trained."""
    before, trained = logits(model, tokens), [p.requires_grad for p in model.parameters()]
    names = list(model.state_dict())
    with pytest.raises(error, match=match):
        act()
    assert torch.equal(logits(model, tokens), before)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert list(model.state_dict()) == names


BAD = {
    "unknown swap": ({"swap": "ssmx"}, ConfigError, 'Did you mean "ssmax"'),
    "no swap": ({}, ConfigError, "needs a swap"),
    "a layer that does not exist": ({"swap": "ssmax", "layers": [7]}, ConfigError, "layer 7"),
    "half a group of heads": ({"swap": "forgetting-gate", "heads": [9]}, ConfigError, "head"),
    "a predicate of layers": ({"swap": "ssmax", "layers": lambda i: True}, ConfigError, "written to a file"),
    "a ramp of heads": ({"swap": "ssmax", "ramp": [0.0, 1.0]}, ConfigError, "one number"),
    "modules that do not exist": ({"swap": "ssmax", "target_modules": ["nothing"]}, ValueError, "nothing"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_a_bad_adapter_leaves_the_model_as_it_was(case, first, stock, tokens):
    options, error, match = BAD[case]
    model = load(stock)
    if first:
        refuse(error, match, model, lambda: get_peft_model(model, AttnSwapConfig(**options)), tokens)
        assert spec_of(model) is None
        attnswap.patch(model, "softpick")
        return
    model = get_peft_model(model, AttnSwapConfig(swap="softpick", **LORA)).eval()
    disturb(model)
    refuse(error, match, model, lambda: model.add_adapter("b", AttnSwapConfig(**options)), tokens)
    assert list(model.peft_config) == ["default"]


def test_what_is_refused_on_an_adapted_model(stock, tokens):
    model = adapted(stock, "ssmax", **LORA)
    base = model.get_base_model()
    refuse(ConfigError, "unload", model, lambda: attnswap.patch(base, "softpick"), tokens)
    refuse(ConfigError, "unload", model, lambda: attnswap.unpatch(base), tokens)
    with pytest.raises(ValueError, match="peft"):
        model.add_adapter("lora", LoraConfig(**LORA))
    model.add_adapter("b", AttnSwapConfig(swap="softpick", **LORA))
    refuse(
        UnsupportedModelError,
        "averaged",
        model,
        lambda: model.add_weighted_adapter(["default", "b"], [1, 1], "c"),
        tokens,
    )
    with pytest.raises(ValueError, match="one adapter"):
        model.base_model.set_adapter(["default", "b"])
    with pytest.raises(UnsupportedModelError, match="mix"):
        model(tokens, adapter_names=["default", "b"])


def test_a_patched_base_is_refused(patched, tokens):
    model = patched("llama", "softpick")
    refuse(ConfigError, "unpatch", model, lambda: get_peft_model(model, AttnSwapConfig(swap="ssmax")), tokens)


@pytest.mark.parametrize(
    "load_it",
    [lambda base, path: PeftModel.from_pretrained(base, path), lambda base, path: base.load_adapter(path)],
    ids=["PeftModel", "load_adapter"],
)
def test_the_wrong_base_is_refused(load_it, stock, tokens, tmp_path):
    adapted(stock, "ssmax").save_pretrained(tmp_path)
    other = tiny("llama", seed=1)
    refuse(ConfigError, "other weights", other, lambda: load_it(other, tmp_path), tokens)
    wider = tiny("llama", layers=3)
    refuse(
        ConfigError, "num_hidden_layers is 2; that of this base is 3", wider, lambda: load_it(wider, tmp_path), tokens
    )


def test_the_check_of_the_base_can_be_waived(stock, tokens, tmp_path):
    adapted(stock, "ssmax").save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.fingerprint = None
    model = PeftModel.from_pretrained(tiny("llama", seed=1), tmp_path, config=config)
    assert model.active_adapters == ["default"]


def test_the_base_in_16_bits_is_the_same_base(stock, tmp_path):
    adapted(stock, "ssmax").save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stock, dtype=dtype), tmp_path)


EDITS = {
    "another swap": (lambda c: c["swap"].update(name="softpick", form=None), "asks for|form"),
    "another lambda": (lambda c: c["spec"]["swaps"][0].update(ramp=0.5), "lambda"),
    "a missing layer": (lambda c: c["spec"]["swaps"][0].update(layers=[0, 5]), "layer 5"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_adapter_config(edit, stock, tokens, tmp_path):
    adapted(stock, "ssmax").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    change, match = EDITS[edit]
    change(values)
    file.write_text(json.dumps(values))
    with pytest.raises((attnswap.AttnSwapError, RuntimeError, TypeError), match=match):
        PeftModel.from_pretrained(load(stock), tmp_path)


def test_a_process_without_attnswap_refuses_an_adapter(stock, tmp_path):
    adapted(stock, "ssmax", **LORA).save_pretrained(tmp_path / "adapter")
    code = f"""
import sys; sys.modules['attnswap'] = None
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter = {str(stock)!r}, {str(tmp_path / "adapter")!r}
for load in (
    lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    lambda: AutoModelForCausalLM.from_pretrained(adapter),
):
    try:
        load()
    except Exception as error:
        print(type(error).__name__, error)
    else:
        print("loaded")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("ATTNSWAP" in line for line in lines)


def test_plain_lora_on_a_model_patched_in_memory_says_what_it_leaves_out(stock, tmp_path):
    model = load(stock)
    attnswap.patch(model, "softpick")
    lora = get_peft_model(model, LoraConfig(**LORA))
    with pytest.warns(UserWarning, match="AttnSwapConfig"):
        lora.save_pretrained(tmp_path)


def test_names_that_peft_would_take_for_those_of_tensors(stock, tokens):
    base = load(stock)
    refuse(
        ConfigError,
        "choose another",
        base,
        lambda: get_peft_model(base, AttnSwapConfig(swap="ssmax"), adapter_name="ssmax"),
        tokens,
    )
    model = get_peft_model(base, AttnSwapConfig(swap="ssmax"), adapter_name="a").eval()
    config = AttnSwapConfig(swap="softpick")
    refuse(ConfigError, "choose another", model, lambda: model.add_adapter("scale", config), tokens)
    refuse(ConfigError, "choose another", model, lambda: model.add_adapter("softpick", config), tokens)
    model.add_adapter("forgetting_gate", AttnSwapConfig(swap="softpick"))
    refuse(
        ConfigError,
        "choose another",
        model,
        lambda: model.add_adapter("b", AttnSwapConfig(swap="forgetting-gate")),
        tokens,
    )


def test_deleting_adapters_without_low_rank_weights(stock, tokens):
    model = get_peft_model(load(stock), AttnSwapConfig(swap="ssmax"), adapter_name="a").eval()
    model.add_adapter("b", AttnSwapConfig(swap="softpick"))
    model.add_adapter("c", AttnSwapConfig(swap="sigmoid"))
    with_a = logits(model, tokens)
    model.delete_adapter("c")
    assert model.active_adapters == ["a"]
    assert torch.equal(logits(model, tokens), with_a)
    model.add_adapter("c", AttnSwapConfig(swap="sigmoid"))
    model.set_adapter("b")
    with_b = logits(model, tokens)
    model.set_adapter("a")
    model.delete_adapter("a")
    assert model.active_adapters == [model.active_adapter] == ["b"]
    assert torch.equal(logits(model, tokens), with_b)


def test_low_rank_weights_that_can_be_placed_only_in_part(stock, tokens):
    model = load(stock)
    bad = AttnSwapConfig(swap="ssmax", target_modules=["q_proj", "mlp"])
    refuse(ValueError, "mlp|MLP", model, lambda: get_peft_model(model, bad), tokens)
    assert spec_of(model) is None


def test_a_config_takes_what_patch_takes(stock, tmp_path):
    model = get_peft_model(load(stock), AttnSwapConfig(swap="softpick", heads=range(2), layers=torch.tensor(1), ramp=1))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["heads"] == [0, 1]


def test_a_base_that_was_trained_on_is_another_base(stock, tmp_path):
    adapted(stock, "ssmax").save_pretrained(tmp_path)
    base = load(stock)
    with torch.no_grad():
        for p in base.parameters():
            p.mul_(1 + 0.02 * torch.randn_like(p))
    with pytest.raises(ConfigError, match="other weights"):
        PeftModel.from_pretrained(base, tmp_path)
