"""What every swap must satisfy, written as checks that take a config; ``CHECKS`` holds them all.

The reference throughout is the dense backend in fp64, which other tests compare with formulas written out by hand.
"""

import copy
import dataclasses
import json
from collections.abc import Callable
from functools import partial

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attnswap
from attnswap.attention.dispatch import BACKENDS
from attnswap.errors import ConfigError
from attnswap.swaps import Swap, resolve
from tests.helpers.calls import (
    LEVELS,
    SETTINGS,
    Case,
    Inputs,
    allowed_error,
    allowed_sum,
    backends_of,
    bound,
    cases,
    compare,
    draw,
    head_ramp,
    output,
    run,
    shares_value_features,
    short_blocks,
    softmax_output,
    weights,
)


def check_backends(swap: Swap) -> None:
    """Every backend gives the fp64 reference's output and gradients, whole and in blocks, in fp64, fp32 and bf16."""
    seen_blocks: list[int] = []

    @SETTINGS
    @given(cases(), st.sampled_from(["swap", "half", "heads"]))
    def check(case: Case, stage: str) -> None:
        config = bound(swap, case)
        ramp = {"swap": 1.0, "half": torch.tensor(0.5), "heads": head_ramp(config, case)}[stage]
        for dtype in (torch.float64, torch.float32):
            inputs = draw(config, case).rounded(dtype)
            wanted = run(config, inputs, "dense", ramp=ramp)
            forward = allowed_error(inputs, case.level)
            summed = allowed_sum(inputs) if dtype == torch.float32 and case.level in ("huge", "low") else 0.0
            if dtype == torch.float64:
                forward = 1e-9 if case.level in ("huge", "low") else 1e-11
            for backend in backends_of(config):
                what, bounds = f"{backend} {dtype} {stage} {case}", (forward, 10 * forward)
                with short_blocks() as counts:
                    compare(run(config, inputs, backend, dtype, ramp), wanted, *bounds, f"blocks {what}", summed)
                if counts:  # a backend that makes no blocks would compute the same once more
                    compare(run(config, inputs, backend, dtype, ramp), wanted, *bounds, what, summed)
                seen_blocks.extend(counts)

    check()
    assert max(seen_blocks) > 2, "no call was cut into blocks"


def check_half_precision(swap: Swap) -> None:
    """With bf16 tensors every backend stays within 2e-2 of the reference on the same rounded inputs."""
    for mask in ("causal", "additive", "per head"):
        case = Case(keys=12, queries=12, width=8, mask=mask, seed=3)
        config = bound(swap, case)
        inputs = draw(config, case).rounded(torch.bfloat16)
        wanted = run(config, inputs)
        for backend in backends_of(config):
            found = run(config, inputs, backend, torch.bfloat16)
            compare(found, wanted, 2e-2, 2e-2, f"bf16 {backend} {mask}")


def check_refusal(swap: Swap) -> None:
    """A backend asked for by name computes the call or says why it cannot; it never computes something else."""
    case = Case()
    config = bound(swap, case)
    inputs = draw(config, case)
    for name in BACKENDS:
        if name in backends_of(config):
            output(config, inputs, name)
            continue
        try:
            output(config, inputs, name)
        except ConfigError as error:
            causes = (config.name, *(["CUDA and ROCm"] if name == "triton" else []))  # the swap, or the machine
            assert name in str(error) and any(cause in str(error) for cause in causes), str(error)
        else:
            raise AssertionError(f'backend "{name}" took "{config.name}", whose route is {config.traits.route}')


def check_extremes(swap: Swap) -> None:
    """Scores of +-1e4 and rows far below 0 stay finite in fp32, at every point of the ramp, forward and backward."""
    for level in ("huge", "low"):
        for mask in ("causal", "inf", "per head"):
            case = Case(keys=7, queries=7, mask=mask, level=level, seed=11)
            config = bound(swap, case)
            inputs = draw(config, case).rounded(torch.float32)
            forward = allowed_error(inputs, level)
            for ramp in (1.0, 0.5, torch.tensor(0.5), head_ramp(config, case, (0.5, 0.0, 2.0**-20, 1.0))):
                wanted = run(config, inputs, ramp=ramp)
                for backend in backends_of(config):
                    found = run(config, inputs, backend, torch.float32, ramp)
                    what = f"{backend} {level} {mask} ramp {ramp}"
                    compare(found, wanted, forward, 10 * forward, what, allowed_sum(inputs))


def check_rows_without_keys(swap: Swap) -> None:
    """A query that sees nothing gives 0 and passes no gradient; one unseen key gets none; nothing becomes NaN."""
    lengths = ((5, 7), (7, 7), (9, 7))
    calls = ((torch.float64, 1.0), (torch.float64, 0.0), (torch.float32, 1.0), (torch.float32, 0.5))
    for i, mask in enumerate(("bool", "inf", "lowest", "per head")):
        for queries, keys in (lengths[i % 3], lengths[(i + 1) % 3]):
            case = Case(queries=queries, keys=keys, mask=mask, seed=queries)
            config = bound(swap, case)
            inputs = draw(config, case)
            hidden_key = 2
            seen = inputs.visible.clone()
            seen[..., hidden_key] = False
            seen[:, :, 0] = False
            inputs.options["attn_mask"] = (
                seen if mask in ("bool", "per head") else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
            )
            for backend in backends_of(config):
                for dtype, ramp in calls:
                    found = run(config, inputs, backend, dtype, ramp)
                    what = f"{backend} {mask} {dtype} ramp {ramp}"
                    assert all(x.isfinite().all() for x in found.values()), what
                    assert not found["output"][:, :, 0].any(), f"{what}: a row without keys is not 0"
                    assert not found["gradient of query"][:, :, 0].any(), what
                    assert not found["gradient of key"][:, :, hidden_key].any(), what
                    assert not found["gradient of value"][:, :, hidden_key].any(), what
                    assert found["output"][:, :, 1:].any(), f"{what}: every row is 0"
                    for name, feature in config.features().items():
                        if feature.per == "query":
                            assert not found[f"gradient of {name}"][:, :, 0].any(), what


def check_lengths(swap: Swap) -> None:
    """A call without queries or keys gives an empty output or zeros, or is refused in so many words."""
    for queries, keys in ((0, 5), (4, 0), (0, 0)):
        for mask in ("none", "causal"):
            case = Case(queries=queries, keys=keys, mask=mask)
            config = bound(swap, case)
            inputs = draw(config, case)
            for backend in backends_of(config):
                try:
                    found = output(config, inputs, backend)
                except ConfigError as error:
                    assert "token" in str(error) or "empty" in str(error), str(error)
                    continue
                assert not found.any(), f"{backend} {mask} {queries} queries, {keys} keys"


def own_token_idle(swap: Swap, inputs: Inputs) -> set[str]:
    """Which of its own token's tensors a row does not read, as the weights of the reference show."""
    own, moved = weights(swap, inputs), copy.copy(inputs)
    key = inputs.tensors["key"].clone()
    key[:, :, -1] *= -3
    moved.tensors = {**inputs.tensors, "key": key}
    unread = {"key"} if torch.equal(weights(swap, moved)[..., -1, :], own[..., -1, :]) else set()
    return unread if own[..., -1, -1].any() else unread | {"value"}


def check_causality(swap: Swap) -> None:
    """What belongs to token t changes no output before t, not by one bit, and does change something from t on.

    But for the own key of a row, or its value, where a swap leaves it out.
    """
    for queries, keys in ((9, 9), (4, 9)):
        case = Case(queries=queries, keys=keys, mask="causal", seed=4)
        config = bound(swap, case)
        inputs = draw(config, case)
        everything = {**inputs.tensors, **inputs.features}
        idle = own_token_idle(config, inputs)
        for backend in backends_of(config):
            with short_blocks(3):
                before = output(config, inputs, backend)
                for token in (keys - 1, keys - 3):
                    row = token - (keys - queries)  # the query of this token
                    changed = {"query": row, "key": token, "value": token}
                    for name, feature in config.features().items():
                        if feature.per != "head":
                            changed[name] = row if feature.per == "query" else token
                    for name, index in changed.items():
                        moved = everything[name].clone()
                        dim = 2
                        moved.select(dim, index).mul_(-3).sub_(0.5)
                        after = output(config, inputs, backend, **{name: moved})
                        what = f"{backend}: {name} of token {token}, {queries} queries"
                        assert torch.equal(after[:, :, :row], before[:, :, :row]), f"{what} changes the past"
                        if token == keys - 1 and name in idle:
                            continue
                        assert not torch.equal(after[:, :, row:], before[:, :, row:]), f"{what} changes nothing"
                        if name == "query":
                            assert torch.equal(after[:, :, row + 1 :], before[:, :, row + 1 :]), what


def check_ramp(swap: Swap) -> None:
    """lambda 0 is softmax exactly, 1 the swap, a per-head lambda is each head's own, and the way between is smooth."""
    for mask in ("none", "causal", "inf", "per head"):
        case = Case(mask=mask, seed=6)
        config = bound(swap, case)
        inputs = draw(config, case)
        softmax, full = softmax_output(inputs), output(config, inputs)
        stock = inputs.bias.masked_fill(~inputs.visible, -torch.inf)
        expected = scaled_dot_product_attention(*inputs.tensors.values(), attn_mask=stock, enable_gqa=case.groups > 1)
        expected = torch.where(inputs.visible.any(-1, keepdim=True), expected, 0.0)
        assert (softmax - expected).abs().max() < 1e-12
        assert (softmax - full).abs().max() > 1e-3, f"{mask}: the drawn features leave softmax as it is"
        for backend in backends_of(config):
            zero = output(config, inputs, backend, 0.0)
            assert torch.equal(zero, output(config, inputs, backend, 0)), "an int and a float lambda differ"
            assert (zero - softmax).abs().max() < 1e-12
            check_head_ramp(config, inputs, backend, head_ramp(config, case, (0.25, 0.0, 1.0, 0.625)))
            check_head_ramp(config, inputs, backend, torch.tensor([0.25, 1.0, 0.0, 0.625]))
            near = output(config, inputs, backend, 2.0**-24)
            assert (near - softmax).abs().max() < 1e-5, f"{backend} {mask}: a jump at lambda 0"
            near = output(config, inputs, backend, 1 - 2.0**-24)
            assert (near - full).abs().max() < 1e-5, f"{backend} {mask}: a jump at lambda 1"
            half = output(config, inputs, backend, 0.5)
            assert torch.equal(half, output(config, inputs, backend, torch.tensor(0.5)))
            assert (half - softmax).abs().max() > 1e-4
            assert (half - full).abs().max() > 1e-4
            if not config.traits.native_ramp:
                assert (half - (softmax + full) / 2).abs().max() < 1e-12


def check_head_ramp(swap: Swap, inputs: Inputs, backend: str, ramp: Tensor) -> None:
    """A per-head lambda gives each head what its own lambda would; only one that splits a group may be refused."""
    each = [output(swap, inputs, backend, float(v))[:, h] for h, v in enumerate(ramp)]
    try:
        together = output(swap, inputs, backend, ramp)
    except ConfigError:
        uniform = ramp.reshape(inputs.tensors["key"].shape[1], -1).unique(dim=1).shape[1] == 1
        assert shares_value_features(swap) and not uniform, "a lambda per head is refused without need"
        return
    error = (together - torch.stack(each, 1)).abs().max()
    assert error < 1e-12, f"{backend}: per-head lambda {ramp.tolist()} is off by {error:.1e}"


def check_plain_ramp_zero(swap: Swap) -> None:
    """At lambda 0 a square causal call is, bit for bit, what torch's own function gives."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        case = Case(mask="causal", keys=11, queries=11, seed=9)
        config = bound(swap, case)
        inputs = draw(config, case)
        tensors = [x.to(dtype) for x in inputs.tensors.values()]
        found = attnswap.attention(*tensors, config, is_causal=True, enable_gqa=True, ramp=0.0, **inputs.features)
        assert torch.equal(found, scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True))


def initial_features(swap: Swap, case: Case, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The features at the start of training, from the gates on random hidden states, and the gates' parameters."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"heads": case.heads, "kv_heads": case.kv_heads, "hidden": 8, "value_dim": case.value_width}
    parameters = {}
    for name, declared in swap.gate_parameters().items():
        shape = [s if isinstance(s, int) else sizes[s] for s in declared.shape]
        noise = torch.randn(shape, generator=generator)
        parameters[name] = (declared.initial + declared.std * noise).requires_grad_()
    hidden = torch.randn(case.batch, case.keys, 8, generator=generator)
    gates = swap.gates(hidden, parameters)
    declared = {name: f for name, f in swap.features().items() if f.per != "head"}
    assert set(gates) == set(declared), "gates() and features() name different tensors"
    for name, feature in declared.items():
        count = case.heads if feature.heads == "query" else case.kv_heads
        shape = feature.shape(case.batch, count, case.keys, case.keys, case.value_width)
        assert gates[name].shape == shape, f"{name} has shape {tuple(gates[name].shape)}"
        assert gates[name].dtype == torch.float32, f"{name} is {gates[name].dtype}"
    return gates, parameters


def check_identity(swap: Swap) -> None:
    """An exact identity start equals softmax bit for bit in the reference; a swap that claims none is none."""
    case = Case(queries=8, keys=8, seed=5)
    config = bound(swap, case)
    inputs = draw(config, case)
    gates, _ = initial_features(config, case)
    inputs.features = {k: v.detach().double() for k, v in gates.items()}  # per-head ones are left to their start
    softmax = softmax_output(inputs)
    if not config.traits.exact_identity:
        distance = (output(config, inputs) - softmax).abs().max()
        assert distance > 1e-6, "the start equals softmax but is not declared an exact identity"
        return
    assert torch.equal(output(config, inputs), softmax)
    for backend in backends_of(config):
        assert (output(config, inputs, backend) - softmax).abs().max() < 1e-13
        tensors = [x.float() for x in inputs.tensors.values()]
        options = {"is_causal": True, "enable_gqa": True}
        found = attnswap.attention(*tensors, config, backend=backend, **options, **gates)
        stock = scaled_dot_product_attention(*tensors, **options)
        assert (found - stock).abs().max() < 1e-6


def check_gates(swap: Swap) -> None:
    """Gates are finite for large hidden states, and training can move every learned tensor from the start on."""
    case = Case(queries=8, keys=8, seed=8)
    config = bound(swap, case)
    gates, parameters = initial_features(config, case)
    heads = {
        name: f.start(range(case.heads)).expand(f.shape(1, case.heads, 0, 0, 0)).clone().requires_grad_()
        for name, f in config.features().items()
        if f.per == "head"
    }
    learned = {**parameters, **heads}
    assert set(learned) == set(config.traits.learned)
    if not learned:
        return
    with torch.no_grad():
        loud = {k: p + 1 for k, p in parameters.items()}
        if loud:
            extreme = config.gates(1e4 * torch.randn(case.batch, case.keys, 8), loud)
            assert all(x.isfinite().all() for x in extreme.values())
    inputs = draw(config, case)
    tensors = [x.float() for x in inputs.tensors.values()]
    optimizer = torch.optim.Adam(learned.values(), lr=0.1)
    moved: set[str] = set()
    for _ in range(3):  # a product of two tensors, one of them 0, moves the other only a step later
        hidden = torch.randn(case.batch, case.keys, 8, generator=torch.Generator().manual_seed(1))
        gates = config.gates(hidden, parameters) if parameters else {}
        out = attnswap.attention(*tensors, config, is_causal=True, enable_gqa=True, **gates, **heads)
        optimizer.zero_grad()
        (out * inputs.upstream.float()).sum().backward()
        for name, p in learned.items():
            assert p.grad is not None, f"no gradient reaches {name}"
            assert p.grad.isfinite().all(), f"the gradient of {name} is not finite"
            if p.grad.any():
                moved.add(name)
        optimizer.step()
    assert moved == set(learned), f"no gradient ever reaches {set(learned) - moved}"


def check_row_sums(swap: Swap) -> None:
    """Rows of weights add up to what the swap's traits promise."""
    for level in LEVELS:
        for mask in ("none", "causal"):
            case = Case(queries=9, keys=9, mask=mask, level=level, seed=2)
            config = bound(swap, case)
            found = weights(config, draw(config, case))
            assert found.isfinite().all()
            total, kind = found.sum(-1), config.traits.row_sum
            if kind != "signed":
                assert (found >= 0).all(), f"{level} {mask}: a negative weight"
            if kind == "one":
                assert (total - 1).abs().max() < 1e-12, f"{level} {mask}: rows do not add up to 1"
            if kind == "at most one":
                assert (total <= 1 + 1e-12).all(), f"{level} {mask}: a row adds up to more than 1"
            if kind == "free" and level == "plain":
                assert (total - 1).abs().max() > 1e-3, "rows that always add up to 1 are not free"


def check_padding(swap: Swap) -> None:
    """Left-padded and interior-padded rows equal the row without its padding, whatever the padded tokens hold."""
    tokens, keys = 6, 9
    generator = torch.Generator().manual_seed(1)
    for pads in ([0, 1, 2], [1, 4, 5]):
        case = Case(batch=1, queries=tokens, keys=tokens, seed=12)
        config = bound(swap, case)
        short = draw(config, case)
        want = output(config, short)
        real = torch.tensor([t for t in range(keys) if t not in pads])
        valid = torch.zeros(keys, dtype=torch.bool).index_fill(0, real, True)
        mask = (valid & torch.ones(keys, keys, dtype=torch.bool).tril())[None, None]
        per_token = [k for k, f in config.features().items() if f.per != "head"]
        for backend in backends_of(config):
            for loudness in (1.0, 30.0):
                wide = {}
                for name, x in {**short.tensors, **short.features}.items():
                    if name in short.tensors or name in per_token:
                        noise = torch.randn((*x.shape[:2], keys, *x.shape[3:]), generator=generator, dtype=x.dtype)
                        x = (loudness * noise).index_copy(2, real, x)
                    wide[name] = x
                padded = copy.copy(short)
                padded.tensors = {k: wide[k] for k in short.tensors}
                padded.features = {k: wide[k] for k in short.features}
                padded.options = {"attn_mask": mask, "enable_gqa": True}
                error = (output(config, padded, backend)[:, :, real] - want).abs().max()
                assert error < 1e-11, f"{backend}: padding at {pads} changes the row by {error:.1e}"


def check_decoding(swap: Swap) -> None:
    """The last queries alone, over all keys, give the last rows of the whole: the last query sees the last key."""
    case = Case(queries=8, keys=8, seed=13)
    config = bound(swap, case)
    inputs = draw(config, case)
    for backend in backends_of(config):
        whole = output(config, inputs, backend)
        for last in (1, 3):
            tail = copy.copy(inputs)
            tail.tensors = {**inputs.tensors, "query": inputs.tensors["query"][:, :, -last:]}
            per_query = [k for k, f in config.features().items() if f.per == "query"]
            tail.features = {k: v[:, :, -last:] if k in per_query else v for k, v in inputs.features.items()}
            assert (output(config, tail, backend) - whole[:, :, -last:]).abs().max() < 1e-12


def check_independence(swap: Swap) -> None:
    """Batch rows and heads do not touch each other, and shared keys equal repeated ones."""
    for mask in ("causal", "per head"):
        case = Case(mask=mask, seed=14)
        config = bound(swap, case)
        inputs = draw(config, case)
        if mask == "per head":  # every key sees itself, so that no head takes one for padding
            inputs.visible = inputs.visible | torch.eye(case.keys, dtype=torch.bool)
            inputs.options["attn_mask"] = inputs.visible
        declared = config.features()
        per_head = {k for k, f in declared.items() if f.per == "head"}
        shared = {"key", "value", *(k for k, f in declared.items() if f.heads == "kv")}

        def part(row: int, head: int, inputs: Inputs = inputs, shared=shared, per_head=per_head) -> Inputs:
            piece = copy.copy(inputs)
            cut: dict[str, Tensor] = {}
            for name, x in {**inputs.tensors, **inputs.features}.items():
                h = head // 2 if name in shared else head
                cut[name] = x[h : h + 1] if name in per_head else x[row : row + 1, h : h + 1]
            piece.tensors = {k: cut[k] for k in inputs.tensors}
            piece.features = {k: cut[k] for k in inputs.features}
            piece.options = {**inputs.options, "enable_gqa": False}
            if "attn_mask" in piece.options:
                piece.options["attn_mask"] = inputs.visible[row : row + 1, head : head + 1]
            return piece

        for backend in backends_of(config):
            whole = output(config, inputs, backend)
            for row in range(case.batch):
                for head in range(case.heads):
                    alone = output(config, part(row, head), backend)[0, 0]
                    error = (alone - whole[row, head]).abs().max()
                    assert error < 1e-12, f"{backend} {mask}: head {head} of row {row} depends on the others"


def check_gradients(swap: Swap) -> None:
    """Analytic gradients of the reference equal numerical ones in fp64, at the end of the ramp and halfway."""
    for mask, queries, keys, ramp in (("causal", 3, 4, 1.0), ("additive", 4, 3, 0.5)):
        case = Case(batch=1, kv_heads=1, groups=2, queries=queries, keys=keys, width=2, value_width=2, mask=mask)
        config = bound(swap, case)
        if config.needs_logsumexp and ramp < 1:
            continue  # it is detached, which a formula written by hand knows and a numerical difference does not
        inputs = draw(config, case)
        everything = {**inputs.tensors, **inputs.features}
        # What is rounded to fp32 numerical differences cannot resolve.
        rounded = {name for name, feature in config.features().items() if feature.rounded}
        names = [n for n in everything if n not in rounded]
        leaves = [everything[n].clone().requires_grad_() for n in names]
        call = partial(_call, config, inputs, names, ramp)
        assert torch.autograd.gradcheck(call, leaves, eps=1e-6, atol=1e-6, rtol=1e-4)


def _call(config: Swap, inputs: Inputs, names: list[str], ramp: float, *values: Tensor) -> Tensor:
    return output(config, inputs, "dense", ramp, **dict(zip(names, values, strict=True)))


def check_config(swap: Swap) -> None:
    """A config is frozen, hashable, survives JSON, is rebuilt by name, and its traits agree with its methods."""
    for config in (swap, bound(swap, Case())):
        plain = config.to_dict()
        assert resolve(json.loads(json.dumps(plain, allow_nan=False))) == config
        assert plain["name"] == config.name
        assert hash(config) == hash(resolve(plain))
        assert bound(config, Case()) == bound(swap, Case()), "binding twice changes the config"
        for field in dataclasses.fields(config):
            try:
                setattr(config, field.name, None)
            except dataclasses.FrozenInstanceError:
                continue
            raise AssertionError(f"{field.name} can be changed")
        try:
            resolve({**plain, "epsilom": 1})
        except ConfigError as error:
            assert "epsilom" in str(error)
        else:
            raise AssertionError("an unknown option is accepted")
    traits, declared = swap.traits, swap.features()
    kinds = {f.per for f in declared.values()}
    assert traits.cache_state == ("key" in kinds)
    assert traits.needs_hidden == bool(kinds & {"query", "key"}) == bool(swap.gate_parameters())
    assert traits.row_sum in ("one", "at most one", "free", "signed")
    assert traits.route in ("folded", "elementwise", "row")
    assert traits.learned == (*(k for k, f in declared.items() if f.per == "head"), *swap.gate_parameters())


CHECKS: list[Callable[[Swap], None]] = [
    check_config,
    check_identity,
    check_gates,
    check_row_sums,
    check_ramp,
    check_plain_ramp_zero,
    check_refusal,
    check_rows_without_keys,
    check_lengths,
    check_causality,
    check_padding,
    check_decoding,
    check_independence,
    check_half_precision,
    check_extremes,
    check_gradients,
    check_backends,
]


def check_ids(check: Callable[[Swap], None]) -> str:
    """A readable test id."""
    return check.__name__.removeprefix("check_")
