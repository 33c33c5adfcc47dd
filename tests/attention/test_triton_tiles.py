"""Tiles that all rows see as a whole, which the Triton kernels compute without masks, and what their code issues."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import attnswap
from attnswap.attention import triton as triton_backend
from attnswap.attention.operands import PLAIN
from attnswap.attention.problem import Problem, complete_features
from attnswap.attention.triton.tiles import tiles_of
from attnswap.attention.visibility import Visibility
from attnswap.swaps import Swap
from tests.helpers.calls import compare
from tests.helpers.devices import device_of
from tests.helpers.ids import variant_id
from tests.helpers.triton_calls import Worker, results

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
maths = pytest.importorskip("attnswap.attention.triton.maths")
power_less, power_ratio = maths.power_less, maths.power_ratio

HEADS, WIDTH = 2, 16
DOCUMENTS = torch.tensor([0, 0, 100]).repeat_interleave(70)
KINDS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 140},
    "documents": {"row_start": DOCUMENTS[None]},
    "padding": {"key_valid": torch.arange(210) >= torch.tensor([[0], [70]])},
    "holes": {"key_valid": torch.arange(210)[None] % 5 > 0},
    "bidirectional": {"causal": False},
    "more keys": {"queries": 150, "q_offset": 60},
    "more queries": {"keys": 150, "q_offset": -60},
    "static cache": {"queries": 140, "q_offset": torch.tensor(30)},
}
"""Calls several tiles long in both directions, the last of which are not full."""


def call_of(swap: Swap, backend: str, kind: str, dtype: torch.dtype, decay: float = 0.02, **changes: Any) -> Problem:
    """Draws a call; the same one for every backend and dtype."""
    device = torch.device(device_of(backend))
    options = {"queries": 210, "keys": 210, **KINDS[kind]}
    queries, keys = options.pop("queries"), options.pop("keys")
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    visibility = Visibility(queries, keys, device, **options)
    generator = torch.Generator().manual_seed(7)
    batch = 2 if kind == "padding" else 1

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    query, key, value = leaf(batch, HEADS, queries, WIDTH), leaf(batch, 1, keys, WIDTH), leaf(batch, 1, keys, 24)
    sizes = {"head": (HEADS,), "query": (batch, HEADS, queries), "key": (batch, HEADS, keys)}
    features = {
        name: (-decay * (0.5 + torch.rand(sizes[f.per], generator=generator))).to(device, dtype).requires_grad_()
        for name, f in swap.features().items()
    }
    return Problem(
        swap,
        query,
        key,
        value,
        visibility,
        complete_features(swap, features, query, key, value),
        WIDTH**-0.5,
        **changes,
    )


def solve(backend: str, *arguments: Any, **changes: Any) -> dict[str, Tensor]:
    """The output of a call and all its gradients."""
    dtype = torch.float64 if backend == "dense" else torch.float32
    swap, kind, *decay = arguments
    problem = call_of(swap, backend, kind, dtype, *decay, **changes)
    shape = (*problem.query.shape[:3], problem.value.shape[-1])
    return results(backend, problem, torch.randn(shape, generator=torch.Generator().manual_seed(8)))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "swap", [attnswap.Softpick(), attnswap.Sigmoid(bias="learned"), attnswap.SSMax()], ids=variant_id
)
def test_calls_of_many_tiles(worker: Worker, swap: Swap, kind: str):
    compare(worker(solve, "triton", swap, kind), solve("dense", swap, kind), 4e-6, 1.6e-5, kind)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("decay", [0.02, 0.5], ids=["all tiles", "decayed tiles left out"])
@pytest.mark.parametrize("kind", ["causal", "window", "documents", "more keys"])
def test_a_key_bias_over_many_tiles(worker: Worker, kind: str, decay: float):
    swap = attnswap.ForgettingGate()
    wanted = solve("dense", swap, kind, decay)
    compare(worker(solve, "triton", swap, kind, decay), wanted, 4e-6, 1.6e-5, kind)


def capped(backend: str) -> dict[str, Tensor]:
    return solve(backend, attnswap.Softpick(), "causal", softcap=2.0)


def test_a_soft_cap_over_many_tiles(worker: Worker):
    compare(worker(capped, "triton"), capped("dense"), 4e-6, 1.6e-5, "soft cap")


# --- which tiles need a mask ------------------------------------------------------------------------------------------


def tiles_computed(kind: str) -> dict[str, tuple[int, int]]:
    """How many tiles each kernel computes, and how many of them with a mask."""
    from attnswap.attention.triton import backward, forward, launch, tile
    from attnswap.attention.triton.ops import ORDER

    problem = call_of(attnswap.Softpick(), "triton", kind, torch.float32)
    call = dict(zip(ORDER, triton_backend.operands(problem), strict=True))
    forwards, (out, shifts, inverses, _) = launch.forward(call)
    wanted = dict.fromkeys(("row_scale", "row_bias", "key_bias", "sinks", "params"), False)

    def counted(launched: launch.Launch) -> tuple[int, int]:
        scores, visible = mock.Mock(wraps=tile.tile_scores), mock.Mock(wraps=tile.visible)
        with (
            mock.patch.object(forward, "tile_scores", scores),
            mock.patch.object(backward, "tile_scores", scores),
            mock.patch.object(tile, "visible", visible),
        ):
            launched.run()
        return scores.call_count, visible.call_count

    found = {"forward": counted(forwards)}
    by_queries, by_keys, _ = launch.backward(call, torch.ones_like(out), (out, shifts, inverses), wanted)
    return found | {"backward_queries": counted(by_queries), "backward_keys": counted(by_keys)}


@pytest.mark.skipif(device_of("triton") == "cuda", reason="tiles are counted in the interpreter")
@pytest.mark.parametrize("kind", ["causal", "window", "documents", "bidirectional", "more keys", "holes"])
def test_only_tiles_that_are_not_seen_as_a_whole_have_masks(interpreted: Worker, kind: str):
    visibility = call_of(attnswap.Softpick(), "dense", kind, torch.float64).visibility
    seen = visibility.mask(0, visibility.q_length).expand(1, 1, -1, -1)[0, 0]
    found = interpreted(tiles_computed, kind)
    for kernel, (computed, masked) in found.items():
        tiles = tiles_of(kernel, "gfx942", 24, 4)
        missing = (0, -seen.shape[1] % tiles.keys, 0, -seen.shape[0] % tiles.rows)
        cut = torch.nn.functional.pad(seen, missing).unflatten(1, (-1, tiles.keys)).unflatten(0, (-1, tiles.rows))
        some, whole = (int(x.sum()) * HEADS for x in (cut.any(3).any(1), cut.all(3).all(1)))
        if kind == "holes":
            assert masked == computed == some, kernel
        else:
            assert 0 < whole < some and (computed, masked) == (some, some - whole), kernel


# --- what is printed and compiled -------------------------------------------------------------------------------------


def printed(swap: Swap) -> str:
    from attnswap.attention.triton import program

    return program.source(swap, True)


def test_exponentials_of_differences_are_one_multiply_add(interpreted: Worker):
    assert "vexp_less(s, shift)" in interpreted(printed, PLAIN)
    assert "tl.exp(" not in interpreted(printed, attnswap.Softpick())


@triton.jit
def differences(scores, shift, powers, ratios, SIZE: tl.constexpr):
    """Stores ``power_less`` and ``power_ratio`` of scores and one shift."""
    i = tl.arange(0, SIZE)
    tl.store(powers + i, power_less(tl.load(scores + i), tl.load(shift)))
    tl.store(ratios + i, power_ratio(tl.load(scores + i), tl.load(shift)))


def powers(scores: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    device = device_of("triton")
    found = [torch.empty(len(scores), device=device) for _ in range(2)]
    differences[(1,)](scores.to(device), torch.tensor([shift], device=device), *found, len(scores))
    return found[0].cpu(), found[1].cpu()


@pytest.mark.parametrize("shift", [0.0, 3.7, -130.0, 9999.5])
def test_the_forms_that_gpus_take(worker: Worker, shift: float):
    """Weights relative to that of the shift itself, within the rounding of their exponents."""
    below = torch.rand(127, generator=torch.Generator().manual_seed(0)) * 20
    scores = torch.cat([torch.tensor([shift]), shift - below])
    wanted = (scores.double() - scores[0]).exp()
    weights, ratios = (x.double() for x in worker(powers, scores, shift))
    error = (weights / weights[0] / wanted - 1).abs()
    assert (error <= 2.0**-24 * (4 + 2 * (scores - shift).abs())).all()
    # A ratio undoes the rounding of both products, so it differs from the exact one by as much.
    assert ((ratios / wanted - 1).abs() <= 2.0**-24 * (4 + 2 * (scores.abs() + abs(shift)))).all()


LISTINGS = {
    "cuda": """
.L_x_1:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT ;
        /*0020*/                   FSEL R22, R89, -INF , P3 ;
        /*0030*/                   ISETP.GE.AND P4, PT, R24.reuse, R14, PT ;
        /*0034*/               @P4 FSEL R22, R89, -INF , P3 ;
        /*0038*/              @!P4 FMUL R22, R89, R89 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT ;
.L_x_3:
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2 ;
        /*0070*/              @!P0 BRA `(.L_x_3) ;
        /*0080*/                   MUFU.EX2 R28, R35 ;
        /*0090*/                   NOP ;
        /*00a0*/               @P0 BRA `(.L_x_2) ;
        /*00b0*/                   STG.E [R2.64], R0 ;
""",
    "hip": """
.LBB0_1:                                ; in Loop: Header=BB0_2
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
	v_exp_f32_e32 v1, v2
	s_nop 1
	v_cndmask_b32_e32 v1, v2, v3, vcc
	v_mul_f32_e32 v1, v2, v3
	ds_read_b128 v[0:3], v4
	s_cbranch_scc1 .LBB0_1
""",
}


@pytest.mark.parametrize(
    ("backend", "wanted"),
    [
        ("cuda", {"matrix": 1, "special": 1, "float": 0, "memory": 0, "other": 3}),
        ("hip", {"matrix": 1, "special": 1, "float": 1, "memory": 1, "other": 2}),
    ],
)
def test_the_inner_loop_of_a_listing(backend: str, wanted: dict[str, int]):
    """The shortest loop with products, a loop that waits within it included."""
    from attnswap.attention.triton.assembly import inner_loop

    assert inner_loop(LISTINGS[backend].splitlines(), backend) == wanted
