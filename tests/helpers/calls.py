"""Calls to try a swap on: its configs, shapes, masks, scores and features, and how a result is compared.

The features of a swap are drawn from its declarations alone and away from their initial values, so that a new swap
needs nothing here.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attnswap
from attnswap.attention import chunked, dense, native, triton
from attnswap.attention.dispatch import BACKENDS, with_weights
from attnswap.attention.problem import Problem, complete_features
from attnswap.attention.visibility import Visibility
from attnswap.swaps import REGISTRY, ModelInfo, Swap, names
from attnswap.swaps.softmax import Softmax
from attnswap.swaps.statistics import Root
from tests.helpers.devices import device_of

SETTINGS = settings()  # of the profile that conftest.py chose, or the command line
MASKS = ("none", "causal", "bool", "inf", "lowest", "additive", "per head", "one for all", "causal and bool", "padding")
LEVELS = ("plain", "sharp", "huge", "low")
MAX_POSITIONS = 16


def variants() -> list[Swap]:
    """The examples of every registered swap, by name."""
    return [swap for name in names() for swap in REGISTRY[name].examples()]


# --- calls ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The shape, mask and score level of a call."""

    batch: int = 2
    kv_heads: int = 2
    groups: int = 2
    queries: int = 6
    keys: int = 6
    width: int = 4
    value_width: int = 3
    mask: str = "causal"
    level: str = "plain"
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shapes with Q below, at and above K, every kind of mask, and scores from ordinary to extreme."""
    kv_heads, groups = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2), (1, 4), (2, 3)]))
    keys = draw(st.integers(1, 12))
    queries = draw(st.sampled_from([keys, keys, 1, max(1, keys - 2), keys + 3]))
    return Case(
        batch=draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        groups=groups,
        queries=queries,
        keys=keys,
        width=draw(st.integers(3, 8)),  # with fewer, whole rows of scores near 0 make softpick ill-conditioned
        value_width=draw(st.integers(1, 5)),
        mask=draw(st.sampled_from(MASKS)),
        level=draw(st.sampled_from(("plain", *LEVELS))),
        seed=draw(st.integers(0, 10**6)),
    )


@dataclass
class Inputs:
    """One call: fp64 tensors, the mask as the caller gives it, and what is visible, found by definition."""

    tensors: dict[str, Tensor]
    features: dict[str, Tensor]
    options: dict[str, object]
    visible: Tensor
    upstream: Tensor

    @property
    def bias(self) -> Tensor:
        mask = self.options.get("attn_mask")
        if not isinstance(mask, Tensor) or mask.dtype == torch.bool:
            return torch.zeros(self.visible.shape, dtype=torch.float64)
        return mask.double().expand(self.visible.shape).masked_fill(~self.visible, 0.0)

    def rounded(self, dtype: torch.dtype) -> "Inputs":
        """The same call with values that ``dtype`` can hold (features: fp32, as they come from gates)."""
        keep = copy.copy(self)
        keep.tensors = {k: x.to(dtype).double() for k, x in self.tensors.items()}
        keep.features = {k: x.float().double() for k, x in self.features.items()}
        keep.upstream = self.upstream.to(dtype).double()
        return keep


def bound(swap: Swap, case: Case) -> Swap:
    """The swap as it would be in a model of the case's sizes."""
    return swap.bind(ModelInfo(case.heads, case.kv_heads, 8, MAX_POSITIONS, case.value_width))


def draw_features(swap: Swap, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws what a swap declares, away from its initial values, in fp64.

    A feature says from which range; else per-head values move from their start by about one half, and per-token ones
    have a standard deviation near 1.
    """
    drawn = {}
    for name, feature in swap.features().items():
        count = case.heads if feature.heads == "query" else case.kv_heads
        shape = feature.shape(case.batch, count, case.queries, case.keys, case.value_width)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if feature.drawn is not None:
            low, high = feature.drawn
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
            drawn[name] = (low + (high - low) * uniform) / (max(case.keys, 2) if feature.summed else 1)
        elif feature.per == "head":
            start = feature.start(range(count)).double()
            # Never within a tenth of the start, whatever is drawn.
            drawn[name] = start + noise.sign() * (0.1 + 0.4 * noise.abs().clamp(max=2))
        else:
            drawn[name] = noise
    return drawn


def draw(swap: Swap, case: Case) -> Inputs:
    """Draws a call. Where a mask is random, one query sees nothing and another sees one key, if there are that many."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query = normal(case.batch, case.heads, case.queries, case.width)
    key = normal(case.batch, case.kv_heads, case.keys, case.width)
    value = normal(case.batch, case.kv_heads, case.keys, case.value_width)
    if case.level == "sharp":
        query = query * 6
    elif case.level == "huge":
        query = query * 1e4
    elif case.level == "low":  # every score near -130, whatever the width
        query = torch.cat([torch.full_like(query[..., :1], 130 * case.width**0.5), query[..., 1:]], -1)
        key = torch.cat([torch.full_like(key[..., :1], -1.0) + 0.01 * key[..., :1], key[..., 1:]], -1)
    options, visible = draw_mask(case, generator)
    if swap.causal_only:
        options["is_causal"], visible = True, visible & causal_mask(case)
    return Inputs(
        {"query": query, "key": key, "value": value},
        draw_features(swap, case, generator),
        {**options, "enable_gqa": case.groups > 1},
        visible,
        normal(case.batch, case.heads, case.queries, case.value_width),
    )


def causal_mask(case: Case) -> Tensor:
    """Returns which keys are not later than each query, (queries, keys)."""
    causal = torch.zeros(case.queries, case.keys, dtype=torch.bool)
    for i in range(case.queries):
        for j in range(case.keys):
            causal[i, j] = case.keys - 1 - j >= case.queries - 1 - i  # counted from the end, where both align
    return causal


def draw_mask(case: Case, generator: torch.Generator) -> tuple[dict[str, object], Tensor]:
    """Returns the mask options of a call, and the visible keys of every (batch, head, query)."""
    shape = (case.batch, case.heads, case.queries, case.keys)
    causal = causal_mask(case)
    if case.mask == "none":
        return {}, torch.ones(shape, dtype=torch.bool)
    if case.mask == "causal":
        return {"is_causal": True}, causal.expand(shape)
    size = {
        "per head": shape,
        "one for all": shape[2:],
        "padding": (case.batch, 1, 1, case.keys),
    }.get(case.mask, (case.batch, 1, *shape[2:]))
    seen = torch.rand(size, generator=generator) < 0.7
    if case.mask == "padding":
        seen = torch.arange(case.keys) >= torch.arange(case.batch)[:, None, None, None] * (case.keys // 3)
        seen = seen.expand(size).clone()
    else:
        seen[..., 0, :] = False
        if case.queries > 1:
            seen[..., 1, :] = False
            seen[..., 1, -1] = True
    options: dict[str, object] = {"attn_mask": seen}
    visible = seen.expand(shape)
    if case.mask in ("causal and bool", "padding"):
        options["is_causal"], visible = True, visible & causal
    elif case.mask == "inf":
        options["attn_mask"] = torch.zeros(size).masked_fill(~seen, -torch.inf)
    elif case.mask == "lowest":
        options["attn_mask"] = torch.zeros(size).masked_fill(~seen, torch.finfo(torch.float32).min)
    elif case.mask == "additive":
        options["attn_mask"] = torch.randn(size, generator=generator).masked_fill(~seen, -torch.inf)
    return options, visible


# --- running and comparing --------------------------------------------------------------------------------------------


def run(
    swap: Swap, inputs: Inputs, backend: str = "dense", dtype: torch.dtype = torch.float64, ramp: object = 1.0
) -> dict[str, Tensor]:
    """Runs a call and returns the output, the gradient of every input and feature and, if a tensor, of the ramp.

    At lambda 0 the gradient of the ramp is left out: there softpick's grows without bound as scores fall.
    """
    feature_dtype = dtype if dtype == torch.float64 else torch.float32
    device = device_of(backend)
    leaves = {k: x.to(device, dtype, copy=True).requires_grad_() for k, x in inputs.tensors.items()}
    features = {k: x.to(device, feature_dtype, copy=True).requires_grad_() for k, x in inputs.features.items()}
    learned_ramp = isinstance(ramp, Tensor) and bool((ramp > 0).all())
    if isinstance(ramp, Tensor):
        ramp = ramp.to(device, copy=True).requires_grad_(learned_ramp)
    masks = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in inputs.options.items()}
    options = {**masks, **features}
    out = attnswap.attention(*leaves.values(), swap, backend=backend, ramp=ramp, **options)
    assert out.dtype == dtype, f"output has {out.dtype} for values of {dtype}"
    assert out.shape == inputs.upstream.shape, f"output has shape {tuple(out.shape)}"
    out.backward(inputs.upstream.to(device, dtype))
    found = {"output": out.detach().cpu()}
    everything = {**leaves, **features, **({"ramp": ramp} if learned_ramp else {})}
    for name, leaf in everything.items():
        # A swap may leave an input out altogether, for example a bias that softmax does not see.
        found[f"gradient of {name}"] = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).cpu()
    return found


def output(swap: Swap, inputs: Inputs, backend: str = "dense", ramp: object = 1.0, **changes: Tensor) -> Tensor:
    """The output alone, in fp64, with some tensors or features replaced."""
    tensors = {**inputs.tensors, **{k: v for k, v in changes.items() if k in inputs.tensors}}
    features = {**inputs.features, **{k: v for k, v in changes.items() if k in inputs.features}}
    options = {**inputs.options, **features}
    return attnswap.attention(*tensors.values(), swap, backend=backend, ramp=ramp, **options)


OBSERVERS: list[Callable[[str, float, float], None]] = []
"""Called for each result that is compared, with its name, its error and what is allowed."""


def compare(
    found: dict[str, Tensor], wanted: dict[str, Tensor], forward: float, backward: float, what: str, summed: float = 0.0
) -> None:
    """Asserts that outputs and gradients agree, relative to the largest wanted value (or 1 where all are smaller).

    ``summed`` is what a gradient that adds up products of whole rows may be off by, whatever ``backward`` says.
    """
    for name, want in wanted.items():
        got, want = found[name].double(), want.double()
        assert got.isfinite().all(), f"{what}: {name} is not finite"
        scale = max(1.0, float(want.abs().max()) if want.numel() else 0.0)
        error = float((got - want).abs().max()) / scale if want.numel() else 0.0
        allowed = forward if name == "output" else backward
        if name.removeprefix("gradient of ") not in ("output", "query", "key", "value"):
            allowed = max(allowed, summed / scale)
        if name == "gradient of ramp":
            allowed = max(allowed, 2e-6)  # a lambda of fp32 has a gradient of fp32
        for observe in OBSERVERS:
            observe(name, error, allowed)
        assert error <= allowed, f"{what}: {name} is off by {error:.2e} of its scale, allowed {allowed:.2e}"


def allowed_error(inputs: Inputs, level: str) -> float:
    """What fp32 may be off by: 2e-6, or 4 times the error of torch's own fp32 softmax on the same scores.

    Scores in the hundreds and thousands carry an error of that many roundings themselves, which a softmax with
    saturated rows may not show.
    """
    mask = inputs.bias.masked_fill(~inputs.visible, -torch.inf)
    some = inputs.visible.any(-1)
    if not some.any():
        return 2e-6
    options = {"enable_gqa": bool(inputs.options["enable_gqa"])}
    low = scaled_dot_product_attention(*(x.float() for x in inputs.tensors.values()), attn_mask=mask.float(), **options)
    high = scaled_dot_product_attention(*inputs.tensors.values(), attn_mask=mask, **options)
    allowed = max(2e-6, 4 * float((low.double() - high)[some].abs().max()))
    if level not in ("huge", "low"):
        return allowed
    return max(allowed, 2 * torch.finfo(torch.float32).eps * largest_score(inputs))


def largest_score(inputs: Inputs) -> float:
    """A bound of the scores."""
    query, key, _ = inputs.tensors.values()
    return float(query.norm(dim=-1).max() * key.norm(dim=-1).max() * query.shape[-1] ** -0.5)


def allowed_sum(inputs: Inputs) -> float:
    """What the fp32 gradient of a factor of the scores may be off by: it sums dS times the score over rows.

    In a saturated row dS is a difference of equal numbers, dO.v and dO.O, and so as large as their rounding: half an
    eps for each of their terms, which processors add in different orders. The score then multiplies it, and what
    stands beside the parameter: ln n and the like, below 4 in these cases.
    """
    reach = inputs.upstream.norm(dim=-1).sum() * inputs.tensors["value"].norm(dim=-1).max()
    rounding = torch.finfo(torch.float32).eps * inputs.upstream.shape[-1]
    return 4 * rounding * float(reach) * largest_score(inputs)


@contextmanager
def short_blocks(rows: int = 2) -> Iterator[list[int]]:
    """Cuts the queries into blocks of ``rows``; yields the number of blocks of every call so far."""
    counts: list[int] = []
    original = chunked.row_blocks

    def cut(problem: Problem, elements: int = 0) -> list[dense.Block]:
        batch, heads = problem.query.shape[:2]
        blocks = original(problem, rows * batch * heads * max(1, problem.key.shape[2]))
        counts.append(len(blocks))
        return blocks

    with mock.patch.object(chunked, "row_blocks", cut):
        yield counts


def backends_of(swap: Swap) -> list[str]:
    """The backends that must serve a swap; the others must refuse it."""
    refusing = set() if swap.traits.route == "folded" else {"folded"}
    kinds = list(swap.statistics().values())
    no_kernel = "pair" in swap.stages or (bool(kinds) and [type(kind) for kind in kinds] != [Root])
    if no_kernel or native.build.unavailable():
        refusing.add("native")
    if no_kernel or kinds:
        refusing.add("tiled")
    if no_kernel or not triton.interpreted():  # tests/attention/test_triton.py runs it, in a process of its own
        refusing.add("triton")
    return [name for name in ("auto", *BACKENDS) if name not in refusing]


def softmax_output(inputs: Inputs) -> Tensor:
    """Softmax in the dense reference."""
    plain = copy.copy(inputs)
    plain.features = {}
    return output(Softmax(), plain)


def shares_value_features(swap: Swap) -> bool:
    """Whether some feature is one per key/value head, so that the heads of a group must share lambda."""
    return any(f.heads == "kv" for f in swap.features().values())


def head_ramp(swap: Swap, case: Case, values: tuple[float, ...] = (0.25, 1.0, 0.5, 0.75)) -> Tensor:
    """A different lambda per head, or per group of heads where the swap has a feature per key/value head."""
    step = case.groups if shares_value_features(swap) else 1
    return torch.tensor([values[(h // step) % len(values)] for h in range(case.heads)])


def weights(swap: Swap, inputs: Inputs, seed: int | None = None) -> Tensor:
    """The weights of the dense reference, before any scale of the values."""
    query, key, value = inputs.tensors.values()
    options = inputs.options
    assert set(options) <= {"is_causal", "enable_gqa"}
    visibility = Visibility(
        query.shape[2],
        key.shape[2],
        query.device,
        causal=bool(options.get("is_causal")),
        q_offset=key.shape[2] - query.shape[2],
    )
    features = complete_features(swap, inputs.features, query, key, value)
    problem = Problem(swap, query, key, value, visibility, features, query.shape[-1] ** -0.5)
    problem = replace(problem, seed=None if seed is None else torch.tensor(seed))
    return with_weights(problem)[1]
