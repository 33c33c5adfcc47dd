"""Compiles the kernels ahead of time, without a GPU: ``python -m attnswap.attention.triton.aot [--out FOLDER]``.

What is compiled is the launcher's own work: real arguments, tile sizes and options, for a stand-in of the target's
driver. The table says what the compilers say: matrix instructions, shared memory, registers, spills and what the loop
over tiles issues. It says nothing about speed.
"""

import argparse
import contextlib
import io
import itertools
import json
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from attnswap.attention.autograd import DIFFERENTIABLE
from attnswap.attention.codegen import solved
from attnswap.attention.problem import Problem
from attnswap.attention.triton import launch, operands
from attnswap.attention.triton.assembly import inner_loop, listing
from attnswap.attention.triton.ops import ORDER
from attnswap.attention.triton.tiles import KERNELS, Tiles, tiles_of
from attnswap.attention.visibility import Visibility
from attnswap.markdown import markdown_table
from attnswap.swaps.base import Swap
from attnswap.swaps.entmax import Entmax
from attnswap.swaps.forgetting_gate import ForgettingGate
from attnswap.swaps.sigmoid import Sigmoid
from attnswap.swaps.softpick import Softpick

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that one program may have."""
MATRIX = {"cuda": r"\b(mma\.sync|wgmma|tcgen05)\b", "hip": r"\bv_(mfma)_"}
"""Matrix instructions in the assembly of a target."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WIDTHS = (64, 128)
SWAPS: dict[str, Swap] = {
    "softpick": Softpick(),
    "sigmoid": Sigmoid(bias="learned", max_positions=1024),
    "forgetting-gate": ForgettingGate(),
    "entmax": Entmax(),
    "entmax (learned alpha)": Entmax(alpha="learned"),
}
"""A shift with a floor; a row bias with its gradient and no shift; a key bias in fp64 with its gradient, whose decayed
tiles are left out; a threshold of the row, by a power and, with the gradient of its number, by exponentials."""
COMMAND = "python -m attnswap.attention.triton.aot"


@dataclass(frozen=True)
class Row:
    """What the compilers say of one kernel.

    Attributes:
        target: The architecture.
        swap: The swap's name.
        dtype: Of queries, keys and values.
        width: Head width.
        kernel: A name of ``tiles.KERNELS``.
        tile: Queries by keys, warps and stages, as the launcher uses them.
        matrix: The kinds of matrix instructions found, empty if none.
        shared: Shared memory in bytes.
        shared_limit: What the target has.
        registers: Per thread (AMD: vector registers, accumulators included).
        spills: Bytes spilled to memory, stores and loads (AMD: spilled vector registers).
        loop: Instructions that a warp issues for a tile that needs no mask, by the names of ``assembly.KINDS``.
        slots: All of these over the scores of a tile, per lane.
    """

    target: str
    swap: str
    dtype: str
    width: int
    kernel: str
    tile: str
    matrix: str
    shared: int
    shared_limit: int
    registers: int
    spills: int
    loop: dict[str, int]
    slots: float


@contextlib.contextmanager
def stand_in(name: str) -> Iterator[None]:
    """Lets Triton believe that the current device is a target of :data:`TARGETS`; kernels can be compiled, not run."""
    active = SimpleNamespace(
        get_current_target=lambda: TARGETS[name],
        get_current_device=lambda: name,
        get_current_stream=lambda device: 0,
    )
    config, knobs = triton.runtime.driver, triton.knobs
    before = config._active  # None until first asked for, and asking fails without a GPU
    with knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile = True, True
        config.set_active(active)
        try:
            yield
        finally:
            config._active = before


def causal_call(
    swap: Swap, dtype: torch.dtype, width: int, length: int = 256, heads: int = 4, device: str = "cpu"
) -> Problem:
    """Makes a causal call of two rows, with two query heads for each key/value head, that wants every gradient."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, count, length, width, generator=generator).to(device, dtype).requires_grad_()
        for count in (heads, heads // 2, heads // 2)
    )
    sizes = {"head": (heads,), "query": (2, heads, length), "key": (2, heads, length)}
    features = {
        name: (-torch.rand(sizes[f.per], generator=generator)).to(device).requires_grad_()
        for name, f in swap.features().items()
    }
    return Problem(swap, query, key, value, Visibility(length, length, query.device), features, width**-0.5)


def launches(problem: Problem, sizes: launch.Sizes = tiles_of) -> dict[str, launch.Launch]:
    """Prepares the launches of a call by the names of the kernels, forward and backward."""
    call = dict(zip(ORDER, operands(problem), strict=True))
    forward, (out, shifts, inverses, mean) = launch.forward(call, sizes)
    wanted = {name: call[name] is not None and call[name].requires_grad for name in DIFFERENTIABLE}
    saved = (mean if mean.numel() else out, shifts, inverses)
    by_queries, by_keys, _ = launch.backward(call, torch.randn_like(out), saved, wanted, sizes)
    return {forward.kernel.__name__: forward, "backward_queries": by_queries, "backward_keys": by_keys}


def compile_one(target: str, swap: str, dtype: str, width: int, kernel: str) -> Row:
    """Compiles one kernel of the table."""
    return replace(compile_kernel(target, causal_call(SWAPS[swap], DTYPES[dtype], width), kernel), swap=swap)


def compile_kernel(target: str, problem: Problem, kernel: str) -> Row:
    """Compiles a kernel of a call for a target of :data:`TARGETS`."""
    log = io.StringIO()
    with stand_in(target), contextlib.redirect_stdout(log):
        made = launches(problem)[kernel]
        compiled = made.kernel.warmup(grid=made.grid, **made.arguments)
    a, backend = made.arguments, TARGETS[target].backend
    assembly = compiled.asm["ptx" if backend == "cuda" else "amdgcn"]
    if backend == "cuda":
        registers = _number(r"Used (\d+) registers", log.getvalue())
        spills = sum(_number(rf"(\d+) bytes spill {way}", log.getvalue()) for way in ("stores", "loads"))
    else:
        registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
        spills = _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    loop = inner_loop(listing(compiled, backend), backend)
    lanes = a["num_warps"] * TARGETS[target].warp_size
    return Row(
        target=target,
        swap=getattr(problem.swap, "name", type(problem.swap).__name__),
        dtype=next(name for name, dtype in DTYPES.items() if dtype == problem.query.dtype),
        width=problem.query.shape[3],
        kernel=kernel,
        tile=str(Tiles(a["ROWS"], a["KEYS"], a["num_warps"], a["num_stages"])),
        matrix=", ".join(sorted(set(re.findall(MATRIX[backend], assembly)))),
        shared=compiled.metadata.shared,
        shared_limit=SHARED_LIMIT[target],
        registers=registers,
        spills=spills,
        loop=loop,
        slots=round(sum(loop.values()) * lanes / (a["ROWS"] * a["KEYS"]), 1),
    )


def _number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    if not found:
        raise RuntimeError(f"the compiler's report has no {pattern!r}:\n{text[:2000]}")
    return max(int(x) for x in found)


def everything() -> Iterator[tuple[str, str, str, int, str]]:
    """Yields what the table holds, as arguments of :func:`compile_one`."""
    for name, swap in SWAPS.items():
        kernels = [k for k in KERNELS if k != ("forward" if solved(swap) else "forward_rows")]
        yield from itertools.product(TARGETS, [name], DTYPES, WIDTHS, kernels)


def table(rows: list[Row]) -> str:
    """Writes the rows as markdown, with one line for the swaps of a kernel: the highest of each number."""
    names = ("target", "dtype", "head width", "kernel", "tile", "matrix instructions", "shared (limit)", "registers")
    lines = []
    keys = dict.fromkeys((r.target, r.dtype, r.width, r.kernel) for r in rows)
    for key in keys:
        own = [r for r in rows if (r.target, r.dtype, r.width, r.kernel) == key]
        spills = ", ".join(f"{r.spills} ({r.swap})" for r in own if r.spills) or "0"
        shared = f"{max(r.shared for r in own)} ({own[0].shared_limit})"
        slots = ", ".join(str(r.slots) for r in own)
        cells = (*key, own[0].tile, own[0].matrix or "none", shared, max(r.registers for r in own), spills, slots)
        lines.append([str(cell) for cell in cells])
    return markdown_table((*names, "spills", "issue slots"), lines, words=len(names) + 2)


def main() -> None:
    """Compiles everything and writes ``aot.json`` and ``README.md``."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for every target, without a GPU.")
    parser.add_argument("--out", type=Path, default=Path("results/triton"), help="where the table goes")
    parser.add_argument("--processes", type=int, default=1, help="how many kernels to compile at once")
    given = parser.parse_args()
    rows, out = [], given.out
    with ProcessPoolExecutor(given.processes, get_context("spawn")) as pool:
        for row in pool.map(compile_one, *zip(*everything(), strict=True)):
            rows.append(row)
            print(*asdict(row).values(), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    clean = sum(r.spills == 0 for r in rows)
    made = {"command": COMMAND, "triton": triton.__version__, "rows": [asdict(r) for r in rows]}
    (out / "aot.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    text = TEXT.format(command=COMMAND, version=triton.__version__, clean=clean, count=len(rows), table=table(rows))
    (out / "README.md").write_text(text, encoding="utf-8")


TEXT = """# The Triton kernels, compiled ahead of time

```bash
{command}
```

Compiled with Triton {version} on a machine without a GPU. **Nothing here ran on a GPU, so these numbers say nothing
about speed.** {clean} of {count} kernels spill no registers. `aot.json` has every kernel.

The table shows what the compilers report at the tile sizes that attnswap launches, for softpick, sigmoid (learned
bias), the forgetting gate, and entmax with a fixed and with a learned alpha. Shared memory and registers are the
maximum over these five. `forward_rows` is the forward pass of swaps that need a threshold of the whole row, such
as entmax; `forward` is that of the others. Shared memory is in bytes, registers are per thread, spills are bytes stored
and loaded (gfx942: vector registers). Products in fp32 are exact; NVIDIA's matrix instructions would round them, so the
fp32 kernels do not use these.

Issue slots are the instructions that the kernel's loop over tiles issues for one score, counted in the machine code for
tiles that all rows see as a whole: those before the diagonal, which need no mask. An instruction of a warp is a slot
for each of its lanes. `aot.json` counts them by kind. The column holds one number for each swap, in the order above.

Tiles are at least 64 x 64 in bf16, except for `backward_keys` on sm_80, at head width 128 on sm_90, and on gfx942. That
kernel holds four tiles of a block at once (keys, values and their two gradients) in addition to those of the scores.
With tiles of 64 x 64, at least one swap spills with every number of warps (4, 8) that was tried.

Keys and values are loaded through pointers. With descriptors (TMA) in the forward kernel for sm_90, softpick took about
as many issue slots and registers, fewer at one head width and more at the other. That is too little for a second way to
load, which needs an allocator and strides of whole 16 bytes, as long as it cannot be timed.

{table}
"""

if __name__ == "__main__":
    main()
