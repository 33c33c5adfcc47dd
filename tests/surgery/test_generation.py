"""Everything ``generate`` does gives what a full forward over the same tokens gives, whatever the cache."""

import copy

import pytest
import torch
from transformers import CompileConfig, DynamicCache

import attnswap
from attnswap.coverage import tiny_model
from attnswap.coverage.columns import move_away as away
from attnswap.surgery import state
from tests.helpers.patched_models import move_away
from tests.helpers.tiny_models import SWAPS, tiny

KINDS = ["llama", "mistral", "gemma2", "qwen3", "gpt_oss"]
NEW = 8
TOLERANCE = 1e-4
FP8 = {"backend": "fp8"}
PLAIN = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

MODES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "chunked prefill": {"prefill_chunk_size": 7},
    "beam": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {},
}


def build(kind, swap, seed=0, **options):
    model = tiny(kind, seed=seed)
    attnswap.patch(model, swap, **options)
    move_away(model, 20)
    return model


def generate(model, tokens, mode, **options):
    torch.manual_seed(3)
    options = {**PLAIN, **MODES[mode], **options}
    if mode == "assisted":
        options["assistant_model"] = tiny("llama", layers=1, seed=1)
    with torch.no_grad():
        return model.generate(tokens, **options, output_logits=True, output_scores=True, return_dict_in_generate=True)


@torch.no_grad()
def difference(model, tokens, mode, **options):
    """How far what a generation computed lies from forwards without a cache."""
    if mode == "beam sampling":  # its draws follow the scores: equal scores are drawn equally
        torch.manual_seed(3)
    made = generate(model, tokens, mode, **options)
    if mode.startswith("beam"):
        afresh = generate(model, tokens, mode, use_cache=False, **options)
        assert torch.equal(made.sequences, afresh.sequences)
        return float((made.sequences_scores - afresh.sequences_scores).abs().max())
    mask = options.get("attention_mask")
    length = tokens.shape[1]
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(mask), made.sequences.shape[1] - length)], 1)
    full = model(made.sequences, attention_mask=mask, use_cache=False).logits[:, length - 1 : -1]
    return float((torch.stack(made.logits, 1) - full).abs().max())


@pytest.mark.thinned(2)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_the_full_forward(kind, swap, mode, tokens):
    one_row = mode in ("prompt lookup", "assisted")
    assert difference(build(kind, swap), tokens[:1] if one_row else tokens, mode) < TOLERANCE


@pytest.mark.thinned(2)
@pytest.mark.parametrize("mode", ["dynamic", "static", "chunked prefill"])
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_left_padded_rows_equal_unpadded_ones(kind, swap, mode, tokens):
    model = build(kind, swap)
    padded, mask = tokens.clone(), torch.ones_like(tokens)
    padded[1, :6], mask[1, :6] = 0, 0
    assert difference(model, padded, mode, attention_mask=mask) < TOLERANCE
    together = generate(model, padded, mode, attention_mask=mask)
    alone = generate(model, tokens[1:, 6:], mode)
    assert torch.equal(together.sequences[1:, 20:], alone.sequences[:, 14:])
    gap = torch.stack(together.logits, 1)[1:] - torch.stack(alone.logits, 1)
    assert float(gap.abs().max()) < TOLERANCE


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_copied_prefix_and_a_cropped_cache(kind, swap, tokens):
    model = build(kind, swap)
    full = model(tokens, use_cache=False).logits
    prefix = DynamicCache(config=model.config)
    model(tokens[:, :12], past_key_values=prefix)
    for _ in range(2):  # the copy that was used leaves the prefix as it was
        again = model(tokens[:, 12:], past_key_values=copy.deepcopy(prefix)).logits
        assert float((again - full[:, 12:]).abs().max()) < TOLERANCE
    if kind in ("llama", "qwen3"):  # sliding layers have dropped what a crop would need
        model(tokens[:, 12:].flip(1), past_key_values=prefix)
        prefix.crop(12 - 20)
        again = model(tokens[:, 12:], past_key_values=prefix).logits
        assert float((again - full[:, 12:]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("swap", ["forgetting-gate", "selective-temperature"])
def test_gates_that_are_not_reordered_would_be_noticed(swap, tokens, monkeypatch):
    model = build("llama", swap)
    monkeypatch.setattr(state, "FORWARDED", tuple(name for name in state.FORWARDED if name != "reorder_cache"))
    state._with_side.cache_clear()
    try:
        made = generate(model, tokens, "beam", num_beams=5)
    finally:
        state._with_side.cache_clear()
    afresh = generate(model, tokens, "beam", num_beams=5, use_cache=False)
    scores = (made.sequences_scores - afresh.sequences_scores).abs()
    assert not torch.equal(made.sequences, afresh.sequences) or float(scores.max()) > TOLERANCE


@pytest.mark.parametrize("swap", ["ssmax", "selective-temperature"])
def test_a_shifted_n_would_be_noticed(swap, tokens, monkeypatch):
    model = build("llama", swap)
    from attnswap.attention.visibility import Visibility

    right = Visibility.n
    wrong = property(lambda self: right.__get__(self, Visibility) + int(self.q_length == 1))
    monkeypatch.setattr(Visibility, "n", wrong)
    assert difference(model, tokens, "dynamic") > TOLERANCE


@pytest.mark.thinned(7)
@pytest.mark.parametrize("swap", SWAPS)
def test_compiled_decoding_with_a_static_cache(swap, tokens):
    model = build("llama", swap)
    settings = CompileConfig(backend="eager", fullgraph=True)
    settings._compile_all_devices = True
    torch._dynamo.reset()
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert difference(model, tokens, "static", compile_config=settings) < TOLERANCE
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("swap", SWAPS)
def test_quantized_caches(swap, tokens):
    """A quantized cache changes keys and values, but a swap sees them as stock attention does, and its gates whole."""
    model, stock = build("llama", swap), tiny("llama")
    rough = difference(model, tokens, "dynamic", cache_implementation="quantized", cache_config=FP8)
    usual = difference(stock, tokens, "dynamic", cache_implementation="quantized", cache_config=FP8)
    assert 0 < rough < 10 * usual


@pytest.mark.thinned(2)
@pytest.mark.parametrize("mode", ["static", "chunked prefill", "beam", "prompt lookup"])
@pytest.mark.parametrize("swap", ["softpick", "forgetting-gate", "ssmax"])
@pytest.mark.parametrize("kind", ["bloom", "falcon", "gptj", "codegen", "xglm"])
def test_models_that_compute_attention_themselves(kind, swap, mode):
    tokens = torch.randint(3, 30, (1 if mode == "prompt lookup" else 2, 20), generator=torch.Generator().manual_seed(5))
    model = tiny_model(kind).eval()
    attnswap.patch(model, swap)
    away(model)
    assert difference(model, tokens, mode) < TOLERANCE
