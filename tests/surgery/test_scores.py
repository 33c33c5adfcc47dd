"""Models that compute attention themselves: which keys their scores hide, and forwards that bypass hooks."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, MptConfig

import attnswap
from attnswap.coverage import tiny_model
from attnswap.coverage.columns import move_away
from attnswap.errors import UnsupportedModelError
from attnswap.surgery.patched import gate_hooks
from attnswap.surgery.stacks import find_stack

KINDS = ["bloom", "falcon", "gptj", "mpt", "gpt_neo", "openai-gpt"]


def counted(model, tokens, **options):
    """How many keys each query of each head is found to see."""
    seen = []
    gate_hooks(model)[0].observe = lambda call, name, problem: seen.append(problem.visibility.n)
    with torch.no_grad():
        model(tokens, **options)
    gate_hooks(model)[0].observe = None
    return seen[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [64, 6000])
def test_a_large_position_bias_hides_no_key(length, dtype):
    """ALiBi with a slope of 0.92: the bias of the first of 6000 keys is below -5000."""
    torch.manual_seed(0)
    config = MptConfig(vocab_size=97, d_model=32, n_heads=8, n_layers=1, expansion_ratio=1, max_seq_len=8192)
    config.attn_config.alibi_bias_max = 1
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    attnswap.patch(model, attnswap.SSMax(form="scale"))
    cache = DynamicCache(config=model.config)
    cache.update(*torch.randn(2, 1, 8, length - 1, 4, dtype=dtype), 0)
    n = counted(model, torch.tensor([[5]]), past_key_values=cache)
    assert n.unique().tolist() == [length]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_keys_are_known_in_every_dtype(kind, dtype):
    model = tiny_model(kind).eval().to(dtype)
    attnswap.patch(model, attnswap.SSMax(form="scale"))
    tokens = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    n = counted(model, tokens, attention_mask=mask, use_cache=False)
    right = mask.cumsum(1)
    for head in range(n.shape[1]):
        found = n[:, head].expand(2, -1)
        assert torch.equal(found[mask.bool()], right[mask.bool()])


@pytest.mark.parametrize("swap", ["softpick", "ssmax", "forgetting-gate"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mpt"])  # which refuses softpick
def test_a_forward_without_hooks_is_refused(kind, swap):
    model = tiny_model(kind).eval()
    attnswap.patch(model, swap)
    move_away(model)
    module = next(iter(find_stack(model).modules.values()))[1]
    seen = {}
    handle = module.register_forward_pre_hook(lambda m, a, k: seen.update(a=a, k=k), with_kwargs=True, prepend=True)
    tokens = torch.randint(3, 30, (2, 9))
    with torch.no_grad():
        model(tokens, use_cache=False)
        handle.remove()
        with pytest.raises(UnsupportedModelError, match="without its hooks"):
            module.forward(*seen["a"], **seen["k"])
        with attnswap.bypassed(model):
            model(tokens, use_cache=False)
    attnswap.unpatch(model)
    module.forward(*seen["a"], **seen["k"])
