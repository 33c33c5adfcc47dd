"""Extra peak memory of one call, measured in a process of its own (:mod:`attnswap.bench.fresh`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

from attnswap.bench.cases import Case, Setting, to_json
from attnswap.errors import AttnSwapError

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Freed tensors go back to the system at once, so that the peak is what a call holds and not what glibc keeps."""


def extra_memory(case: Case, setting: Setting, backend: str, threads: int, flush: bool) -> int:
    """Measures what one call takes beyond its inputs and the one-off costs of a small call, in bytes.

    Args:
        case: What to run.
        setting: Where. The output counts, and with a backward pass the gradients.
        backend: See :func:`attnswap.bench.calls.build`.
        threads: Threads of the new process.
        flush: Whether subnormal numbers are flushed.

    Raises:
        AttnSwapError: The process failed; its last line says why.
    """
    job = {**to_json(case, setting), "backend": backend, "threads": threads, "flush": flush}
    command = [sys.executable, "-m", "attnswap.bench.fresh", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **ALLOCATOR})
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise AttnSwapError(f"memory of {case.label} at {setting.length}: {lines[-1]}")
    return int(json.loads(done.stdout)["extra_bytes"])


def available() -> bool:
    """Whether this system tells the peak memory of a process and lets it be reset (Linux)."""
    return RESET.exists() and "VmHWM" in STATUS.read_text()
