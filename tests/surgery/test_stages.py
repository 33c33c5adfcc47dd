"""Patched models with the swaps of each stage, against the independent oracle: layouts, ramps, caches, files."""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

import attnswap
from attnswap.errors import UnsupportedModelError
from attnswap.surgery.stacks import code_of
from attnswap.swaps import REGISTRY, Swap, names, resolve
from attnswap.swaps.base import Call, Feature, Parameter, Prepared
from tests.helpers.ids import variant_id
from tests.helpers.patched_models import LENGTH, check_layers, layout, move_away
from tests.helpers.tiny_models import SWAPS, VOCABULARY, tiny

FORMS = [
    attnswap.Softmax(),
    attnswap.OutputGate(),
    attnswap.OutputGate(per="element", start=0.9),
    attnswap.OutputGate(start=None, std=0.02),
    attnswap.LSSA(),
    attnswap.LSSA(power=3.0),
    attnswap.ElasticSoftmax(),
    attnswap.ElasticSoftmax(start=-0.5, distances=4, keep_single=False),
    attnswap.TopK(k=3),
    attnswap.ClippedSoftmax(gamma=-0.5),
    attnswap.StickBreaking(),
    attnswap.StickBreaking(own="remainder", bias_log_n=-1.0),
    attnswap.ScaleInvariant(tau=2.0),
    attnswap.Swat(window=4),
    attnswap.GumbelSoftmax(),
]
LISTS = [resolve("softpick+output-gate"), resolve("entmax+forgetting-gate")]
KEYS_ALONE = ("top-k", "stick-breaking")
"""Have a statistic in which a model's sinks have no place."""
LSSA_SINKS = "lssa"
"""Adds the softplus of a sink's logit to its sum, which the oracle leaves out."""


def test_every_swap_is_patched_somewhere():
    assert {swap.name for swap in FORMS} | set(SWAPS) == set(names())


@pytest.mark.thinned(3)
@pytest.mark.parametrize("ramp", [0.5, 1.0])
@pytest.mark.parametrize("name", ["plain", "left", "interior", "packed"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("swap", FORMS, ids=variant_id)
def test_layers_equal_the_oracle(swap: Swap, kind: str, name: str, ramp: float):
    model = tiny(kind)
    attnswap.patch(model, swap, ramp=ramp)
    move_away(model, LENGTH)
    check_layers(model, name)


@pytest.mark.parametrize("swap", [s for s in FORMS if s.name != LSSA_SINKS], ids=variant_id)
def test_models_with_sinks(swap: Swap):
    model = tiny("gpt_oss")
    if swap.name in KEYS_ALONE:
        before = list(model.state_dict())
        with pytest.raises(UnsupportedModelError, match="sinks"):
            attnswap.patch(model, swap)
        assert list(model.state_dict()) == before and model.config._attn_implementation != "attnswap"
        return
    attnswap.patch(model, swap)
    move_away(model, LENGTH)
    check_layers(model, "left")


@pytest.mark.thinned(2)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize(
    "swap", [*FORMS, resolve("softpick+output-gate"), resolve("entmax+forgetting-gate")], ids=variant_id
)
def test_decoding_equals_prefill(swap: Swap, kind: str, static: bool):
    """Token by token with a cache, windows of the model and of the swap included."""
    model = tiny(kind)
    attnswap.patch(model, swap)
    move_away(model, LENGTH)
    tokens = torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(5))
    cache = StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(tokens).logits
        parts = [model(tokens[:, :9], past_key_values=cache).logits]
        parts += [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(9, 14)]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4


@dataclass(frozen=True)
class ValueShift(Swap):
    """Adds a learned vector of each key's token to its value: two numbers of each head, which the cache must keep."""

    def features(self) -> dict[str, Feature]:
        return {"moved": Feature("key", "kv", what="what is added", width=2)}

    def gate_parameters(self) -> dict[str, Parameter]:
        return {"weight": Parameter(("kv_heads", 2, "hidden"), std=0.5)}

    def gates(self, hidden: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"moved": torch.einsum("bth,nwh->bntw", hidden, parameters["weight"])}

    def prepare(self, call: Call) -> Prepared:
        added = torch.nn.functional.pad(call.features["moved"], (0, call.value.shape[-1] - 2))
        return Prepared(call.query, call.key, call.value + added.to(call.value.dtype), call.scaling)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_several_numbers_of_each_key_are_kept_beside_the_cache(
    static: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
):
    model = tiny("llama")
    ValueShift.name = "value-shift"  # after its definition, so that it is registered for this test alone
    monkeypatch.setitem(REGISTRY, "value-shift", ValueShift)
    attnswap.patch(model, ValueShift())
    move_away(model, LENGTH)
    tokens = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, :4] = 0
    cache = StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask, position_ids=positions).logits
        parts = []
        for start, stop in ((0, 8), *((i, i + 1) for i in range(8, 12))):
            given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            parts.append(model(tokens[:, start:stop], past_key_values=cache, **given).logits)
        assert (model(tokens[:1]).logits - bypass_of(model, tokens[:1])).abs().max() > 1e-2
    assert (torch.cat(parts, 1) - whole)[mask > 0].abs().max() < 1e-4


def bypass_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with attnswap.bypassed(model):
        return model(tokens).logits


@pytest.mark.parametrize("swap", [*FORMS[1:], *LISTS], ids=variant_id)
def test_saved_reloaded_and_taken_out_again(swap: Swap, tmp_path):
    model = tiny("llama")
    given, _, _ = layout("left")
    with torch.no_grad():
        before = model(**given).logits
        attnswap.patch(model, swap)
        move_away(model, LENGTH)
        patched = model(**given).logits
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(**given).logits, patched)
        assert (patched - before)[given["attention_mask"] > 0].abs().max() > 1e-3
        attnswap.unpatch(model)
        assert torch.equal(model(**given).logits, before)


@pytest.mark.parametrize("swap", FORMS[1:], ids=variant_id)
def test_part_of_the_heads(swap: Swap):
    """Heads share their layer with another swap and with softmax."""
    model = tiny("llama")
    attnswap.patch(model, swap, heads=[1, 2])
    attnswap.patch(model, "softpick", heads=[3])
    move_away(model, LENGTH)
    check_layers(model, "interior")


def test_noise_in_training_alone():
    """Each step has other noise and evaluation has none; activation checkpointing repeats what it computes again."""
    model = tiny("llama")
    attnswap.patch(model, "gumbel-softmax")
    tokens = torch.randint(3, VOCABULARY, (1, 12))
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(3)
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("swap", ["output-gate", "lssa", "softpick+output-gate"])
def test_models_that_multiply_weights_themselves_refuse_what_they_would_drop(swap: str):
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)).eval()
    before = list(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="multiplies weights and values itself"):
        attnswap.patch(model, swap)
    assert list(model.state_dict()) == before
    attnswap.patch(model, "elastic-softmax")


GATED = ("afmoe", "hrm_text", "laguna", "qwen3_5", "qwen3_next", "step3p7", "inkling2", "muse_spark", "lfm3")
PLAIN = (
    "llama",
    "mistral",
    "gemma2",
    "gemma3",
    "qwen3",
    "gpt_oss",
    "gpt2",
    "gpt_neox",
    "olmo2",
    "granite_swa",
    "cohere",
)


@pytest.mark.parametrize("kind", [*GATED, *PLAIN])
def test_gates_are_found_in_the_code_of_attention(kind: str):
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    classes = [
        x for name, x in vars(module).items() if name.endswith("Attention") and "ALL_ATTENTION_FUNCTIONS" in code_of(x)
    ]
    assert any(re.search(attnswap.OutputGate.built_in, code_of(x)) for x in classes) == (kind in GATED)


def test_a_model_that_has_the_gate_refuses_another():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    with pytest.raises(UnsupportedModelError, match='computes "output-gate" itself'):
        attnswap.patch(Qwen3NextForCausalLM(config).eval(), "output-gate")
