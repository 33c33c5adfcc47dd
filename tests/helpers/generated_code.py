"""The generated C++ of swaps: compiled, called, and compared with the swaps' own methods."""

import ctypes
import itertools
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import attnswap
from attnswap.attention.codegen import MATHS, arguments, cpp
from attnswap.swaps import Swap
from tests.helpers.calls import Case, draw_features

FUNCTIONS = ("weight", "norm", "null", "weight_slope", "norm_slope")
COMPILER = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


def source_of(swaps: list[Swap]) -> str:
    """One translation unit: each swap's printed functions in a namespace, and a loop over rows of arguments."""
    parts = [f'#include "{MATHS}"\n']
    for i, swap in enumerate(swaps):
        width = len(arguments(swap))
        parts.append(f"namespace swap{i} {{\n{cpp(swap)}}}\n")
        args = ", ".join(f"in[r * {width} + {k}]" for k in range(width))
        for function, (kind, suffix) in itertools.product(FUNCTIONS, (("double", "d"), ("float", "f"))):
            parts.append(
                f'extern "C" void swap{i}_{function}_{suffix}(const {kind}* in, {kind}* out, long rows) {{\n'
                f"  for (long r = 0; r < rows; ++r) out[r] = swap{i}::{function}<{kind}>({args});\n}}\n"
            )
    return "\n".join(parts)


def build(swaps: list[Swap], folder: Path) -> Callable[[Swap, str, Tensor], Tensor]:
    """Compiles the printed forms; gives a function of (swap, function name, rows of arguments)."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    index = {repr(swap): i for i, swap in enumerate(swaps)}
    source, library = folder / "swaps.cpp", folder / "swaps.so"
    source.write_text(source_of(swaps), encoding="utf-8")
    flags = [
        "-std=c++20",
        "-O1",
        "-ffp-contract=off",
        "-Wall",
        "-Werror",
        "-Wno-unused-variable",
        "-Wno-psabi",
        "-shared",
        "-fPIC",
    ]
    built = subprocess.run(
        [COMPILER, *flags, str(source), "-o", str(library)], capture_output=True, text=True, timeout=300, check=False
    )
    assert built.returncode == 0, built.stderr[:3000]
    loaded = ctypes.CDLL(str(library))

    def call(swap: Swap, function: str, rows: Tensor) -> Tensor:
        suffix = {torch.float64: "d", torch.float32: "f"}[rows.dtype]
        rows, out = rows.contiguous(), torch.empty(len(rows), dtype=rows.dtype)
        pointer = ctypes.POINTER(ctypes.c_double if suffix == "d" else ctypes.c_float)
        run = getattr(loaded, f"swap{index[repr(swap)]}_{function}_{suffix}")
        run.argtypes = [pointer, pointer, ctypes.c_long]
        run.restype = None
        run(ctypes.cast(rows.data_ptr(), pointer), ctypes.cast(out.data_ptr(), pointer), len(rows))
        return out

    return call


def rows_of(swap: Swap, dtype: torch.dtype = torch.float64) -> Tensor:
    """A grid of arguments: scores up to the shift as they come, and away from the kinks of softpick and relu."""
    floor_of = [0.05, 0.5, 1.0]
    rows = []
    generator = torch.Generator().manual_seed(0)
    heads = len([f for f in swap.features().values() if f.per == "head"])
    drawn = draw_features(swap, Case(kv_heads=2, groups=32), generator)
    for s, above, n, ramp in itertools.product(
        (-60.0, -12.3, -4.0, -1.7, -0.4, 0.3, 0.9, 2.5, 7.0, 31.0), (0.0, 0.7, 25.0), (1.0, 17.0), floor_of
    ):
        shift = max(s, math.log(ramp), 0.0) + above
        head = (len(rows) * 7) % 64
        per_head = [float(drawn[name][head]) for name, f in swap.features().items() if f.per == "head"]
        rows.append([s, shift, n, ramp, *per_head])
    assert len(rows[0]) == 4 + heads
    return torch.tensor(rows, dtype=dtype)


def torch_forms(swap: Swap, rows: Tensor) -> dict[str, Tensor]:
    """The swap's own methods on tensors, and their slopes by autograd."""
    columns = {k: v.clone().requires_grad_() for k, v in zip(arguments(swap), rows.unbind(1), strict=True)}
    s = columns["s"]
    p = SimpleNamespace(**{k: v for k, v in columns.items() if k not in ("s", "shift", "n")})
    found = {
        "weight": swap.weight(s, columns["shift"], p),
        "norm": swap.norm(s, columns["shift"], p),
        "null": torch.as_tensor(swap.null(columns["shift"], columns["n"], p), dtype=rows.dtype).expand(len(rows)),
    }
    wanted = [("weight", "slope", s), ("norm", "slope", s)]
    wanted += [(name, f"by_{k}", v) for name in ("weight", "norm", "null") for k, v in vars(p).items()]
    for name, suffix, by in wanted:
        total = found[name].sum()
        slope = torch.autograd.grad(total, by, retain_graph=True, allow_unused=True)[0] if total.requires_grad else None
        found[f"{name}_{suffix}"] = torch.zeros_like(s) if slope is None else slope
    floor = swap.shift_floor(p)
    if floor is not None:
        found["floor"] = floor
    return {k: v.detach() for k, v in found.items()}


def assert_close(found: Tensor, wanted: Tensor, relative: float, what: str, absolute: float = 0.0) -> None:
    assert found.isfinite().all(), f"{what} is not finite"
    error = (((found - wanted).abs() - absolute) / wanted.abs().clamp(min=1e-300)).max()
    assert error <= relative, f"{what} is off by {float(error):.1e} of its value"


def check_cpp(compiled: Callable[[Swap, str, Tensor], Tensor], swap: Swap, allowed: float = 5e-5) -> None:
    """Compares all five printed functions with the swap's own methods, in fp64, and in fp32 up to an allowed error."""
    rows = rows_of(swap)
    wanted = torch_forms(swap, rows)
    assert wanted["weight"].any(), "every weight of the grid is 0"
    assert wanted["weight_slope"].any()
    # Autograd's slope of a sigmoid is y (1 - y), which loses what 1 - y rounds away; the printed one does not.
    # Divided by lambda where the ramp is the swap's own.
    rounding = 0.0 if isinstance(swap, attnswap.Softpick) else 1e-14 if swap.native_ramp else 3e-16
    for function in FUNCTIONS:
        absolute = rounding if function.endswith("slope") else 0.0
        assert_close(compiled(swap, function, rows), wanted[function], 1e-14, function, absolute)
    single = rows.float()
    exact = torch_forms(swap, single.double())
    for function in FUNCTIONS:
        got = compiled(swap, function, single).double()
        # fp32 underflows where fp64 does not, and exp amplifies the rounding of its argument.
        normal = exact[function].abs() > 1e-30
        error = (((got - exact[function]).abs() - rounding) / exact[function].abs())[normal]
        assert not len(error) or error.max() < allowed, f"fp32 {function} is off by {float(error.max()):.1e}"
