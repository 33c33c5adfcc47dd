"""A user's own 4-D masks in patched models: which keys count, which tokens are padding, and where queries sit."""

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithFlattening, StaticCache

import attnswap
from attnswap.attention import chunked
from attnswap.errors import UnsupportedModelError
from attnswap.surgery.module import child_of
from attnswap.surgery.stacks import find_stack
from tests.helpers.oracle import recording
from tests.helpers.patched_models import LENGTH, check_layers, layout, move_away, slots_of
from tests.helpers.tiny_models import tiny

GATED = ["forgetting-gate", "selective-temperature"]


def four_d(mask):
    """Causal, padding hidden from every query: (batch, 1, tokens, tokens)."""
    length = mask.shape[1]
    return torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, None]


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "mistral"])
@pytest.mark.parametrize("name", ["left", "interior"])
@pytest.mark.parametrize("swap", [*GATED, "ssmax"])
def test_four_d_mask_equals_padding_mask(kind, name, swap, patched):
    """The same visibility as a boolean or an additive 4-D mask gives the same logits."""
    model = patched(kind, swap)
    given, real, _ = layout(name)
    mask = four_d(given["attention_mask"])
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        if kind == "llama":
            expected = model(**given).logits
            for own in (mask, additive):
                found = model(**{**given, "attention_mask": own}).logits
                assert (found - expected)[torch.tensor(real)].abs().max() < 1e-5
        else:  # windows are up to whoever makes the mask: the two forms agree
            a, b = (model(**{**given, "attention_mask": own}).logits for own in (mask, additive))
            assert (a - b)[torch.tensor(real)].abs().max() < 1e-5


@pytest.mark.parametrize("swap", GATED)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("prefill", [5, 17])
def test_four_d_masks_with_a_cache(swap, static, prefill, patched, tokens):
    """Interior padding seen only while it was prefilled, and a static cache more and less than half full."""
    model = patched("llama", swap)
    real = torch.ones_like(tokens)
    real[0, 2:4], real[1, 1:3] = 0, 0
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        full = model(tokens, attention_mask=real, position_ids=positions).logits
        size = 26 if static else LENGTH
        cache = StaticCache(config=model.config, max_cache_len=size) if static else None
        steps = []
        for start, stop in [(0, prefill), *((i, i + 1) for i in range(prefill, LENGTH))]:
            rows = torch.zeros(2, 1, stop - start, size if static else stop, dtype=torch.bool)
            rows[..., :stop] = four_d(real)[:, :, start:stop, :stop]
            out = model(
                tokens[:, start:stop],
                attention_mask=rows,
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            steps.append(out.logits)
    assert (torch.cat(steps, 1) - full)[real.bool()].abs().max() < 1e-4


def test_per_head_masks_go_with_their_heads(tokens):
    """A swap on some heads, in any order, sees those heads' masks and n."""
    model = tiny("llama")
    attnswap.patch(model, "ssmax", heads=[3, 0])
    attnswap.patch(model, "softpick", heads=[1])
    move_away(model, LENGTH)
    generator = torch.Generator().manual_seed(3)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = causal & ((torch.rand(2, 4, LENGTH, LENGTH, generator=generator) > 0.5) | torch.eye(LENGTH).bool())
    with torch.no_grad(), recording(model) as calls:
        model(tokens, attention_mask=mask)
    for layer, (_, module) in find_stack(model).modules.items():
        call = calls[layer]
        for swap, heads, _, parameters in slots_of(module):
            for place, head in enumerate(heads):
                features = {k: torch.tensor(v[[place]]) for k, v in parameters.items()}
                query, key, value = (
                    torch.tensor(x[:, [h]])
                    for x, h in ((call.query, head), (call.key, head // 2), (call.value, head // 2))
                )
                out = attnswap.attention(
                    query, key, value, swap, attn_mask=mask[:, [head]], backend="dense", **features
                )
                assert np.abs(call.out[:, :, head] - out[:, 0].numpy()).max() < 1e-5, (layer, head)


def test_a_mask_row_for_all_queries_over_several_blocks(patched, tokens, monkeypatch):
    """A mask of one row, (batch, 1, 1, keys), serves every block of queries."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 2 * 4 * LENGTH * 3)
    model = patched("llama", "softpick")
    row = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
    row[1, ..., :5] = False
    with torch.no_grad():
        narrow = model(tokens, attention_mask=row).logits
        wide = model(tokens, attention_mask=row.expand(-1, -1, LENGTH, -1)).logits
    assert torch.equal(narrow, wide)


@pytest.mark.parametrize("swap", GATED)
def test_masks_without_a_diagonal(swap, patched, tokens):
    """A token hidden from itself but seen by others is no padding; with a cache it cannot be told apart later."""
    model = patched("llama", swap)
    strict = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-1)[None, None].expand(2, 1, -1, -1)
    with torch.no_grad(), recording(model) as calls:
        model(tokens, attention_mask=strict, use_cache=False)
    module = find_stack(model).modules[0][1]
    call, child = calls[0], child_of(module)
    features = child(torch.tensor(call.hidden).float())[swap.replace("-", "_")]
    features = {k: v.double() for k, v in features.items() if k != "ramp"}
    q, k, v = (torch.tensor(x) for x in (call.query, call.key, call.value))
    options = {"attn_mask": strict, "enable_gqa": True, "backend": "dense"}
    out = attnswap.attention(q, k, v, child.slots[swap.replace("-", "_")].swap, **options, **features)
    assert np.abs(call.out - out.transpose(1, 2).detach().numpy())[:, :-1].max() < 1e-5
    blank = {n: torch.zeros_like(f) if f.ndim == 3 else f for n, f in features.items()}
    off = attnswap.attention(q, k, v, child.slots[swap.replace("-", "_")].swap, **options, **blank)
    assert (out - off)[:, :, :-1].abs().max() > 1e-2, "the gate is on"

    def decode(prefill):
        cache = model(tokens[:, :prefill], attention_mask=strict[:, :, :prefill, :prefill]).past_key_values
        for i in range(prefill, prefill + 2):
            model(tokens[:, i : i + 1], attention_mask=strict[:, :, [i], : i + 1], past_key_values=cache)

    for prefill in (1, 12):
        with pytest.raises(UnsupportedModelError, match="every token see itself"):
            decode(prefill)


@pytest.mark.parametrize("swap", GATED)
def test_a_static_cache_filled_before_the_swap(swap, patched, tokens):
    model = patched("llama", swap)
    cache = StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        tiny("llama")(tokens[:, :8], past_key_values=cache)
        with pytest.raises(UnsupportedModelError, match="empty cache"):
            model(tokens[:, 8:], past_key_values=cache)


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_that_other_models_used_in_between(static, patched, tokens):
    """Tokens that entered the cache past the swap, or through another one, have no gates there."""

    def in_turns(model, between, cache):
        cache = model(tokens[:, :8], past_key_values=cache, use_cache=True).past_key_values
        between(tokens[:, 8:12], past_key_values=cache)
        model(tokens[:, 12:], past_key_values=cache)

    for kind in ("llama", "mistral"):
        model, other = patched(kind, "forgetting-gate", heads=[0, 1]), patched(kind, "selective-temperature")
        for between in (tiny(kind), other):
            cache = StaticCache(config=model.config, max_cache_len=24) if static else None
            with torch.no_grad(), pytest.raises(UnsupportedModelError, match="empty cache"):
                in_turns(model, between, cache)


def test_padding_inside_a_row_equals_the_oracle_at_every_layer(patched):
    model = patched("llama", "forgetting-gate")
    check_layers(model, "interior")


@pytest.mark.parametrize("swap", ["ssmax", "softpick", "forgetting-gate"])
def test_batches_without_padding(swap, patched):
    """The collator's flattened documents give what each gives alone, with cumulative lengths and without."""
    model = patched("llama", swap)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 97, (length,), generator=generator) for length in (7, 1, 12)]
    alone = torch.cat([model(ids[None]).logits[0] for ids in documents])
    for lengths in (True, False):
        collate = DataCollatorWithFlattening(return_flash_attn_kwargs=lengths, return_position_ids=True)
        batch = collate([{"input_ids": ids.tolist()} for ids in documents])
        batch.pop("labels")
        assert ("cu_seq_lens_q" in batch) == lengths
        assert torch.allclose(model(**batch, use_cache=False).logits[0], alone, atol=1e-5)
    joined, ends = batch["input_ids"], torch.tensor([0, 7, 8, 20])
    assert not torch.allclose(model(joined).logits[0], alone, atol=1e-3)
    # RoPE knows differences of positions only, so lengths alone say enough.
    assert torch.allclose(
        model(joined, cu_seq_lens_q=ends, cu_seq_lens_k=ends, use_cache=False).logits[0], alone, atol=1e-5
    )
    for wrong in (
        {"cu_seq_lens_q": torch.tensor([0, 6, 20])},
        {"cu_seq_lens_q": ends[:-1]},
        {"cu_seq_lens_k": ends[1:]},
    ):
        with pytest.raises(UnsupportedModelError, match="cu_seq_lens_q"):
            model(**batch, **({"cu_seq_lens_q": ends} | wrong), use_cache=False)
    with pytest.raises(UnsupportedModelError, match="without padding, cache"):
        model(joined, attention_mask=torch.ones(1, 1, 20, 20).bool(), cu_seq_lens_q=ends, use_cache=False)
