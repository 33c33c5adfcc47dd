"""What a benchmark needs of a GPU: a description of it, its limits, a clock that waits for it, and compiled kernels."""

import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from attnswap.bench.cases import Case, Setting, to_json

SIDE = 8192
"""Rows and columns of the matrices whose product is timed."""
COMPILE_SECONDS = 150.0
"""Time for compiling the kernels of one call. The slowest of ours takes some 30 s."""
ONE_THREAD = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""Environment of those processes, of which there is one for each core."""


def describe_gpu() -> dict[str, Any]:
    """Returns what identifies this GPU and the software that drives it."""
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "triton": importlib.metadata.version("triton"),
    }


def _driver() -> str | None:
    """Returns the version of the driver, or None where nvidia-smi does not say."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def limits(side: int = SIDE, device: str = "cuda") -> dict[str, float]:
    """Measures the rate of bf16 matrix products in TFLOP/s, and that of copies in GB/s, read and written bytes both."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(side * side * 4, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    product = _seconds(lambda: left @ right, device)
    copy = _seconds(lambda: target.copy_(source), device)
    return {"matmul_tflops": 2 * side**3 / product / 1e12, "copy_gb_per_second": 2 * source.nbytes / copy / 1e9}


def _seconds(call: Callable[[], Any], device: str, repeats: int = 10, rounds: int = 5) -> float:
    """Returns the median over rounds of the mean seconds of a call."""
    clock, found = clock_of(device), []
    for _ in range(3):
        call()
    for _ in range(rounds):
        started = clock()
        for _ in range(repeats):
            call()
        found.append((clock() - started) / repeats)
    return sorted(found)[rounds // 2]


def clock_of(device: str) -> Callable[[], float]:
    """Returns a clock in seconds. That of a GPU waits until the GPU has done what it was given before."""
    if torch.device(device).type == "cpu":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def peak_memory(call: Callable[[], Any]) -> int:
    """Returns the bytes of GPU memory that a call needs at its peak, beyond what is allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def compile_all(pairs: Sequence[tuple[Case, Setting]], backend: str, until: float = math.inf) -> list[str | None]:
    """Runs each call once in a process of its own, on all cores, so that its kernels are in the compilers' caches.

    Args:
        pairs: The calls.
        backend: See :func:`attnswap.bench.calls.build`.
        until: The time of ``time.monotonic`` after which no further process begins.

    Returns:
        Why each call cannot be measured, or None: its process died or took more than :data:`COMPILE_SECONDS`. A call
        that only raises an error is not among them: it says so itself when it is measured.
    """

    def compile_one(pair: tuple[Case, Setting]) -> str | None:
        return _compile(*pair, backend) if time.monotonic() < until else None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, pairs))


def _compile(case: Case, setting: Setting, backend: str, module: str = "attnswap.bench.compile_process") -> str | None:
    job = json.dumps({**to_json(case, setting), "backend": backend})
    command, variables = [sys.executable, "-m", module, job], {**os.environ, **ONE_THREAD}
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"its kernels were not compiled within {COMPILE_SECONDS:.0f} s"
    return f"the process that compiled its kernels died of signal {-done.returncode}" if done.returncode < 0 else None
