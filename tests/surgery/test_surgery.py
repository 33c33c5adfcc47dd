"""Patched models against an independent oracle, away from identity."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import attnswap
from attnswap.surgery.module import child_of
from attnswap.surgery.patched import spec_of
from attnswap.surgery.select import select_layers
from attnswap.surgery.stacks import find_stack
from tests.helpers.oracle import expected, recording
from tests.helpers.patched_models import LENGTH, check_layers, layout, move_away, slots_of, snapshot, window_of
from tests.helpers.tiny_models import ARCHITECTURES, SWAPS, VOCABULARY, tiny, tiny_config


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_layer_equals_the_oracle(kind, swap):
    """Away from identity, in every architecture, the swap is used and computes its formula."""
    model = tiny(kind)
    given, _, _ = layout("left")
    with torch.no_grad():
        before = model(**given).logits
    attnswap.patch(model, swap)
    move_away(model, LENGTH)
    logits, real = check_layers(model, "left")
    assert (logits - before)[real].abs().max() > 1e-2


@pytest.mark.thinned(2)
@pytest.mark.parametrize("ramp", [0.5, 1.0])
@pytest.mark.parametrize(
    ("kind", "name"),
    # transformers' own gpt_oss does not look at position ids when it makes masks, so it cannot be packed.
    [
        (k, n)
        for k in ("llama", "mistral", "gpt_oss")
        for n in ("plain", "interior", "packed")
        if (k, n) != ("gpt_oss", "packed")
    ],
)
@pytest.mark.parametrize("swap", SWAPS)
def test_layouts_and_ramps(kind, swap, name, ramp):
    """Padding inside, packing and windows give the right keys and the right n, along the ramp."""
    model = tiny(kind)
    attnswap.patch(model, swap, ramp=ramp)
    move_away(model, LENGTH)
    check_layers(model, name)


@pytest.mark.parametrize(
    "swap",
    [
        attnswap.SSMax(form="scale"),
        attnswap.SSMax(form="anchored", train_length=4),
        attnswap.Sigmoid(bias="learned", bias_log_n=-0.7),
        attnswap.Sigmoid(bias=-1.0, divide_by_n=True),
        attnswap.Sigmoid(bias=-1.0, divide_by_n="sqrt"),
        attnswap.Sigmoid(bias="predicted", units=8),
        attnswap.Sigmoid(bias="predicted", units=8, keep_lone=True),
        attnswap.Entmax(scale="predicted", units=8),
        attnswap.Softpick(eps=0.3),
        attnswap.Softpick(anchor=4, keep_lone=True),
        attnswap.SoftmaxOne(start=1.0),
        attnswap.ForgettingGate(init="paper"),
    ],
)
@pytest.mark.parametrize(("kind", "ramp"), [("gemma2", 1.0), ("gpt_oss", 1.0), ("llama", 0.25)])
def test_other_forms(swap, kind, ramp):
    """Every option of every swap, in models with soft cap and windows, and with sinks; and along the ramp."""
    model = tiny(kind)
    attnswap.patch(model, swap, ramp=ramp)
    move_away(model, LENGTH)
    check_layers(model, "left")


@pytest.mark.parametrize("name", ["plain", "left", "packed"])
def test_n_at_a_large_coefficient(name):
    """A wrong n is invisible at small coefficients; at 3 it is not."""
    for kind in ("llama", "mistral"):
        model = tiny(kind)
        attnswap.patch(model, "ssmax")
        with torch.no_grad():
            for parameter_name, parameter in attnswap.swap_parameters(model).items():
                parameter.fill_(3.0 if parameter_name.endswith("scale") else -1.0)
        check_layers(model, name, tolerance=2e-5)


def test_a_wrong_n_would_be_noticed(monkeypatch):
    """Negative control: with n off by one the comparison above fails."""
    from attnswap.attention.visibility import Visibility

    right = Visibility.n
    monkeypatch.setattr(Visibility, "n", property(lambda self: right.function(self) + 1))
    model = tiny("llama")
    attnswap.patch(model, "ssmax")
    move_away(model, LENGTH)
    with pytest.raises(AssertionError, match="layer"):
        check_layers(model, "left")


@pytest.mark.thinned(2)
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_padded_and_packed_rows_equal_separate_ones(kind, swap, patched):
    """Padding shifts a sliding window, in the stock model too, so models with one take no padding inside."""
    model = patched(kind, swap)
    names = ["left", "interior", "packed"]
    names = names[::2] if kind in ("mistral", "gemma2") else names[:1] if kind == "gpt_oss" else names
    for name in names:
        given, mask, documents = layout(name)
        with torch.no_grad():
            whole = model(**given).logits
        for b in range(2):
            for d in np.unique(documents[b][mask[b]]):
                places = np.flatnonzero(mask[b] & (documents[b] == d))
                with torch.no_grad():
                    alone = model(input_ids=given["input_ids"][b : b + 1, places]).logits[0]
                assert (whole[b, places] - alone).abs().max() < 2e-5, name


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_no_token_sees_the_future(kind, swap, patched, tokens):
    model = patched(kind, swap)
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % VOCABULARY
    with torch.no_grad():
        a, b = model(tokens).logits, model(changed).logits
    assert torch.equal(a[:, :12], b[:, :12])
    assert (a[:, 12:] - b[:, 12:]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_heads_and_layers_left_alone(kind, tokens):
    """Unselected layers and heads keep what they computed before, sinks and soft cap included."""
    model = tiny(kind)
    heads = [0, 1]
    attnswap.patch(model, {"forgetting-gate": [3], "ssmax": heads}, layers=[1])
    move_away(model, LENGTH)
    stock = tiny(kind)
    with torch.no_grad(), recording(model) as calls:
        model(tokens)
    given, mask, documents = layout("plain")
    with torch.no_grad(), recording(model) as calls:
        model(**given)
    for layer, (_, module) in find_stack(model).modules.items():
        out, _ = expected(calls[layer], slots_of(module), mask, documents, window_of(model, layer))
        assert np.abs(calls[layer].out - out).max() < 1e-5
    # Layer 0 is bitwise the stock layer.
    with torch.no_grad():
        a = model(tokens, output_hidden_states=True).hidden_states[1]
        b = stock(tokens, output_hidden_states=True).hidden_states[1]
    assert torch.equal(a, b)


def test_unselected_head_is_bitwise_stock(tokens):
    model, stock = tiny("llama"), tiny("llama")
    attnswap.patch(model, "softpick", heads=[1, 2])
    attnswap.patch(stock, "softpick", heads=[1, 2], ramp=0.0)
    with torch.no_grad(), recording(model) as ours:
        model(tokens)
    with torch.no_grad(), recording(stock) as theirs:
        stock(tokens)
    assert np.array_equal(ours[0].out[:, :, [0, 3]], theirs[0].out[:, :, [0, 3]])
    assert np.abs(ours[0].out[:, :, [1, 2]] - theirs[0].out[:, :, [1, 2]]).max() > 1e-2


def test_split_head_order_and_several_patches(tokens):
    """Heads in any order, swaps added by several calls, agree with the oracle."""
    model = tiny("llama")
    attnswap.patch(model, "softpick", heads=[3, 0], layers="1:")
    attnswap.patch(model, attnswap.Sigmoid(bias=-1.0), heads=[1])
    attnswap.patch(model, "ssmax", heads=[2])
    move_away(model, LENGTH)
    check_layers(model, "left")
    table = attnswap.describe(model)
    assert table.patched_layers == [0, 1]
    assert table.layers[0].kept == (0, 3)
    assert table.layers[1].kept == ()


def test_value_temperature_on_whole_groups():
    model = tiny("llama")
    attnswap.patch(model, "selective-temperature", heads=[2, 3])
    move_away(model, LENGTH)
    check_layers(model, "left")


@pytest.mark.parametrize("swap", ["ssmax", "selective-temperature", "forgetting-gate"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_identity_start_changes_nothing(kind, swap, tokens):
    model = tiny(kind)
    with torch.no_grad():
        before = model(tokens).logits
        attnswap.patch(model, swap)
        assert (model(tokens).logits - before).abs().max() < 1e-5


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_ramp_zero_is_bitwise_stock(kind, swap, tokens):
    model = tiny(kind)
    with torch.no_grad():
        before = model(tokens).logits
        attnswap.patch(model, swap, ramp=0.0)
        move_away(model, LENGTH)
        assert torch.equal(model(tokens).logits, before)
        attnswap.set_ramp(model, 0.5)
        half = model(tokens).logits
        attnswap.set_ramp(model, 1.0)
        full = model(tokens).logits
    assert (half - before).abs().max() > 1e-3
    assert (full - half).abs().max() > 1e-3


def test_ramp_per_head_and_per_layer():
    model = tiny("llama")
    attnswap.patch(model, "softpick")
    attnswap.set_ramp(model, [0.25, 0.5, 0.75, 1.0], layers=0)
    move_away(model, LENGTH)
    given, mask, documents = layout("left")
    with torch.no_grad(), recording(model) as calls:
        model(**given)
    child = child_of(find_stack(model).modules[0][1])
    slots = [(child.slots["softpick"].swap, (h,), lam, {}) for h, lam in enumerate([0.25, 0.5, 0.75, 1.0])]
    out, _ = expected(calls[0], slots, mask, documents, None)
    assert np.abs(calls[0].out - out)[mask].max() < 1e-5


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_unpatch_is_bit_for_bit(kind, swap, tokens):
    model = tiny(kind)
    with torch.no_grad():
        before = model(tokens).logits
        traces = snapshot(model)
        attnswap.patch(model, swap)
        move_away(model, LENGTH)
        model(tokens)
        attnswap.unpatch(model)
        assert torch.equal(model(tokens).logits, before)
    after = snapshot(model)
    assert after[1:] == traces[1:]
    for name, attributes in traces[0].items():
        assert after[0][name] == attributes, name


def test_many_rounds_leave_no_trace():
    model = tiny("llama")
    traces = snapshot(model)
    for _ in range(20):
        attnswap.patch(model, "forgetting-gate")
        attnswap.unpatch(model)
    assert snapshot(model) == traces


def test_a_second_model_is_untouched(tokens):
    stock, model = tiny("llama"), tiny("llama")
    with torch.no_grad():
        before = stock(tokens).logits
        attnswap.patch(model, "softpick")
        model(tokens)
        assert torch.equal(stock(tokens).logits, before)
    twin = copy.deepcopy(model)
    attnswap.unpatch(model)
    assert spec_of(twin) is not None
    with torch.no_grad():
        assert (twin(tokens).logits - before).abs().max() > 1e-2
        assert torch.equal(model(tokens).logits, before)


def test_models_built_from_one_config_object(tokens):
    """transformers lets models share a config; a patch of one must not reach the other."""
    config = tiny_config("llama")
    first, second = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    with torch.no_grad():
        before = second(tokens).logits
        attnswap.patch(first, "softpick")
        assert torch.equal(second(tokens).logits, before)
    assert "attnswap" not in config.to_dict()
    attnswap.patch(second, "ssmax")
    attnswap.patch(AutoModelForCausalLM.from_config(config), "ssmax")
    assert attnswap.describe(first).layers[0].swaps.keys() == {"softpick"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_swap_tensors_stay_fp32(dtype, patched, tokens):
    model = patched("llama", "forgetting-gate")
    values = {k: v.detach().clone() for k, v in attnswap.swap_parameters(model).items()}
    model.to(dtype)
    model.half()
    model.to(dtype)
    for name, parameter in attnswap.swap_parameters(model).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, values[name])
    assert model(tokens).logits.dtype == dtype


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_output_attentions(kind, swap, patched, tokens):
    """The weights returned are the swap's, and asking for them does not change the logits."""
    model = patched(kind, swap)
    _, mask, documents = layout("plain")
    with torch.no_grad():
        plain = model(tokens).logits
        with recording(model) as calls:
            asked = model(tokens, output_attentions=True)
    assert (asked.logits - plain).abs().max() < 1e-4
    for layer, (_, module) in find_stack(model).modules.items():
        _, weights = expected(calls[layer], slots_of(module), mask, documents, window_of(model, layer))
        assert np.abs(asked.attentions[layer].double().numpy() - weights).max() < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_output_attentions_of_partly_patched_models(kind, patched, tokens):
    """One entry per layer, also where the previous implementation (sdpa in llama) returns no weights of its own."""
    model = patched(kind, "ssmax", layers=[1])
    _, mask, documents = layout("plain")
    with torch.no_grad(), recording(model) as calls:
        found = model(tokens, output_attentions=True).attentions
    assert len(found) == 2
    for layer, (_, module) in find_stack(model).modules.items():
        _, weights = expected(calls[layer], slots_of(module), mask, documents, window_of(model, layer))
        ours = found[layer].double().numpy()[..., : weights.shape[-1]]
        assert np.abs(ours - weights).max() < 1e-5


@pytest.mark.parametrize("swap", SWAPS)
def test_gradients_reach_every_swap_parameter(swap, patched, tokens):
    model = patched("llama", swap)
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in attnswap.swap_parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("swap", SWAPS)
def test_gradient_checkpointing(swap, reentrant, patched, tokens):
    plain, saving = patched("llama", swap), patched("llama", swap)
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, saving):
        model.train()
        model(tokens, labels=tokens).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


@pytest.mark.thinned(2)
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_cached_decoding_equals_the_full_forward(kind, swap, patched, tokens):
    model = patched(kind, swap)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    with torch.no_grad():
        cache, steps = None, []
        for stop in (9, 12, *range(13, LENGTH + 1)):
            start = 0 if cache is None else cache.get_seq_length()
            out = model(
                tokens[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            steps.append(out.logits)
        full = model(tokens, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    worst = (torch.cat(steps, 1) - full)[mask.bool()].abs().max()
    assert worst < 1e-4


@pytest.mark.thinned(2)
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_generation_with_a_static_cache(kind, swap, patched, tokens):
    """Masks are then made ahead of the forward, over keys that are not written yet."""
    model, mask = patched(kind, swap), torch.ones_like(tokens)
    mask[1, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    static = model.generate(tokens, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, model.generate(tokens, use_cache=False, **options))


@pytest.mark.parametrize("swap", SWAPS)
def test_beam_search_reorders_gates(swap, patched, tokens):
    model = patched("llama", swap)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    with torch.no_grad():
        cached = model.generate(tokens, **options)
        recomputed = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(cached, recomputed)


def test_autocast(patched, tokens):
    """Under bf16 autocast gates stay fp32 and the result stays near the fp32 one."""
    for swap in SWAPS:
        model = patched("llama", swap)
        with torch.no_grad():
            exact = model(tokens).logits
            with torch.autocast("cpu", torch.bfloat16):
                rough = model(tokens).logits
        assert (rough.float() - exact).abs().max() < 0.1 * exact.std() + 0.5


def test_parameter_groups(patched):
    model = patched("llama", "ssmax")
    groups = {g["name"]: g for g in attnswap.parameter_groups(model, lr=1e-3, weight_decay=0.1)}
    assert groups["swap"]["lr"] == pytest.approx(1e-2)
    assert groups["swap"]["weight_decay"] == 0.0
    assert groups["matrices"]["weight_decay"] == 0.1
    listed = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())


def test_slices_count_layers_not_attention_layers():
    """In a hybrid model "1:" is every attention layer from index 1 on."""
    assert select_layers("1:", [2, 5]) == [2, 5]
    assert select_layers("3:", [2, 5]) == [5]
    assert select_layers("-1:", [2, 5]) == [5]
    assert select_layers("::5", [2, 5]) == [5]


def test_inner_models_built_from_one_config_object(tokens):
    """A bare inner model is patched alone too."""
    config = tiny_config("llama")
    first, second = (AutoModel.from_config(config).eval() for _ in range(2))
    with torch.no_grad():
        before = second(tokens).last_hidden_state
        attnswap.patch(first, "softpick")
        assert torch.equal(second(tokens).last_hidden_state, before)
    assert spec_of(AutoModelForCausalLM.from_config(config)) is None
