"""The functional face: masks, alignment, features, ramps, dropout, memory, and every refusal."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attnswap
from attnswap.attention import chunked, folded
from attnswap.attention.dispatch import BACKENDS
from attnswap.attention.visibility import Visibility
from attnswap.errors import ConfigError
from attnswap.swaps import Swap
from attnswap.swaps.softmax import Softmax
from tests.helpers.calls import Case, backends_of, bound, draw, output, short_blocks, variants
from tests.helpers.ids import variant_id

PACKAGE = Path(attnswap.__file__).parent
ALL = backends_of(Softmax())


def tensors(
    batch: int = 2, heads: int = 4, kv_heads: int = 4, queries: int = 5, keys: int = 7, width: int = 4, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, heads, queries, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, 3)]
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def softmax(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    return attnswap.attention(q, k, v, "softpick", ramp=0.0, **options)


# --- alignment and masks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "keys"), [(1, 6), (3, 6), (6, 6), (8, 6)])
@pytest.mark.parametrize("backend", ALL)
def test_is_causal_aligns_the_last_query_with_the_last_key(queries: int, keys: int, backend: str):
    q, k, v = tensors(queries=queries, keys=keys)
    found = attnswap.attention(q, k, v, "ssmax", is_causal=True, backend=backend)
    last = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    some = last.any(-1)
    wanted = scaled_dot_product_attention(q, k, v, attn_mask=last)
    assert (found - wanted)[:, :, some].abs().max() < 1e-13
    assert not found[:, :, ~some].any()
    stock = scaled_dot_product_attention(q, k, v, is_causal=True)  # aligns the first query with the first key
    if queries == keys:
        assert (found - stock).abs().max() < 1e-13
    else:
        assert (found - stock).abs().max() > 0.1, "torch aligns otherwise where the lengths differ"


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("causal", [False, True])
def test_masks_of_every_shape_and_dtype_say_the_same(backend: str, causal: bool):
    q, k, v = tensors()
    wide = torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(3)) < 0.6
    wide[..., 0] = True
    shapes = [(5, 7), (1, 7), (5, 1), (1, 5, 7), (4, 5, 7), (1, 1, 5, 7), (2, 1, 1, 7), (2, 1, 5, 7), (1, 4, 5, 7)]
    for shape in [*shapes, (2, 4, 5, 7)]:
        mask = wide[tuple(slice(0, n) for n in (1,) * (4 - len(shape)) + shape)].reshape(shape)
        options = {"is_causal": causal, "backend": backend, "scale": torch.full((4,), 1.5)}
        found = [attnswap.attention(q, k, v, "ssmax", attn_mask=mask, **options)]
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for hidden in (-torch.inf, torch.finfo(dtype).min, torch.finfo(dtype).min / 2):
                additive = torch.zeros(shape, dtype=dtype).masked_fill(~mask, hidden)
                found.append(attnswap.attention(q, k, v, "ssmax", attn_mask=additive, **options))
        assert all(torch.equal(found[0], other) for other in found[1:]), shape
        full = mask.expand(2, 4, 5, 7) & (torch.ones(5, 7, dtype=torch.bool).tril(2) if causal else True)
        n = full.sum(-1)
        factor = 1.5 * n.double().clamp(min=1).log() + 1
        wanted = scaled_dot_product_attention(q * factor[..., None], k, v, attn_mask=full)
        wanted = torch.where(n[..., None] > 0, wanted, 0.0)
        assert (found[0] - wanted).abs().max() < 1e-12, shape


def test_a_large_finite_bias_is_a_bias_and_counts_as_visible():
    """Only values at or below half the dtype's smallest number hide a key; -900 merely disfavours it."""
    q, k, v = tensors()
    bias = torch.zeros(5, 7)
    bias[:, 3:] = -900
    options = {"scale": torch.ones(4), "offset": torch.zeros(4)}
    for backend in ALL:
        found = attnswap.attention(q, k, v, "ssmax", attn_mask=bias, backend=backend, **options)
        all_seen = scaled_dot_product_attention(q * math.log(7), k[:, :, :3], v[:, :, :3])
        assert (found - all_seen).abs().max() < 1e-6
        hidden = attnswap.attention(q, k, v, "ssmax", attn_mask=bias == 0, backend=backend, **options)
        assert (hidden - scaled_dot_product_attention(q * math.log(3), k[:, :, :3], v[:, :, :3])).abs().max() < 1e-12


@pytest.mark.parametrize("swap", variants(), ids=variant_id)
def test_a_learned_additive_mask_gets_its_gradient(swap: Swap):
    case = Case(mask="none")
    config = bound(swap, case)
    inputs = draw(config, case)
    mask = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask[0, 0, 1, 2:4] = -torch.inf
    gradients = []
    for backend in ("dense", "chunked", "auto"):
        leaf = mask.clone().requires_grad_()
        inputs.options["attn_mask"] = leaf
        with short_blocks(2):
            output(config, inputs, backend).backward(inputs.upstream)
        assert leaf.grad.isfinite().all()
        assert not leaf.grad[0, 0, 1, 2:4].any()
        gradients.append(leaf.grad)
    for other in gradients[1:]:
        assert (other - gradients[0]).abs().max() < 1e-11
    step = 1e-6 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ends = []
    for sign in (1, -1):
        inputs.options["attn_mask"] = mask + sign * step
        ends.append((output(config, inputs) * inputs.upstream).sum())
    wanted = float(ends[0] - ends[1]) / 2
    assert wanted == pytest.approx(float((gradients[0] * step).sum()), rel=1e-4, abs=1e-10)
    assert abs(wanted) > 1e-8


def test_the_arguments_are_not_changed():
    case = Case(mask="additive")
    for swap in variants():
        config = bound(swap, case)
        inputs = draw(config, case)
        everything = {**inputs.tensors, **inputs.features, "mask": inputs.options["attn_mask"]}
        before = {k: x.clone() for k, x in everything.items()}
        output(config, inputs, "auto", torch.full((4,), 0.5))
        assert all(torch.equal(before[k], x) for k, x in everything.items())


# --- features ---------------------------------------------------------------------------------------------------------


def test_features_broadcast_and_omitted_ones_take_their_start():
    q, k, v = tensors()
    whole = attnswap.attention(q, k, v, "ssmax", scale=torch.full((4,), 0.3), offset=torch.ones(4))
    assert torch.equal(attnswap.attention(q, k, v, "ssmax", scale=torch.tensor(0.3)), whole)
    paper = attnswap.SSMax(form="scale")
    start = torch.full((4,), paper.features()["scale"].initial, dtype=q.dtype)
    assert torch.equal(attnswap.attention(q, k, v, paper), attnswap.attention(q, k, v, paper, scale=start))
    gate = -torch.rand(1, 4, 7)
    shared = attnswap.attention(q, k, v, "forgetting-gate", is_causal=True, log_forget=gate)
    repeated = attnswap.attention(q, k, v, "forgetting-gate", is_causal=True, log_forget=gate.expand(2, -1, -1))
    assert torch.equal(shared, repeated)


def test_value_features_are_per_kv_head_and_query_features_per_head():
    q, k, v = tensors(kv_heads=2)
    t, u = torch.rand(2, 4, 5), torch.rand(2, 2, 7)
    options = {"enable_gqa": True, "query_temperature": t}
    for backend in ALL:
        found = attnswap.attention(q, k, v, "selective-temperature", value_temperature=u, backend=backend, **options)
        scaled = v * (1 + u.double())[..., None]
        wanted = scaled_dot_product_attention(q * (1 + t.double())[..., None], k, scaled, enable_gqa=True)
        assert (found - wanted).abs().max() < 1e-12
    with pytest.raises(ConfigError, match=r"value_temperature.*\(2, 4, 7\).*\(2, 2, 7\)"):
        attnswap.attention(q, k, v, "selective-temperature", value_temperature=torch.rand(2, 4, 7), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("swap", variants(), ids=variant_id)
def test_the_output_has_the_dtype_of_the_values(swap: Swap, dtype: torch.dtype):
    case = Case()
    config = bound(swap, case)
    inputs = draw(config, case)
    for backend in ("auto", "chunked", "dense"):
        for ramp in (0.0, 0.5, 1.0):
            given = [x.to(dtype) for x in inputs.tensors.values()]
            features = {k: x.float() for k, x in inputs.features.items()}
            found = attnswap.attention(*given, config, backend=backend, ramp=ramp, **inputs.options, **features)
            assert found.dtype == dtype
            assert found.isfinite().all()


# --- refusals ---------------------------------------------------------------------------------------------------------

Q, K, V = tensors()
GATE = -torch.rand(2, 4, 7)
REFUSED = {
    "unknown swap": ({"swap": "sofpick"}, "softpick"),
    "unknown option": ({"swap": {"name": "ssmax", "fom": "scale"}}, '"form"'),
    "no swap": ({"swap": None}, "name"),
    "unknown feature": ({"swap": "ssmax", "scales": torch.ones(4)}, '"scale"'),
    "feature of another swap": ({"swap": "softpick", "log_forget": GATE}, "log_forget"),
    "missing feature": ({"swap": "forgetting-gate"}, "log_forget"),
    "missing query feature": ({"swap": "selective-temperature", "value_temperature": GATE}, "query_temperature"),
    "feature of a wrong length": ({"swap": "forgetting-gate", "log_forget": GATE[..., :5]}, r"\(2, 4, 7\)"),
    "feature of a wrong batch": ({"swap": "forgetting-gate", "log_forget": GATE.repeat(2, 1, 1)}, r"\(2, 4, 7\)"),
    "feature of too few dimensions": ({"swap": "forgetting-gate", "log_forget": GATE[0]}, r"\(2, 4, 7\)"),
    "per-head feature of a wrong size": ({"swap": "ssmax", "scale": torch.ones(3)}, r"\(4,\)"),
    "per-head feature as a column": ({"swap": "ssmax", "scale": torch.ones(4, 1)}, r"\(4,\)"),
    "feature that is a number": ({"swap": "ssmax", "scale": 0.5}, "scale"),
    "feature that is a list": ({"swap": "ssmax", "scale": [0.5] * 4}, "scale"),
    "feature that is None": ({"swap": "forgetting-gate", "log_forget": None}, "log_forget"),
    "ramp below 0": ({"ramp": -0.1}, "ramp"),
    "ramp above 1": ({"ramp": 1.5}, "ramp"),
    "ramp that is no number": ({"ramp": math.nan}, "ramp"),
    "ramp that is a word": ({"ramp": "half"}, "ramp"),
    "ramp that is None": ({"ramp": None}, "ramp"),
    "ramp tensor above 1": ({"ramp": torch.tensor(1.5)}, "ramp"),
    "ramp tensor with no number": ({"ramp": torch.tensor([0.5, math.nan, 0.5, 0.5])}, "ramp"),
    "ramp per head of a wrong size": ({"ramp": torch.ones(3)}, r"\(4,\)"),
    "ramp of two dimensions": ({"ramp": torch.ones(4, 1)}, r"\(4,\)"),
    "unknown backend": ({"backend": "foldd"}, '"folded"'),
    "unknown backend at lambda 0": ({"backend": "foldd", "ramp": 0.0}, '"folded"'),
    "backend that cannot": ({"swap": "softpick", "backend": "folded"}, "softpick"),
    "shared keys without saying so": ({"key": K[:, :2], "value": V[:, :2]}, "enable_gqa"),
    "heads that do not divide": ({"key": K[:, :3], "value": V[:, :3], "enable_gqa": True}, "4 query heads"),
    "another head width": ({"key": K[..., :3]}, "shapes"),
    "another batch": ({"key": K[:1], "value": V[:1]}, "shapes"),
    "other lengths of keys and values": ({"value": V[:, :, :5]}, "shapes"),
    "whole numbers": ({"query": Q.long(), "key": K.long(), "value": V.long()}, "floating point dtype"),
    "mixed dtypes": ({"value": V.half()}, "one floating point dtype"),
    "three dimensions": ({"query": Q[0]}, "4 dimensions"),
    "mask of one dimension": ({"attn_mask": torch.ones(7, dtype=torch.bool)}, "attn_mask"),
    "mask of five dimensions": ({"attn_mask": torch.ones(1, 1, 1, 5, 7, dtype=torch.bool)}, "attn_mask"),
    "mask that does not broadcast": ({"attn_mask": torch.ones(5, 6, dtype=torch.bool)}, "does not fit"),
    "mask of NaN": ({"attn_mask": (1 - torch.ones(5, 7)) * -torch.inf}, "NaN"),
    "mask of +inf": ({"attn_mask": torch.full((5, 7), torch.inf)}, "NaN or"),
    "mask of -1e4": ({"attn_mask": torch.full((5, 7), -1e4)}, "hides a key only nearly"),
    "mask of -1e9": ({"attn_mask": torch.full((5, 7), -1e9)}, "hides a key only nearly"),
    "mask of fp16's minimum": (
        {"attn_mask": torch.full((5, 7), torch.finfo(torch.float16).min, dtype=torch.float16).float()},
        "hides a key only nearly",
    ),
    "mask of -1e4 in bf16": ({"attn_mask": torch.full((5, 7), -1e4, dtype=torch.bfloat16)}, "hides a key only nearly"),
    "mask of integers": ({"attn_mask": torch.ones(5, 7, dtype=torch.long)}, "int64"),
    "dropout of 1": ({"dropout_p": 1.0}, "dropout_p"),
    "negative dropout": ({"dropout_p": -0.1}, "dropout_p"),
    "sigmoid without a trained length": ({"swap": "sigmoid"}, "bias"),
    "anchored without a trained length": ({"swap": {"name": "ssmax", "form": "anchored"}}, "train_length"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_with_the_reason(case: str):
    given, words = REFUSED[case]
    given = {"query": Q, "key": K, "value": V, "swap": "ssmax", **given}
    with pytest.raises(ConfigError, match=words) as caught:
        attnswap.attention(given.pop("query"), given.pop("key"), given.pop("value"), given.pop("swap"), **given)
    assert "\n" not in str(caught.value)


def test_every_known_backend_is_named_when_one_is_unknown():
    with pytest.raises(ConfigError) as caught:
        attnswap.attention(Q, K, V, "ssmax", backend="quick")
    assert all(name in str(caught.value) for name in ("auto", *BACKENDS))


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "chunked", "dense"])
@pytest.mark.parametrize(
    "swap", [s for s in variants() if s.name in ("ssmax", "softpick", "forgetting-gate")], ids=variant_id
)
def test_dropout_drops_the_same_weights_forward_and_backward(swap: Swap, backend: str):
    """The output is linear in the values, so sum(output * g) equals sum(value * gradient) only under one mask."""
    case = Case(queries=9, keys=9)
    config = bound(swap, case)
    inputs = draw(config, case)
    value = inputs.tensors["value"] = inputs.tensors["value"].clone().requires_grad_()
    inputs.options["dropout_p"] = 0.4
    torch.manual_seed(0)
    with short_blocks(2) as counts:
        out = output(config, inputs, backend)
        (out * inputs.upstream).sum().backward()
    assert max(counts, default=0) > 1 or backend != "chunked"
    assert float((out * inputs.upstream).sum()) == pytest.approx(float((value.grad * value).sum()), rel=1e-9)
    inputs.options["dropout_p"] = 0.0
    assert (output(config, inputs, backend) - out).abs().max() > 1e-2


@pytest.mark.parametrize("backend", ["auto", "chunked", "dense"])
def test_dropout_keeps_the_expected_output(backend: str):
    q, k, v = (x.float() for x in tensors(batch=1, heads=1, kv_heads=1, queries=4, keys=6))
    many = [x.expand(4000, -1, -1, -1) for x in (q, k, v)]
    torch.manual_seed(0)
    for swap in (attnswap.SSMax(), attnswap.Softpick()):
        found = attnswap.attention(*many, swap, dropout_p=0.3, backend=backend).mean(0)
        assert (found - attnswap.attention(q, k, v, swap)[0]).abs().max() < 0.1


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", ["softpick", "forgetting-gate", "ssmax"])
def test_no_tensor_of_all_scores_is_ever_held(swap: str):
    """With blocks of at most 2**14 scores, forward and backward over 512 x 512 never make a larger tensor."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else [result]:
                if isinstance(x, Tensor):
                    self.size = max(self.size, x.untyped_storage().nbytes() // x.element_size())
            return result

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 512, 4, generator=generator).requires_grad_() for _ in range(3))
    features = {"log_forget": -torch.rand(1, 1, 512)} if swap == "forgetting-gate" else {}
    mask = torch.rand(1, 1, 512, 512) < 0.9 if swap == "ssmax" else None
    backend = {"softpick": "chunked"}.get(swap, "folded")
    sizes = []
    for rows in (32, 512):
        with short_blocks(rows), Largest() as seen:
            options = {"attn_mask": mask, "is_causal": True, "backend": backend, **features}
            attnswap.attention(q, k, v, swap, **options).sum().backward()
        sizes.append(seen.size)
    # A user's own dense mask is whole by nature; what is made from it stays boolean or one block large.
    assert sizes[1] >= 512 * 512
    assert sizes[0] <= (32 * 512 if mask is None else 512 * 512)


def test_the_block_size_can_be_set_for_the_whole_module(monkeypatch: pytest.MonkeyPatch):
    """Lowering the module's limit takes effect on the next call, on the stock kernel too."""
    made: list[int] = []
    original = chunked.row_blocks

    def counted(*args: object, **options: object) -> list:
        blocks = original(*args, **options)
        made.append(len(blocks))
        return blocks

    monkeypatch.setattr(chunked, "row_blocks", counted)
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 2 * 4 * 7)  # one row of (2, 4, 1, 7) at a time
    attnswap.attention(Q, K, V, "softpick", backend="chunked")
    attnswap.attention(Q, K, V, "ssmax", attn_mask=torch.ones(5, 7, dtype=torch.bool).tril())
    assert made == [5, 5]


def test_blocks_cover_every_query_once_and_every_visible_key():
    for window in (None, 3):
        for offset in (0, 4, -3):
            visibility = Visibility(10, 10 + offset, torch.device("cpu"), q_offset=offset, window=window)
            whole = visibility.mask().expand(1, 1, 10, 10 + offset)
            for rows in (1, 3, 10):
                for start in range(0, 10, rows):
                    stop = min(start + rows, 10)
                    k0, k1 = visibility.key_span(start, stop)
                    assert torch.equal(visibility.mask(start, stop, k0, k1), whole[:, :, start:stop, k0:k1])
                    outside = torch.ones(10 + offset, dtype=torch.bool)
                    outside[k0:k1] = False
                    assert not whole[:, :, start:stop, outside].any()
            assert torch.equal(visibility.n.flatten(), whole.sum(-1).flatten())


@pytest.mark.parametrize("batch", [1, 2])
def test_a_long_bf16_query_is_scaled_head_by_head_to_the_same_bits(batch: int, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    query, key, value = (torch.randn(batch, heads, 600, 16).bfloat16() for heads in (4, 2, 2))
    scale = torch.rand(4) + 0.5

    def run(scale: Tensor) -> list[Tensor]:
        q, s = query.clone().requires_grad_(), scale.clone().requires_grad_()
        out = attnswap.attention(q, key, value, "ssmax", backend="folded", enable_gqa=True, scale=s)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        assert q.grad is not None and s.grad is not None
        return [out, q.grad, s.grad]

    by_head, other = run(scale), run(scale * 1.1)
    monkeypatch.setattr(folded, "_LONG", 1000)
    for found, at_once, changed in zip(by_head, run(scale), other, strict=True):
        assert torch.allclose(found, at_once, rtol=1e-5) and not torch.allclose(found, changed, rtol=1e-2)
    assert torch.equal(by_head[0], run(scale)[0])


def test_softmax_one_is_a_stock_kernel_and_a_gate_of_its_logsumexp() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(queries=7, width=3))
    sink = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    ours = attnswap.attention(q, k, v, "softmax-1", is_causal=True, sink=sink)

    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, logsumexp = flash(q.detach(), k.detach(), v.detach(), 0.0, True)
    gated = out * torch.sigmoid(logsumexp - sink.detach()[:, None])[..., None]
    torch.testing.assert_close(ours.detach(), gated, rtol=1e-12, atol=1e-12)

    # The kernel gives its logsumexp no gradient; where one does, the gate trains like the null key.
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    scores = (q @ k.mT * 3**-0.5).masked_fill(hidden, -torch.inf)
    gate = torch.sigmoid(scores.logsumexp(-1) - sink[:, None])[..., None]
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = (q, k, v, sink)
    theirs = torch.autograd.grad(((scores.softmax(-1) @ v) * gate * weights).sum(), inputs)
    for a, b in zip(torch.autograd.grad((ours * weights).sum(), inputs), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
