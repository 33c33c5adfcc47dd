"""Derivatives, transforms, modes and layouts: on every backend each is right, or refused by name."""

import itertools
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import functional_call, grad, hessian, jvp, vmap

import attnswap
from attnswap.attention.dispatch import BACKENDS
from attnswap.errors import ConfigError, DerivativeError
from attnswap.swaps import Swap
from tests.helpers.calls import MASKS, Case, Inputs, backends_of, bound, draw, short_blocks

NAMES = attnswap.swaps.names()
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda x: x,
    "stepped width": lambda x: torch.stack([x, x + 9], -1).flatten(-2)[..., ::2],
    "stepped tokens": lambda x: torch.stack([x, x + 9], 3).flatten(2, 3)[:, :, ::2],
    "stepped heads": lambda x: torch.stack([x, x + 9], 2).flatten(1, 2)[:, ::2],
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "width first": lambda x: x.mT.contiguous().mT,
    "offset": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "one sample": lambda x: x[:1].expand_as(x),
    "one head": lambda x: x[:, :1].expand_as(x),
    "one token": lambda x: x[:, :, :1].expand_as(x),
    "one number": lambda x: x[..., :1].expand_as(x),
}
AROUND: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 5e-2}


def call(name: str, seed: int = 0, **sizes: Any) -> tuple[Swap, Inputs]:
    """A small causal call of a registered swap with its default options."""
    case = Case(queries=5, keys=5, seed=seed, **sizes)
    swap = bound(attnswap.swaps.resolve(name), case)
    return swap, draw(swap, case)


def attend(swap: Swap, inputs: Inputs, backend: str, tensors: dict[str, Tensor]) -> Tensor:
    """Runs a call on tensors of the names of its inputs and features."""
    query, key, value = (tensors[n] for n in ("query", "key", "value"))
    features = {n: x for n, x in tensors.items() if n in inputs.features}
    return attnswap.attention(query, key, value, swap, backend=backend, **inputs.options, **features)


def both(inputs: Inputs) -> dict[str, Tensor]:
    return {**inputs.tensors, **inputs.features}


def served(swap: Swap, backend: str, dtype: torch.dtype = torch.float64) -> bool:
    return backend in backends_of(swap) and not (backend == "triton" and dtype == torch.float64)


def there(interpreted: Callable[..., Any], backend: str, check: Callable[..., None], *args: Any) -> None:
    """Checks a backend in this process, the Triton kernels in one that interprets them."""
    if backend == "triton":
        interpreted(check, *args, backend)
    else:
        check(*args, backend)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=pytest.mark.slow if backend == "triton" and name != "softpick" else ())
        for name, backend in itertools.product(NAMES, ("auto", *BACKENDS))  # the interpreter takes its time
    ],
)
def test_random_calls_are_the_reference_or_refused(name: str, backend: str, interpreted: Callable[..., Any]):
    """Shapes, grouped heads, masks, dtypes, layouts and modes, drawn anew for each swap and backend."""
    there(interpreted, backend, check_random_calls, name)


def check_random_calls(name: str, backend: str) -> None:
    """Compares some calls with the reference."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {backend}".encode()))

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for layout, seed in itertools.product(LAYOUTS, range(2)):
        keys = pick(1, 2, 5, 9)
        case = Case(
            pick(1, 3), pick(1, 2), pick(1, 3), pick(1, keys), keys, pick(1, 4, 7), pick(1, 3), pick(*MASKS), seed=seed
        )
        swap, dtype = bound(attnswap.swaps.resolve(name), case), pick(*ROUNDING)
        around = pick(*AROUND) if dtype == torch.float32 else pick("grad", "no_grad", "inference")
        inputs = draw(swap, case).rounded(torch.bfloat16)  # which every dtype can hold
        given = {n: LAYOUTS[layout](x.to(dtype)) for n, x in inputs.tensors.items()}
        exact = {n: x.double().requires_grad_() for n, x in given.items()} | inputs.features
        given |= {
            n: x.to(torch.float64 if dtype == torch.float64 else torch.float32) for n, x in inputs.features.items()
        }
        leaves = {n: x.detach().requires_grad_() for n, x in given.items()} if around == "grad" else given
        what = f"{layout} {case} {dtype} {around}"
        try:
            with AROUND[around]():
                out = attend(swap, inputs, backend, leaves)
        except ConfigError:
            assert not served(swap, backend, dtype), what
            continue
        assert served(swap, backend, dtype), what
        assert out.dtype == (torch.bfloat16 if around == "autocast" else dtype), what
        wanted = attend(swap, inputs, "dense", exact)
        pairs = [(out.detach(), wanted.detach())]
        if around == "grad":
            of = ("query", "key", "value")
            up = inputs.upstream
            if layout.startswith("one "):  # such as that of a sum over tokens
                up = LAYOUTS[layout](up)
            pairs += zip(
                torch.autograd.grad(out, [leaves[n] for n in of], LAYOUTS[layout](up.to(dtype))),
                torch.autograd.grad(wanted, [exact[n] for n in of], up),
                strict=True,
            )
        for found, want in pairs:
            allowed = ROUNDING[out.dtype] * max(1.0, float(want.abs().max()))
            assert (found.double() - want).abs().max() <= allowed, what


def direction(inputs: Inputs) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(x.shape, generator=generator, dtype=x.dtype) for n, x in both(inputs).items()}


def by_jvp(f: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    return jvp(f, (both(inputs),), (direction(inputs),))[1]


def by_dual(f: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    moved = direction(inputs)
    with forward_ad.dual_level():
        out = f({n: forward_ad.make_dual(x, moved[n]) for n, x in both(inputs).items()})
        tangent = forward_ad.unpack_dual(out).tangent
        return torch.zeros_like(out) if tangent is None else tangent


def by_difference(f: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    step, moved = 1e-6, direction(inputs)
    ahead, behind = ({n: x + sign * step * moved[n] for n, x in both(inputs).items()} for sign in (1, -1))
    return (f(ahead) - f(behind)) / (2 * step)


def by_sample(f: Callable[..., Tensor], inputs: Inputs, each: Callable[..., Any]) -> Tensor:
    """The gradient of every sample in turn, by a loop or by vmap; per-head features are shared."""

    def loss(given: dict[str, Tensor]) -> Tensor:
        return f({n: x[None] if x.ndim > 1 else x for n, x in given.items()}).square().sum()

    found = each(loss)(both(inputs))
    return torch.cat([x.flatten() for x in found.values()])


def looped(loss: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    def run(given: dict[str, Tensor]) -> dict[str, Tensor]:
        rows: list[dict[str, Tensor]] = []
        for i in range(len(given["query"])):
            leaves = {n: (x[i] if x.ndim > 1 else x).clone().requires_grad_() for n, x in given.items()}
            found = torch.autograd.grad(loss(leaves), list(leaves.values()), materialize_grads=True)
            rows.append(dict(zip(leaves, found, strict=True)))
        return {n: torch.stack([row[n] for row in rows]) for n in given}

    return run


def mapped(loss: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    def run(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return vmap(grad(loss), ({n: 0 if x.ndim > 1 else None for n, x in given.items()},))(given)

    return run


TRANSFORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], float]] = {
    "jvp": (by_jvp, by_difference, 1e-6),
    "dual numbers": (by_dual, by_difference, 1e-6),
    "gradients per sample": (
        lambda f, inputs: by_sample(f, inputs, mapped),
        lambda f, inputs: by_sample(f, inputs, looped),
        1e-10,
    ),
}
"""Each with what it should give, found in another way, and how near."""


@pytest.mark.parametrize(("name", "backend"), itertools.product(NAMES, ("auto", *BACKENDS)))
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_right_or_refused(name: str, backend: str, transform: str):
    swap, inputs = call(name)
    run, otherwise, near = TRANSFORMS[transform]
    if backend not in ("auto", "chunked", "dense"):
        with pytest.raises(ConfigError, match=f'backend "{backend}" cannot'):
            run(lambda given: attend(swap, inputs, backend, given), inputs)
        return
    with short_blocks():
        found = run(lambda given: attend(swap, inputs, backend, given), inputs)
    wanted = otherwise(lambda given: attend(swap, inputs, "dense", given), inputs)
    assert wanted.abs().max() > 1e-3
    assert (found - wanted).abs().max() <= near * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize(("name", "backend"), itertools.product(NAMES, ("auto", *BACKENDS)))
def test_second_derivatives_are_right_or_raise(name: str, backend: str, interpreted: Callable[..., Any]):
    """Also where something else, here a matrix, connects the gradient and what it is differentiated by."""
    there(interpreted, backend, check_second_derivatives, name)


def check_second_derivatives(name: str, backend: str) -> None:
    """Differentiates a gradient by a matrix that the query goes through."""
    swap, inputs = call(name)
    dtype = torch.float32 if backend == "triton" else torch.float64
    if not served(swap, backend, dtype):
        return
    inputs.tensors = {n: x.to(dtype) for n, x in inputs.tensors.items()}
    matrix = torch.eye(4, dtype=dtype) + 0.3 * direction(inputs)["query"][0, 0, :4, :4]

    def first(x: Tensor, matrix: Tensor, backend: str) -> Tensor:
        out = attend(swap, inputs, backend, {**both(inputs), "query": x @ matrix})
        return torch.autograd.grad((out * inputs.upstream).sum(), x, create_graph=True)[0].square().sum()

    def second(backend: str) -> Tensor:
        leaf, x = matrix.clone().requires_grad_(), inputs.tensors["query"].clone().requires_grad_()
        return torch.autograd.grad(first(x, leaf, backend), leaf)[0]

    try:
        with short_blocks():
            found = second(backend)
    except RuntimeError as error:  # torch's kernel says so by itself
        assert backend not in ("chunked", "dense")
        assert "not implemented" in str(error) or isinstance(error, DerivativeError)
    else:
        assert backend not in ("native", "triton", "tiled")
        step, wanted = 1e-6, torch.zeros_like(matrix)
        for i, j in itertools.product(range(4), range(4)):
            moved = torch.zeros_like(matrix)
            moved[i, j] = step
            x = inputs.tensors["query"].clone().requires_grad_()
            wanted[i, j] = (first(x, matrix + moved, "dense") - first(x, matrix - moved, "dense")).item() / (2 * step)
        assert (found - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("backend", [b for b in ("native", "tiled") if b in backends_of(attnswap.Softpick())])
def test_a_backward_pass_is_not_transformed_in_silence(backend: str):
    """A tangent of the output's gradient, and a batch of gradients."""
    swap, inputs = call("softpick")
    leaf = inputs.tensors["query"].clone().requires_grad_()
    out = attend(swap, inputs, backend, {**both(inputs), "query": leaf})
    with pytest.raises(RuntimeError):
        torch.autograd.grad(out, leaf, torch.stack([out.detach()] * 2), is_grads_batched=True, retain_graph=True)
    with forward_ad.dual_level(), pytest.raises(DerivativeError, match="dense"):
        torch.autograd.grad(out, leaf, forward_ad.make_dual(out.detach(), out.detach()))


def test_entmax_has_a_hessian():
    swap, inputs = call("entmax", batch=1, kv_heads=1, groups=1)

    def loss(query: Tensor) -> Tensor:
        return (attend(swap, inputs, "auto", {**both(inputs), "query": query}) * inputs.upstream).sum()

    query = inputs.tensors["query"]
    rows = []
    for place in range(query.numel()):
        step = torch.zeros_like(query)
        step.view(-1)[place] = 1e-6
        rows.append((grad(loss)(query + step) - grad(loss)(query - step)).flatten() / 2e-6)
    assert (hessian(loss)(query).view(query.numel(), -1) - torch.stack(rows)).abs().max() < 1e-6


@pytest.mark.parametrize("backend", ["auto", "chunked", "dense"])
def test_a_tangent_of_zero_is_followed(backend: str):
    """A shut gate and a mask of zeros change nothing, but their derivative does."""
    swap, inputs = call("forgetting-gate")
    shut = torch.zeros_like(inputs.features["log_forget"])
    moved = -torch.ones_like(shut)

    def gated(gate: Tensor) -> Tensor:
        return attend(swap, inputs, backend, {**both(inputs), "log_forget": gate})

    assert jvp(gated, (shut,), (moved,))[1].abs().max() > 1e-2
    plain, given = call("softpick")

    def masked(mask: Tensor) -> Tensor:
        query, key, value = given.tensors.values()
        return attnswap.attention(query, key, value, plain, attn_mask=mask, enable_gqa=True, backend=backend)

    zeros = torch.zeros(5, 5, dtype=torch.float64)
    with forward_ad.dual_level():
        out = masked(forward_ad.make_dual(zeros, torch.eye(5, dtype=torch.float64)))
        assert forward_ad.unpack_dual(out).tangent.abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_an_empty_batch_and_what_else_is_empty(name: str, backend: str):
    swap, inputs = call(name)
    empty = {n: x[:0] if x.ndim > 1 else x for n, x in both(inputs).items()}
    empty["query"].requires_grad_()
    if served(swap, backend) and backend not in ("native", "tiled"):
        out = attend(swap, inputs, backend, empty)
        assert out.shape == (0, *inputs.upstream.shape[1:])
        out.sum().backward()
        assert empty["query"].grad is not None
    else:
        with pytest.raises(ConfigError):
            attend(swap, inputs, backend, empty)
    for part, cut in (("query", (slice(None), slice(0, 0))), ("value", (..., slice(0, 0)))):
        with pytest.raises(ConfigError, match="empty"):
            attend(swap, inputs, backend, {**both(inputs), part: both(inputs)[part][cut]})


@pytest.mark.parametrize("name", NAMES)
def test_a_patched_model_is_a_function_of_plain_tensors(name: str, patched, tokens: Tensor):
    """functional_call, and gradients per sample, beside what the model gives by itself."""
    model = patched("llama", name)
    tensors = {n: p.detach().clone() for n, p in model.named_parameters()}

    def loss(tensors: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, tensors, (row[None, :9],), {"labels": row[None, :9]}).loss

    found = vmap(grad(loss), (None, 0), randomness="different")(tensors, tokens)
    for i, row in enumerate(tokens):
        model.zero_grad()
        model(row[None, :9], labels=row[None, :9]).loss.backward()
        assert abs(float(loss(tensors, row)) - float(model(row[None, :9], labels=row[None, :9]).loss.detach())) < 1e-5
        for n, p in model.named_parameters():
            wanted = torch.zeros_like(p) if p.grad is None else p.grad
            assert (found[n][i] - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max())), n


@pytest.mark.parametrize(("name", "backend"), itertools.product(NAMES, ("auto", *BACKENDS)))
def test_a_number_is_a_number_of_the_call(name: str, backend: str):
    """A lambda given as a number, a tensor of fp64 and features left out are not rounded to fp32 in a call of fp64."""
    swap, inputs = call(name)
    if not served(swap, backend) or backend == "triton":
        pytest.skip("is refused, or knows fp32 alone")
    left_out = [n for n, f in swap.features().items() if f.per == "head" and f.initial is not None]
    given = {n: x for n, x in both(inputs).items() if n not in left_out}
    initial = {
        n: swap.features()[n].start(range(4)).expand(inputs.features[n].shape).to(inputs.features[n]) for n in left_out
    }

    def run(backend: str, ramp: Any, tensors: dict[str, Tensor]) -> Tensor:
        query, key, value = (tensors[n] for n in ("query", "key", "value"))
        features = {n: x for n, x in tensors.items() if n in inputs.features}
        return attnswap.attention(query, key, value, swap, backend=backend, ramp=ramp, **inputs.options, **features)

    for ramp in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        found, wanted = run(backend, ramp, given), run("dense", 0.3, given | initial)
        assert (found - wanted).abs().max() < 1e-12
