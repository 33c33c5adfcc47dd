"""Encoders, encoder-decoders, towers of multimodal models, and models that compute attention themselves."""

import copy
import json
import sys

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    DonutSwinConfig,
    DonutSwinModel,
    FalconConfig,
    FalconForCausalLM,
    LEDConfig,
    LEDForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RoFormerConfig,
    RoFormerModel,
    SwinConfig,
    SwinModel,
    Swinv2Config,
    Swinv2Model,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import attnswap
from attnswap.coverage import tiny_model
from attnswap.coverage.columns import move_away, oracle
from attnswap.errors import AttnSwapError, CheckpointError, ConfigError, UnsupportedModelError
from attnswap.surgery.inputs import tiny_inputs
from attnswap.surgery.patched import stacks_of
from attnswap.training.ramp import load_ramps, save_ramps

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {**SMALL, "image_size": 16, "patch_size": 4}
PAIR = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
}


def build(kind):
    torch.manual_seed(0)
    if kind == "bert":
        model = BertForMaskedLM(BertConfig(**SMALL, **TOKENS))
    elif kind == "modernbert":
        model = ModernBertForMaskedLM(ModernBertConfig(**SMALL, **TOKENS, local_attention=4))
    elif kind == "vit":
        model = ViTModel(ViTConfig(**VISION))
    elif kind == "clip":
        text = {**SMALL, **TOKENS, "max_position_embeddings": 32}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
    elif kind == "bart":
        model = BartForConditionalGeneration(BartConfig(**PAIR, **TOKENS, max_position_embeddings=32))
    elif kind == "t5":
        config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **TOKENS)
        model = T5ForConditionalGeneration(config)
    elif kind == "whisper":
        sizes = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 32}
        model = WhisperForConditionalGeneration(WhisperConfig(**PAIR, **TOKENS, **sizes))
    else:
        text = LlamaConfig(**SMALL, **TOKENS, num_key_value_heads=2)
        config = LlavaConfig(text_config=text, vision_config={"model_type": "clip_vision_model", **VISION})
        model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.25)
    return model.eval()


@torch.no_grad()
def run(model):
    given = tiny_inputs(model)
    out, mask = model(**given)[0], given.get("decoder_attention_mask", given.get("attention_mask"))
    return out[mask.bool()] if mask is not None and out.shape[:2] == mask.shape else out


PARTS = [
    ("bert", None, 2),
    ("modernbert", None, 2),
    ("vit", None, 2),
    ("clip", None, 2),
    ("clip", "vision_model", 2),
    ("bart", None, 2),
    ("bart", "encoder", 2),
    ("bart", "cross", 2),
    ("t5", None, 2),
    ("t5", "encoder", 2),
    ("t5", "cross", 2),
    ("whisper", None, 2),
    ("whisper", "encoder", 2),
    ("whisper", "cross", 2),
    ("llava", None, 2),
]


@pytest.mark.parametrize(("kind", "part", "layers"), PARTS)
def test_every_part_is_served_exactly(kind, part, layers, tmp_path):
    model = build(kind)
    stock, untouched = run(model), copy.deepcopy(model)
    assert len(attnswap.patch(model, "ssmax", part=part).patched_layers) == layers
    assert torch.allclose(run(model), stock, atol=1e-5)
    attnswap.unpatch(model)
    assert torch.equal(run(model), stock)
    for swap in ("softpick", "ssmax"):
        attnswap.patch(model, swap, part=part)
        move_away(model)
        moved = run(model)
        assert float((moved - stock).abs().max()) > 1e-3
        assert oracle(model, lambda: run(model)) < 1e-4
        model.save_pretrained(tmp_path / swap)
        again = type(model).from_pretrained(tmp_path / swap)
        assert torch.equal(run(again), moved)
        assert stacks_of(again)[0].modules.keys() == stacks_of(model)[0].modules.keys()
        attnswap.unpatch(model)
    assert torch.equal(run(model), stock) and torch.equal(run(untouched), stock)


@pytest.mark.parametrize(("kind", "part"), [("bert", None), ("vit", None), ("bart", "encoder"), ("t5", "encoder")])
def test_gates_over_time_are_refused_where_there_is_none(kind, part):
    model = build(kind)
    stock = run(model)
    with pytest.raises(UnsupportedModelError, match="later keys"):
        attnswap.patch(model, "forgetting-gate", part=part)
    assert torch.equal(run(model), stock)


@pytest.mark.parametrize("kind", ["bart", "t5", "whisper"])
def test_values_of_keys_are_refused_in_cross_attention(kind):
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        attnswap.patch(build(kind), "selective-temperature", part="cross")


@pytest.mark.parametrize("kind", ["bart", "t5", "whisper"])
@pytest.mark.parametrize("swap", ["forgetting-gate", "selective-temperature", "ssmax"])
@torch.no_grad()
def test_generation_of_encoder_decoders(kind, swap):
    model = build(kind)
    attnswap.patch(model, swap)
    move_away(model)
    given = tiny_inputs(model)
    given = {k: v for k, v in given.items() if k in ("input_ids", "attention_mask", "input_features")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 2}
    made = model.generate(**given, **options)
    assert torch.equal(made, model.generate(**given, **options, use_cache=False))


def test_parts_are_named_where_there_are_several():
    model = build("bart")
    with pytest.raises(ConfigError, match=r'"model.encoder.layers.\*.self_attn"'):
        attnswap.patch(model, "ssmax", part="layers")
    with pytest.raises(ConfigError, match="no attention"):
        attnswap.patch(model, "ssmax", part="tower")
    attnswap.patch(model, "ssmax", part="encoder")
    with pytest.raises(ConfigError, match="already has the swap"):
        attnswap.patch(model, "softpick")
    attnswap.patch(model, "ssmax", part="cross", layers=[1])
    with pytest.raises(ConfigError, match=r'several parts.*encoder_attn"'):
        attnswap.patch(model, "softpick")
    attnswap.patch(model, "softpick", part="encoder_attn", layers=[0])  # other words for the same modules
    assert [row.swaps.keys() for row in attnswap.describe(model).layers[2:]] == [{"softpick"}, {"ssmax"}]


SEVERAL = [
    ("bart", ["encoder", "decoder", "cross"]),
    ("bart", [None, "cross"]),
    ("t5", ["cross", "encoder"]),
    ("t5", [None, "cross", "encoder"]),
    ("whisper", ["encoder", "cross"]),
    ("clip", ["text_model", "vision_model"]),
]


def swap_for(part):
    """Returns another swap for each part of a model."""
    return {None: "ssmax", "cross": "softpick", "decoder": {"softpick": [0], "ssmax": [1]}}.get(part, "softmax-1")


@pytest.mark.parametrize(("kind", "parts"), SEVERAL, ids=lambda x: x if isinstance(x, str) else "+".join(map(str, x)))
def test_several_parts_are_patched_side_by_side(kind, parts, tmp_path):
    model = build(kind)
    stock, outputs = run(model), []
    for part in parts:
        attnswap.patch(model, swap_for(part), part=part)
        move_away(model)
        outputs.append(run(model))
        assert all(float((outputs[-1] - other).abs().max()) > 1e-4 for other in [stock, *outputs[:-1]])
        assert oracle(model, lambda: run(model)) < 1e-4
    whole = attnswap.describe(model)
    assert len(whole.layers) == 2 * len(parts) and all(row.swaps for row in whole.layers)
    assert len({row.stack for row in whole.layers}) == len(parts)
    assert all(row.stack in str(whole) for row in whole.layers)

    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(again), outputs[-1]) and str(attnswap.describe(again)) == str(whole)
    again.save_pretrained(tmp_path / "again")
    checked = attnswap.from_pretrained(tmp_path / "again", auto_class=type(model))
    assert torch.equal(run(checked), outputs[-1])
    assert torch.equal(run(copy.deepcopy(again)), outputs[-1])

    with attnswap.bypassed(again):
        assert torch.equal(run(again), stock)
    attnswap.set_ramp(again, 0.0)
    assert torch.equal(run(again), stock)
    attnswap.unpatch(model)
    assert torch.equal(run(model), stock) and not attnswap.describe(model).patched_layers
    assert not hasattr(model.config, "attnswap") and model.config._attn_implementation != "attnswap"


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_lambda_of_one_of_several_parts(kind, tmp_path):
    model = build(kind)
    attnswap.patch(model, "softpick", part="encoder")
    only = run(model)
    attnswap.patch(model, "softpick", part="cross")
    both = run(model)
    with pytest.raises(ConfigError, match=r'choose part= from "model.encoder|choose part= from "encoder'):
        attnswap.set_ramp(model, {0: 0.5})
    with pytest.raises(ConfigError, match="'decoder' is not patched"):
        attnswap.set_ramp(model, 0.5, part="decoder")
    assert torch.equal(run(model), both)
    attnswap.set_ramp(model, 0.0, part="cross")
    assert torch.equal(run(model), only)
    attnswap.set_ramp(model, {0: 1.0, 1: 0.5}, part="cross")
    model.save_pretrained(tmp_path)
    assert [row.swaps["softpick"].ramp for row in attnswap.describe(model).layers] == [1.0, 1.0, 1.0, 0.5]
    mixed = run(model)
    assert torch.equal(run(type(model).from_pretrained(tmp_path)), mixed)
    (tmp_path / "sharded").mkdir()
    save_ramps(model, tmp_path / "sharded")
    for checkpoint in (tmp_path, tmp_path / "sharded"):  # by config.json, and by the file beside sharded weights
        attnswap.set_ramp(model, 0.25)
        assert not torch.equal(run(model), mixed)
        load_ramps(model, checkpoint)
        assert torch.equal(run(model), mixed)
    attnswap.unpatch(model)
    attnswap.patch(model, "softpick", part="encoder", ramp=0.5)
    with pytest.raises(CheckpointError, match="same swap"):
        load_ramps(model, tmp_path)
    assert attnswap.describe(model).layers[0].swaps["softpick"].ramp == 0.5


@pytest.mark.parametrize("kind", ["bart", "t5", "whisper"])
@torch.no_grad()
def test_generation_with_several_parts(kind):
    model = build(kind)
    own = "decoder.block.*.layer.*.SelfAttention" if kind == "t5" else "decoder.layers.*.self_attn"
    for part, swap in {"encoder": "softpick", "cross": "softmax-1", own: "selective-temperature"}.items():
        attnswap.patch(model, swap, part=part)
        move_away(model)
    given = {k: v for k, v in tiny_inputs(model).items() if k in ("input_ids", "attention_mask", "input_features")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 2}
    made = model.generate(**given, **options)
    assert torch.equal(made, model.generate(**given, **options, use_cache=False))


def entries(model):
    """The configs of a model's modules that name swaps, or attnswap as their attention implementation."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [c for c in configs.values() if hasattr(c, "attnswap") or c._attn_implementation == "attnswap"]


@pytest.mark.parametrize(
    ("kind", "parts"),
    [("t5", ["encoder", "decoder"]), ("t5", [None, "encoder", "cross"]), ("t5", ["cross"]), ("bart", [None, "cross"])],
    ids=lambda x: x if isinstance(x, str) else "+".join(map(str, x)),
)
def test_a_reloaded_model_is_unpatched_whole(kind, parts, tmp_path):
    """Each half of a T5 has a copy of the config, which names every part while the model is being built."""
    model = build(kind)
    stock = run(model)
    for part in parts:
        swap = {"name": "sigmoid", "bias": -1.0} if part == "decoder" else "softpick"
        names = "decoder.block.*.layer.*.SelfAttention" if part == "decoder" else part
        attnswap.patch(model, swap, part=names)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    attnswap.set_ramp(again, 0.5)
    ramps = {s["ramp"] for c in entries(again) for part in c.attnswap.get("parts", [c.attnswap]) for s in part["swaps"]}
    assert ramps == {0.5}
    attnswap.unpatch(again)
    assert torch.equal(run(again), stock) and not entries(again) and not attnswap.describe(again).patched_layers
    attnswap.patch(again, "softpick", part="encoder")
    assert attnswap.describe(again).patched_layers == [0, 1]


def test_a_half_that_was_patched_alone():
    """The encoder of a T5 has a config of its own, whose entry would mean the decoder in the config of the whole."""
    model = build("t5")
    stock = run(model)
    attnswap.patch(model.encoder, "softpick")
    moved = run(model)
    with pytest.raises(ConfigError, match="model of its own"):
        attnswap.patch(model, "ssmax", part="decoder.block.*.layer.*.SelfAttention")
    with pytest.raises(ConfigError, match="model of its own"):
        attnswap.set_ramp(model, 0.5)
    assert torch.equal(run(model), moved) and attnswap.describe(model).patched_layers == [0, 1]
    with attnswap.bypassed(model):
        assert torch.equal(run(model), stock)
    attnswap.unpatch(model)
    assert torch.equal(run(model), stock) and not entries(model)


def test_halves_that_share_a_config_are_changed_together():
    model = build("bart")
    with pytest.raises(ConfigError, match="has the same config"):
        attnswap.patch(model.model.encoder, "softpick")
    attnswap.patch(model, "softpick")
    moved = run(model)
    with pytest.raises(ConfigError, match="has the same config"):
        attnswap.unpatch(model.model.decoder)
    assert torch.equal(run(model), moved)


def test_towers_that_are_patched_as_models_of_their_own(tmp_path):
    model = build("clip")
    for tower, ramp in ((model.vision_model, 0.75), (model.text_model, 0.25)):
        attnswap.patch(tower, "softpick", ramp=ramp)
    moved = run(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "sharded").mkdir()
    save_ramps(model, tmp_path / "sharded")
    for checkpoint in (tmp_path, tmp_path / "sharded"):
        attnswap.set_ramp(model, 0.5)
        load_ramps(model, checkpoint)
        assert torch.equal(run(model), moved)
    attnswap.unpatch(model.vision_model)
    assert entries(model) == [model.text_model.config]
    del model.text_model.config.attnswap
    with pytest.raises(CheckpointError, match="lost its attnswap entry"):
        model.state_dict()


def test_a_half_of_a_checkpoint_says_what_it_lacks(tmp_path):
    model = build("t5")
    for part in ("encoder", "cross"):
        attnswap.patch(model, "ssmax", part=part)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r'T5EncoderModel alone has no place for.*part="cross"'):
        T5EncoderModel.from_pretrained(tmp_path)


def test_parts_that_overlap_are_refused(tmp_path):
    model = build("bart")
    attnswap.patch(model, "softpick", part="encoder", layers=[0])
    attnswap.patch(model, "softpick", part="cross")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    other = copy.deepcopy(config["attnswap"]["parts"][0])
    other["part"], other["swaps"][0]["layers"] = "encoder.layers", [1]
    config["attnswap"]["parts"].append(other)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="twice"):
        BartForConditionalGeneration.from_pretrained(tmp_path)


def test_a_failed_second_part_leaves_the_first():
    model = build("t5")
    attnswap.patch(model, "softpick", part="encoder")
    moved, entry = run(model), copy.deepcopy(model.config.attnswap)
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        attnswap.patch(model, "selective-temperature", part="cross")
    with pytest.raises(ConfigError, match="already has the swap"):
        attnswap.patch(model, "ssmax", part="encoder.block.*.layer.*.SelfAttention")
    assert torch.equal(run(model), moved) and model.config.attnswap == entry


@pytest.mark.parametrize("damage", [{"parts": []}, {"parts": 3}, {"parts": [{}]}, "twice", "gone"])
def test_a_damaged_entry_of_several_parts_is_refused(damage, tmp_path):
    model = build("bart")
    for part in ("encoder", "cross"):
        attnswap.patch(model, "softpick", part=part)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    entry = config["attnswap"]
    if damage == "twice":
        entry["parts"].append(entry["parts"][0])
    elif damage == "gone":
        entry["parts"][0]["part"] = "tower"
    else:
        entry.update(damage)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError if damage != "gone" else AttnSwapError):
        BartForConditionalGeneration.from_pretrained(tmp_path)


def test_an_interrupted_forward_leaves_softmax_as_it_was(tokens):
    model = tiny_model("bloom")
    attnswap.patch(model, "softpick")
    inside = model.transformer.h[0].self_attention.query_key_value

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = inside.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens)
    hook.remove()
    scores = torch.randn(2, 4, 3, 3)
    assert torch.allclose(torch.softmax(scores, -1).sum(-1), torch.ones(2, 4, 3))
    model(tokens)


def test_a_decoder_whose_modules_hold_no_config(tmp_path):
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "attention_window": 4, "vocab_size": 99}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    lengths = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
    model = LEDForConditionalGeneration(LEDConfig(**sizes, **heads, **lengths)).eval()
    attnswap.patch(model, "softpick")
    model.save_pretrained(tmp_path)
    again = LEDForConditionalGeneration.from_pretrained(tmp_path)
    names = [[name for name, _ in stacks_of(one)[0].modules.values()] for one in (again, model)]
    assert names[0] == names[1]
    assert torch.equal(run(again), run(model))


def test_gates_over_time_are_refused_in_encoders_that_compute_attention_themselves():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(UnsupportedModelError, match="later keys"):
        attnswap.patch(RoFormerModel(RoFormerConfig(vocab_size=99, **sizes)).eval(), "forgetting-gate")


@pytest.mark.parametrize(
    ("config", "model"), [(SwinConfig, SwinModel), (Swinv2Config, Swinv2Model), (DonutSwinConfig, DonutSwinModel)]
)
def test_masks_that_hide_keys_only_nearly_are_refused(config, model):
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4}
    model = model(config(**sizes)).eval()
    with pytest.raises(UnsupportedModelError, match="-100"):
        attnswap.patch(model, "softpick")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_keys_that_a_model_repeats_for_its_heads(implementation, tokens):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "vocab_size": 99}
    torch.manual_seed(0)
    model = FalconForCausalLM(FalconConfig(**sizes, new_decoder_architecture=True)).eval()
    model.set_attn_implementation(implementation)
    attnswap.patch(model, "selective-temperature", heads=[2, 3])
    move_away(model)
    with torch.no_grad():
        out = model(tokens, use_cache=False).logits
        model.config._attn_implementation_internal = "eager"
        assert torch.allclose(out, model(tokens, use_cache=False).logits, atol=1e-5)


def test_a_failed_second_patch_leaves_the_halves_of_t5_as_they_were(monkeypatch):
    model = build("t5")
    attnswap.patch(model, "ssmax", heads=[0, 1], part="encoder")
    before = copy.deepcopy(model.encoder.config.attnswap)

    def fail(*_):
        raise UnsupportedModelError("no")

    monkeypatch.setattr(sys.modules["attnswap.surgery.patch"], "verify", fail)
    with pytest.raises(UnsupportedModelError, match="no"):
        attnswap.patch(model, "softpick", heads=[2, 3])
    assert model.encoder.config.attnswap == model.config.attnswap == before


def test_layers_tied_by_name_have_swaps_of_their_own(tmp_path):
    """Zamba uses one attention block in several layers, whose weights transformers ties by a pattern of names."""
    model = tiny_model("zamba").eval()
    patterns = [
        dict(m._tied_weights_keys) for m in model.modules() if isinstance(getattr(m, "_tied_weights_keys", None), dict)
    ]
    attnswap.patch(model, "ssmax")
    move_away(model)
    model.tie_weights()
    scales = [p for name, p in attnswap.swap_parameters(model).items() if name.endswith("scale")]
    assert len(scales) > 1 and not torch.equal(scales[0], scales[1])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(again), run(model))
    attnswap.unpatch(model)
    now = [
        dict(m._tied_weights_keys) for m in model.modules() if isinstance(getattr(m, "_tied_weights_keys", None), dict)
    ]
    assert now == patterns
