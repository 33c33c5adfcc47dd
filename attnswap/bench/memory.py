"""Extra peak memory of one call, measured in a new process (:mod:`attnswap.bench.memory_process`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

from attnswap.bench.cases import Case, Setting, to_json
from attnswap.errors import AttnSwapError

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Environment in which freed tensors return to the system at once, so that the peak excludes glibc's free memory."""


def extra_memory(case: Case, setting: Setting, backend: str, threads: int, flush: bool) -> int:
    """Returns the extra peak memory of one call in bytes, without its inputs and the one-off costs of a first call.

    Args:
        case: The case.
        setting: The setting. The output counts, and so do the gradients if there is a backward pass.
        backend: See :func:`attnswap.bench.calls.build`.
        threads: Threads of the new process.
        flush: Whether subnormal numbers are flushed.

    Raises:
        AttnSwapError: The process failed; the message is its last line.
    """
    job = {**to_json(case, setting), "backend": backend, "threads": threads, "flush": flush}
    command = [sys.executable, "-m", "attnswap.bench.memory_process", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **ALLOCATOR})
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise AttnSwapError(f"memory of {case.label} at {setting.length}: {lines[-1]}")
    return int(json.loads(done.stdout)["extra_bytes"])


def memory_measurable() -> bool:
    """Whether this system reports the peak memory of a process and can reset it (Linux)."""
    return RESET.exists() and "VmHWM" in STATUS.read_text()
