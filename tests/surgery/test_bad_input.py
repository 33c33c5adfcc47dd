"""Bad input: a clear error of the right kind, and the model, the files and the process as they were."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MambaConfig,
)
from transformers.models.llama.modeling_llama import LlamaAttention

import attnswap
from attnswap.errors import ConfigError, UnsupportedModelError
from attnswap.surgery.stacks import find_stack
from tests.helpers.patched_models import snapshot
from tests.helpers.tiny_models import tiny

MISTAKES = [
    ({"swap": "sofpick"}, 'Did you mean "softpick"'),
    ({"swap": {"name": "ssmax", "fom": "scale"}}, 'Did you mean "form"'),
    ({"swap": {"form": "scale"}}, 'unknown swap "form"'),
    ({"swap": 3}, "with a name"),
    ({"swap": {}}, "empty"),
    ({"swap": "ssmax", "layers": 2}, "layer 2 does not exist: the attention layers are 0 to 1"),
    ({"swap": "ssmax", "layers": -3}, "layer -3 does not exist"),
    ({"swap": "ssmax", "layers": [0, 9]}, "layer 9"),
    ({"swap": "ssmax", "layers": "5:"}, "no layer selected"),
    ({"swap": "ssmax", "layers": "a:b"}, "no slice"),
    ({"swap": "ssmax", "layers": []}, "no layer selected"),
    ({"swap": "ssmax", "layers": lambda i: False}, "no layer selected"),
    ({"swap": "ssmax", "layers": [0.5]}, "whole number"),
    ({"swap": "ssmax", "layers": 0.5}, "whole number"),
    ({"swap": "ssmax", "layers": torch.tensor([False, True])}, "whole number"),
    ({"swap": "ssmax", "heads": torch.tensor(True)}, "whole number"),
    ({"swap": "ssmax", "heads": "0"}, "whole number"),
    ({"swap": "ssmax", "ramp": "0.5"}, "ramp must be in"),
    ({"swap": "ssmax", "ramp": [0.5] * 4}, "one number here"),
    ({"swap": "ssmax", "heads": [4]}, "head 4 does not exist: the layer has heads 0 to 3"),
    ({"swap": "ssmax", "heads": [-1]}, "head -1"),
    ({"swap": "ssmax", "heads": [1, 1]}, "each once"),
    ({"swap": "ssmax", "heads": []}, "at least one"),
    ({"swap": {"ssmax": [0]}, "heads": [1]}, "not both"),
    ({"swap": {"ssmax": [0, 1], "softpick": [1]}}, "head 1 of layer 0 already"),
    ({"swap": "selective-temperature", "heads": [0]}, "whole groups"),
    ({"swap": "selective-temperature", "heads": [1, 2]}, "whole groups"),
    ({"swap": "ssmax", "ramp": 1.5}, "ramp must be in"),
    ({"swap": "ssmax", "ramp": float("nan")}, "ramp must be in"),
    ({"swap": {"name": "softpick", "eps": -1.0}}, "eps"),
    ({"swap": {"name": "ssmax", "form": "scale", "init": "identity"}}, "no identity start"),
    ({"swap": {"name": "sigmoid", "bias": "lerned"}}, 'bias must be a number or "learned" or "predicted" or null'),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_in_patch(arguments, message, tokens):
    model = tiny("llama")
    traces = snapshot(model)
    with torch.no_grad():
        before = model(tokens).logits
    with pytest.raises(ConfigError, match=message):
        attnswap.patch(model, **arguments)
    assert snapshot(model) == traces
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize(("arguments", "message"), MISTAKES[:14])
def test_a_failed_second_patch_leaves_the_first(arguments, message, patched, tokens):
    model = patched("llama", "forgetting-gate", heads=[0, 1])
    with torch.no_grad():
        before = model(tokens).logits
        with pytest.raises(ConfigError):
            attnswap.patch(model, **arguments)
        assert torch.equal(model(tokens).logits, before)


def test_a_head_patched_twice(patched):
    model = patched("llama", "ssmax", heads=[0, 2])
    report = attnswap.describe(model)
    with pytest.raises(ConfigError, match='head 2 of layer 0 already has the swap "ssmax"'):
        attnswap.patch(model, "softpick", heads=[2, 3])
    assert attnswap.describe(model) == report
    attnswap.patch(model, "softpick", heads=[1, 3])


def test_not_patched():
    model = tiny("llama")
    for call in (attnswap.unpatch, lambda m: attnswap.set_ramp(m, 0.5)):
        with pytest.raises(ConfigError, match="not patched"):
            call(model)


def test_bad_ramp_moves_nothing(patched):
    model = patched("llama", "softpick")
    for ramp in (1.1, [0.5, 0.5], [0, 0, 0, 2]):
        with pytest.raises(ConfigError, match="ramp"):
            attnswap.set_ramp(model, ramp)
    for ramp in ("0.5", ["a"] * 4, True, None, torch.tensor(2.0)):
        with pytest.raises(ConfigError, match="ramp must be in"):
            attnswap.set_ramp(model, ramp)
    with pytest.raises(ConfigError, match="layer 5"):
        attnswap.set_ramp(model, 0.5, layers=[0, 5])
    shared = patched("llama", "selective-temperature")
    with pytest.raises(ConfigError, match="same ramp"):
        attnswap.set_ramp(shared, [0, 1, 0, 1])
    attnswap.set_ramp(shared, [0, 0, 1, 1])
    assert all(s.ramp == 1.0 for row in attnswap.describe(model).layers for s in row.swaps.values())


def test_numbers_of_numpy_and_torch_are_numbers():
    model = tiny("llama")
    attnswap.patch(model, "softpick", layers=np.array([0, 1]), heads=torch.tensor([0, 2]), ramp=np.float32(0.5))
    attnswap.set_ramp(model, torch.tensor([0.25, 1.0]), layers=np.int64(1))
    assert [s.ramp for row in attnswap.describe(model).layers for s in row.swaps.values()] == [0.5, (0.25, 1.0)]
    assert attnswap.describe(model).layers[0].kept == (1, 3)


def test_mamba_has_no_attention():
    config = MambaConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    traces = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="no attention module"):
        attnswap.patch(model, "ssmax")
    assert snapshot(model) == traces


class OwnAttention(LlamaAttention):
    """Computes softmax attention by itself and never asks transformers for an attention function."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None


def replace_attention(model, kind):
    for i, layer in enumerate(model.model.layers):
        old = layer.self_attn
        layer.self_attn = kind(model.config, i)
        layer.self_attn.load_state_dict(old.state_dict())
    return model.eval()


@pytest.mark.parametrize("swap", ["ssmax", "forgetting-gate"])
def test_a_model_that_never_dispatches(swap, tokens):
    model = replace_attention(tiny("llama"), OwnAttention)
    traces = snapshot(model)
    with torch.no_grad():
        before = model(tokens).logits
    with pytest.raises(UnsupportedModelError, match="OwnAttention"):
        attnswap.patch(model, swap)
    assert snapshot(model) == traces
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)


class ExtraAttention(LlamaAttention):
    """Passes an argument nobody knows."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs, secret_bias=torch.ones(1))


class DeafAttention(LlamaAttention):
    """Throws away what its last head computed."""

    def forward(self, hidden_states, **kwargs):
        kept = self.o_proj.weight
        mask = torch.ones_like(kept)
        mask[:, -self.head_dim :] = 0
        self.o_proj.weight = nn.Parameter(kept * mask)
        try:
            return super().forward(hidden_states, **kwargs)
        finally:
            self.o_proj.weight = kept


class SharpAttention(LlamaAttention):
    """Does something to the softmax that an attention function cannot see: it is served by sdpa at another scale."""

    def forward(self, hidden_states, **kwargs):
        kept = self.scaling
        self.scaling = kept * (2.0 if self.config._attn_implementation == "sdpa" else 1.0)
        try:
            return super().forward(hidden_states, **kwargs)
        finally:
            self.scaling = kept


@pytest.mark.parametrize(
    ("kind", "message"),
    [(ExtraAttention, "secret_bias"), (DeafAttention, "head 3 of layer 0"), (SharpAttention, "computes more")],
)
def test_models_the_probe_refuses(kind, message, tokens):
    model = replace_attention(tiny("llama"), kind)
    traces = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=message):
        attnswap.patch(model, "softpick")
    assert snapshot(model) == traces


def test_the_probe_restores_randomness_and_modes():
    model = tiny("llama").train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    attnswap.patch(model, "ssmax")
    assert torch.equal(torch.rand(3), expected)
    attnswap.unpatch(model)
    assert [m.training for m in model.modules()] == modes


def test_changing_the_implementation_afterwards_changes_what_is_not_swapped(patched, tokens):
    """No way back to softmax without saying so: the swap stays."""
    model = patched("llama", "softpick")
    with torch.no_grad():
        right = model(tokens).logits
        for name in ("sdpa", "eager"):
            model.config._attn_implementation = name
            assert torch.allclose(model(tokens).logits, right, atol=1e-5)
            assert attnswap.describe(model).before == name
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises((UnsupportedModelError, KeyError), match=r"computed attention without attnswap|paged"):
        model(tokens)


def test_lost_hooks_are_noticed(patched, tokens):
    model = patched("llama", "softpick")
    for _, module in find_stack(model).modules.values():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    with pytest.raises(UnsupportedModelError, match="hooks are missing"):
        model(tokens)


def test_an_unpatched_model_with_our_implementation_is_refused(tokens):
    model = tiny("llama")
    model.set_attn_implementation("attnswap")
    with pytest.raises(UnsupportedModelError, match="not patched"):
        model(tokens)


def test_a_cache_filled_without_gates(patched, tokens):
    model = patched("llama", "forgetting-gate", ramp=0.0)
    stock = tiny("llama")
    with torch.no_grad():
        cache = stock(tokens[:, :10], use_cache=True).past_key_values
        attnswap.set_ramp(model, 1.0)
        with pytest.raises(UnsupportedModelError, match="empty cache"):
            model(tokens[:, 10:], past_key_values=cache)


def test_a_mask_of_the_wrong_size(patched, tokens):
    model = patched("llama", "ssmax")
    mask = torch.ones(2, 1, 20, 25, dtype=torch.bool)
    with pytest.raises(ConfigError, match="does not fit 2 rows, 4 heads, 20 queries and 20 keys"):
        model(tokens, attention_mask=mask)


def test_unknown_feature_and_backend():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ConfigError, match='Did you mean "log_forget"'):
        attnswap.attention(q, q, q, "forgetting-gate", log_forgt=torch.zeros(1, 2, 4))
    with pytest.raises(ConfigError, match="needs the feature"):
        attnswap.attention(q, q, q, "forgetting-gate")
    with pytest.raises(ConfigError, match="folded"):
        attnswap.attention(q, q, q, "softpick", backend="foldd")
    with pytest.raises(ConfigError, match="use backend"):
        attnswap.attention(q, q, q, "softpick", backend="folded")


GLOBAL_STATE = """
import peft, peft.mapping, peft.tuners.lora
import torch, torch._dynamo, torch.utils.checkpoint, transformers, transformers.generation.utils
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import cache_utils, masking_utils, modeling_utils
from transformers.models.llama import modeling_llama

OWNERS = [PreTrainedModel, PreTrainedConfig, LlamaForCausalLM, modeling_llama.LlamaAttention, torch.nn.Module]
OWNERS += [masking_utils, modeling_utils, cache_utils, modeling_llama, torch.nn.functional, torch]
OWNERS += [transformers.generation.utils, peft.mapping, peft.PeftModel, peft.LoraModel, peft.LoraConfig]

def state():
    seen = {(o.__name__, k): id(v) for o in OWNERS for k, v in vars(o).items() if k != "__warningregistry__"}
    registries = [modeling_utils.AttentionInterface, masking_utils.AttentionMaskInterface]
    layers = [dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING), dict(cache_utils.STATIC_LAYER_TYPE_MAPPING)]
    tables = [peft.PeftType.__members__, peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING]
    tables += [peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING]
    return seen, [set(r._global_mapping) for r in registries] + [set(t) for t in tables], layers

before = state()
import attnswap
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=31)
model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes))
attnswap.patch(model, "forgetting-gate")
model.generate(torch.arange(5)[None], max_new_tokens=3, do_sample=False)
after = state()
changed = {k for k in before[0] if after[0].get(k) != before[0][k]}
added = [sorted(str(getattr(x, "value", x)) for x in a - b) for a, b in zip(after[1], before[1])]
print(sorted(changed), added, after[2] == before[2])
"""


def test_global_touches_are_the_listed_ones():
    """Importing attnswap adds one name to two registries and to peft's tables and wraps six methods; no more."""
    done = subprocess.run([sys.executable, "-c", GLOBAL_STATE], capture_output=True, text=True, check=True)
    wrapped = [("PreTrainedConfig", "__post_init__"), ("PreTrainedConfig", "to_dict")]
    wrapped += [("PreTrainedModel", name) for name in ("__init__", "from_pretrained", "post_init", "save_pretrained")]
    names = [*[["attnswap"]] * 2, *[["ATTNSWAP"]] * 4]
    assert done.stdout.splitlines()[-1] == f"{wrapped} {names} True"


def test_gates_over_time_refuse_to_see_the_future():
    q, gate = torch.randn(1, 2, 4, 8), torch.full((1, 2, 4), -0.1)
    with pytest.raises(UnsupportedModelError, match="later keys"):
        attnswap.attention(q, q, q, "forgetting-gate", log_forget=gate)
    with pytest.raises(UnsupportedModelError, match="later keys"):
        attnswap.attention(q, q, q, "forgetting-gate", log_forget=gate, attn_mask=torch.ones(4, 4, dtype=torch.bool))
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    a = attnswap.attention(q, q, q, "forgetting-gate", log_forget=gate, attn_mask=causal)
    b = attnswap.attention(q, q, q, "forgetting-gate", log_forget=gate, is_causal=True)
    assert torch.allclose(a, b, atol=1e-6)
