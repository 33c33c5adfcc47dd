"""Layers whose heads differ: what each pass computes, what stays bit for bit, and folds on the model's own kernel."""

import copy
import functools
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import AttentionInterface

import attnswap
from attnswap.attention import folded
from attnswap.errors import UnsupportedModelError
from attnswap.surgery import combine
from attnswap.surgery.previous import Previous
from attnswap.surgery.stacks import find_stack
from tests.helpers.oracle import recording
from tests.helpers.patched_models import LENGTH, check_layers, layout, move_away
from tests.helpers.tiny_models import tiny_config

ODD = [4, 0, 7, 5]
"""Of eight heads that share four key/value heads two by two: every pair but the last is parted, in no order."""
REST = [1, 2, 3, 6]
KINDS = ["llama", "mistral", "gemma2", "gpt_oss", "gpt2"]


def eight_heads(kind="llama", seed=0):
    """A random model of an architecture with eight heads, two to a key/value head."""
    torch.manual_seed(seed)
    config = tiny_config(kind)
    if kind == "gpt2":
        config.n_head = 8
    else:
        config.num_attention_heads, config.num_key_value_heads = 8, 4
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "sinks" in name:
            parameter.data.normal_(0, 1 if "sinks" in name else 0.25)
    return model


def implementation_of(model):
    """Where the function of a patched model's previous implementation is kept, and under which name."""
    name = attnswap.surgery.patched.spec_of(model).before
    module = find_stack(model).modules[0][1]
    eager = vars(sys.modules[type(module).__module__])
    return (eager, "eager_attention_forward") if name == "eager" else (AttentionInterface._global_mapping, name)


@pytest.fixture
def counted(monkeypatch):
    """Makes a patched model write down how many heads each pass computes: of its previous function, and of swaps."""

    def count(model):
        passes = {"before": [], "swaps": []}
        place, name = implementation_of(model)
        original, compute = place[name], combine.compute

        @functools.wraps(original)
        def previous(module, query, *args, **kwargs):
            passes["before"].append(query.shape[1])
            return original(module, query, *args, **kwargs)

        def swapped(problem, *args, **kwargs):
            passes["swaps"].append(problem.query.shape[1])
            return compute(problem, *args, **kwargs)

        monkeypatch.setitem(place, name, previous)
        monkeypatch.setattr(combine, "compute", swapped)
        return passes

    return count


# --- each head once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_head_is_computed_twice(kind, name, counted):
    """Windows, soft caps and sinks: the layers equal the oracle, and no pass takes a head that another one takes."""
    model = eight_heads(kind)
    attnswap.patch(model, {"softpick": ODD[:3], "ssmax": ODD[3:]})
    move_away(model, LENGTH)
    passes = counted(model)
    check_layers(model, name)
    assert passes == {"before": [4, 4], "swaps": [3, 1, 3, 1]}


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_are_all_swapped_need_nothing_from_before(kind, counted):
    model = eight_heads(kind)
    attnswap.patch(model, {"softpick": ODD, "ssmax": REST})
    move_away(model, LENGTH)
    passes = counted(model)
    check_layers(model, "left")
    assert passes == {"before": [], "swaps": [4, 4, 4, 4]}


def test_along_a_ramp_only_blending_heads_are_computed_twice(counted):
    """The sigmoid blends two outputs; softpick's ramp is in its maths; three heads are left alone."""
    model = eight_heads()
    attnswap.patch(model, attnswap.Sigmoid(bias=-1.0), heads=[6, 1], ramp=0.5)
    attnswap.patch(model, "softpick", heads=[7, 2, 0], ramp=0.25)
    move_away(model, LENGTH)
    passes = counted(model)
    check_layers(model, "left")
    assert passes == {"before": [5, 5], "swaps": [2, 3, 2, 3]}
    attnswap.set_ramp(model, 0.0)
    passes["before"].clear(), passes["swaps"].clear()
    with torch.no_grad():
        model(**layout("left")[0])
    assert passes == {"before": [8, 8], "swaps": []}


# --- what stays -------------------------------------------------------------------------------------------------------


def first_layer(model, given):
    with torch.no_grad(), recording(model) as calls:
        model(**given)
    return calls[0].out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_heads_stay_bit_for_bit(kind, dtype):
    """Prefill and single queries, padded and not: what a head computed among all it computes among a few."""
    model = eight_heads(kind).to(dtype)
    stock = copy.deepcopy(model)
    attnswap.patch(model, "softpick", heads=ODD)
    attnswap.patch(stock, "softpick", heads=ODD, ramp=0.0)
    for name in ("plain", "left"):
        given, _, _ = layout(name)
        ours, theirs = first_layer(model, given), first_layer(stock, given)
        assert np.array_equal(ours[:, :, REST], theirs[:, :, REST])
        assert not np.array_equal(ours[:, :, ODD], theirs[:, :, ODD])
        step = {k: v[:, -1:] for k, v in given.items() if k != "attention_mask"}
        step |= {k: v for k, v in given.items() if k == "attention_mask"}
        outs = []
        for one in (model, stock):
            with torch.no_grad():
                cache = one(**{k: v[:, :-1] for k, v in given.items()}, use_cache=True).past_key_values
            outs.append(first_layer(one, {**step, "past_key_values": cache}))
        assert np.array_equal(outs[0][:, :, REST], outs[1][:, :, REST])


@pytest.mark.parametrize("additive", [False, True])
def test_masks_of_users_go_with_the_heads_that_keep_what_they_had(additive, tokens, counted):
    model, stock = eight_heads(), eight_heads()
    attnswap.patch(model, "softpick", heads=ODD)
    attnswap.patch(stock, "softpick", heads=ODD, ramp=0.0)
    generator = torch.Generator().manual_seed(3)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = causal & ((torch.rand(2, 8, LENGTH, LENGTH, generator=generator) > 0.5) | torch.eye(LENGTH).bool())
    if additive:
        mask = torch.randn(mask.shape, generator=generator).masked_fill(~mask, -torch.inf)
    passes = counted(model)
    given = {"input_ids": tokens, "attention_mask": mask}
    ours = first_layer(model, given)
    assert passes["before"] == [4, 4]
    assert np.array_equal(ours[:, :, REST], first_layer(stock, given)[:, :, REST])
    other = first_layer(model, {**given, "attention_mask": mask.roll(1, 1)})
    assert all(np.abs(ours[:, :, h] - other[:, :, h]).max() > 1e-3 for h in range(8)), "every head has its own mask"


def test_an_eager_function_that_reads_more_of_its_module_computes_all_heads(counted, monkeypatch):
    """Only what is known to be the same for every head may be read of the module; the sinks are cut to the heads."""
    model = eight_heads("gpt_oss")
    place, name = eager = (
        vars(sys.modules[type(find_stack(model).modules[0][1]).__module__]),
        "eager_attention_forward",
    )
    original = place[name]

    @functools.wraps(original)
    def reads_more(module, query, key, value, mask, **kwargs):
        assert hasattr(module, "head_dim")
        gain = torch.linspace(1, 1, module.k_proj.out_features // module.head_dim * 2)  # as many as there are heads
        return original(module, query * gain[:, None, None], key, value, mask, **kwargs)

    monkeypatch.setitem(*eager, reads_more)
    attnswap.patch(model, "softpick", heads=ODD)
    move_away(model, LENGTH)
    passes = counted(model)
    check_layers(model, "left")
    assert passes["before"] == [4, 8, 4, 8], "tried with a few, then called with all"


def test_a_function_that_a_user_registered_computes_all_heads(counted):
    from transformers import AttentionMaskInterface

    mapping, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    mapping["my_own"], masks["my_own"] = mapping["sdpa"], masks["sdpa"]
    try:
        model = eight_heads()
        model.set_attn_implementation("my_own")
        attnswap.patch(model, "softpick", heads=ODD)
        passes = counted(model)
        check_layers(model, "left")
        assert passes["before"] == [8, 8]
    finally:
        mapping.pop("my_own"), masks.pop("my_own")


# --- gradients, caches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_gradients_of_a_mix_are_those_of_the_reference(kind, tokens, monkeypatch):
    """All of the model's gradients: with kernels that read keys as they lie and a previous function on some heads, and
    with the dense reference and a previous function on all heads."""
    model = eight_heads(kind)
    attnswap.patch(model, {"softpick": [4, 0], "forgetting-gate": [7, 5], "selective-temperature": [2, 3]})
    move_away(model, LENGTH)
    reference = copy.deepcopy(model)
    model(tokens, labels=tokens).loss.backward()
    monkeypatch.setattr(combine, "compute", functools.partial(combine.compute, backend="dense"))
    monkeypatch.setattr(Previous, "some_heads", lambda self, heads: self.all_heads()[0].transpose(1, 2)[:, list(heads)])
    reference(tokens, labels=tokens).loss.backward()
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        if theirs.grad is None:
            assert mine.grad is None, name
            continue
        scale = float(theirs.grad.abs().max())
        assert (mine.grad - theirs.grad).abs().max() <= 1e-4 * scale + 1e-6, name


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_oss"])
def test_cached_decoding_of_a_mix(kind, tokens):
    model = eight_heads(kind)
    attnswap.patch(model, {"softpick": [4, 0], "forgetting-gate": [7, 5], "selective-temperature": [2, 3]})
    move_away(model, LENGTH)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        cache, steps = None, []
        for start, stop in [(0, 9), (9, 12), *((i, i + 1) for i in range(12, LENGTH))]:
            given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            out = model(tokens[:, start:stop], past_key_values=cache, use_cache=True, **given)
            cache = out.past_key_values
            steps.append(out.logits)
        full = model(tokens, attention_mask=mask, position_ids=positions).logits
    assert (torch.cat(steps, 1) - full)[mask.bool()].abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_weights_of_a_mix(kind):
    """Weights asked for are each head's own, and do not change the output."""
    model = eight_heads(kind)
    attnswap.patch(model, {"softpick": ODD})
    given, mask, _ = layout("left")
    with torch.no_grad():
        asked, plain = model(**given, output_attentions=True), model(**given)
    assert (asked.logits - plain.logits)[torch.tensor(mask)].abs().max() < 1e-4
    sums = asked.attentions[0].sum(-1)[0]
    assert asked.attentions[0].shape == (2, 8, LENGTH, LENGTH)
    if kind == "llama":
        assert torch.allclose(sums[REST], torch.ones(4, LENGTH), atol=1e-5)
        assert (sums[ODD] < 0.99).any()


# --- the model's own kernel -------------------------------------------------------------------------------------------


class Flash:
    """Softmax as transformers' flash function computes it, from the arguments that one receives.

    It sees causality from the end of the keys, a 2-D padding mask, a window, sinks and a soft cap; packed rows not.
    """

    def __init__(self):
        self.calls = []

    def __call__(
        self,
        module,
        query,
        key,
        value,
        mask,
        dropout=0.0,
        scaling=None,
        sliding_window=None,
        softcap=None,
        is_causal=None,
        s_aux=None,
        **kwargs,
    ):
        assert module.config._attn_implementation == "flash_attention_2"
        assert next(m for m in module.modules() if isinstance(m, torch.nn.Linear)).weight.dtype == query.dtype
        assert mask is None or (mask.ndim == 2 and mask.shape[0] == query.shape[0])
        self.calls.append((query.shape[1], key.shape[1], query.detach().clone()))
        keys = key.shape[2] if mask is None else mask.shape[1]
        groups = query.shape[1] // key.shape[1]
        key, value = (x[:, :, :keys].repeat_interleave(groups, 1).double() for x in (key, value))
        s = query.double() @ key.transpose(2, 3) * scaling
        s = s if softcap is None else torch.tanh(s / softcap) * softcap
        i, j = torch.arange(query.shape[2])[:, None] + keys - query.shape[2], torch.arange(keys)
        seen = j <= i if (module.is_causal if is_causal is None else is_causal) else torch.ones_like(j <= i)
        seen = seen if sliding_window is None else seen & (j > i - sliding_window)
        seen = seen[None, None] if mask is None else seen & mask[:, None, None].bool()
        s = s.masked_fill(~seen, -torch.inf)
        sinks = -torch.inf if s_aux is None else s_aux.double()[:, None, None]
        total = torch.logaddexp(s.logsumexp(-1, keepdim=True), torch.as_tensor(sinks))
        out = torch.where(seen.any(-1, keepdim=True), (s - total).exp() @ value, 0.0)
        return out.transpose(1, 2).to(query.dtype), None


@pytest.fixture
def flash(monkeypatch):
    """Puts the function above in the place of flash attention's."""
    function = Flash()
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", function)
    return function


def on_flash(kind="llama"):
    model = eight_heads(kind)
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


@pytest.mark.parametrize("name", ["plain", "left"])
@pytest.mark.parametrize("swap", ["ssmax", "selective-temperature"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_oss"])
def test_folds_run_on_flash_attention(kind, swap, name, flash, monkeypatch):
    """Windows, padding and sinks as that function knows them; no other kernel is asked."""
    model = on_flash(kind)
    attnswap.patch(model, swap)
    move_away(model, LENGTH)
    flash.calls.clear()
    monkeypatch.setattr(folded, "scaled_dot_product_attention", None)
    check_layers(model, name)
    assert [call[:2] for call in flash.calls] == [(8, 4), (8, 4)]


def test_what_flash_attention_receives(flash):
    """Queries come scaled, and kept heads untouched: each pass its own heads, groups parted or not."""
    model = on_flash("gpt_oss")
    attnswap.patch(model, "ssmax", heads=[6, 7, 0, 1])
    move_away(model, LENGTH)
    flash.calls.clear()
    given, _, _ = layout("left")
    with torch.no_grad(), recording(model) as calls:
        model(**given)
    (kept, folded) = flash.calls[:2]
    assert (kept[:2], folded[:2]) == ((4, 2), (4, 2))
    assert torch.equal(kept[2].double(), torch.tensor(calls[0].query[:, 2:6]))
    ratio = folded[2].double() / torch.tensor(calls[0].query[:, [6, 7, 0, 1]])
    assert (ratio - ratio[..., :1]).abs().max() < 1e-4
    assert ratio[0, :, :, 0].std() > 0.1
    flash.calls.clear()
    check_layers(model, "left")
    attnswap.patch(model, "softpick", heads=[3])
    flash.calls.clear()
    check_layers(model, "left")
    assert [call[:2] for call in flash.calls[:2]] == [(3, 3), (4, 2)]


def test_a_soft_cap_is_not_folded_under(flash):
    model = on_flash("gemma2")
    attnswap.patch(model, "ssmax", heads=ODD)
    move_away(model, LENGTH)
    flash.calls.clear()
    check_layers(model, "left")
    assert [call[0] for call in flash.calls] == [4, 4], "the kept heads alone"


@pytest.mark.parametrize("name", ["packed", "four_d"])
def test_masks_that_flash_attention_does_not_know(name, flash, tokens):
    """Packed rows in a larger batch and users' own masks are served where they are computed exactly."""
    model = on_flash()
    attnswap.patch(model, "ssmax")
    move_away(model, LENGTH)
    flash.calls.clear()
    if name == "packed":
        check_layers(model, name)
    else:
        own = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
        with torch.no_grad():
            found = model(tokens, attention_mask=own).logits
            assert not flash.calls
            assert (found - model(tokens).logits).abs().max() < 1e-4
            assert flash.calls
        return
    assert not flash.calls


def test_forgetting_gates_and_other_weights_do_not_run_on_flash_attention(flash):
    model = on_flash("gpt_oss")
    attnswap.patch(model, {"forgetting-gate": ODD, "softpick": REST})
    move_away(model, LENGTH)
    flash.calls.clear()
    check_layers(model, "left")
    assert not flash.calls


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_oss"])
def test_cached_decoding_on_flash_attention(kind, flash, tokens):
    model = on_flash(kind)
    attnswap.patch(model, "ssmax", heads=ODD)
    move_away(model, LENGTH)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        flash.calls.clear()
        cached = model.generate(tokens, **given)
        assert {call[0] for call in flash.calls} == {4, 8}, "all heads where a single query parts a group"
        assert torch.equal(cached, model.generate(tokens, use_cache=False, **given))


def test_a_flash_function_that_does_more_than_softmax_is_refused(flash, monkeypatch):
    """The proof after patching runs on kernels of our own, so that it still compares two things."""
    more = functools.partial(Flash.__call__, flash)
    monkeypatch.setitem(
        AttentionInterface._global_mapping,
        "flash_attention_2",
        lambda module, query, *args, **kwargs: more(module, query * 1.5, *args, **kwargs),
    )
    with pytest.raises(UnsupportedModelError, match="more in its attention than softmax"):
        attnswap.patch(on_flash(), "ssmax")


def test_gradients_flow_through_the_model_s_own_kernel(flash, tokens):
    found = []
    for model in (on_flash(), eight_heads()):
        attnswap.patch(model, "ssmax", heads=ODD)
        move_away(model, LENGTH)
        model(tokens, labels=tokens).loss.backward()
        found.append({k: p.grad for k, p in model.named_parameters()})
    for name, mine in found[0].items():
        assert (mine - found[1][name]).abs().max() < 1e-4 * max(1, float(mine.abs().max())), name


@pytest.mark.slow
def test_flex_attention(tokens):
    """The real thing, compiled: folds and kept heads run on it, left-padded, and equal the oracle."""
    mapping, received = AttentionInterface._global_mapping, []
    original = mapping["flex_attention"]

    def recorded(module, query, key, value, mask, **kwargs):
        received.append((query.shape[1], type(mask).__name__))
        return original(module, query, key, value, mask, **kwargs)

    model = eight_heads()
    model.set_attn_implementation("flex_attention")
    attnswap.patch(model, "ssmax", heads=[4, 0, 7, 5])
    move_away(model, LENGTH)
    mapping["flex_attention"] = recorded
    try:
        check_layers(model, "left")
    finally:
        mapping["flex_attention"] = original
    assert received == [(4, "BlockMask")] * 4


def test_folds_stay_on_the_stock_kernel_elsewhere(counted, monkeypatch):
    """With sdpa and eager before, a fold is one call of torch's own function."""
    for kind, implementation in (("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa")):
        model = eight_heads(kind)
        model.set_attn_implementation(implementation)
        attnswap.patch(model, "ssmax")
        passes = counted(model)
        used = []
        original = folded.scaled_dot_product_attention
        counting = lambda *a, original=original, used=used, **k: used.append(a[0].shape[1]) or original(*a, **k)  # noqa: E731
        with monkeypatch.context() as patched:
            patched.setattr(folded, "scaled_dot_product_attention", counting)
            check_layers(model, "left")
        assert used == [8, 8] and not passes["before"]
