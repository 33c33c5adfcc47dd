"""Extra peak memory of one call, measured in a process of its own: ``python -m attnswap.bench.memory JSON``."""

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from attnswap.bench.calls import build, draw_tensors
from attnswap.bench.cases import Case, Setting, from_json, to_json
from attnswap.bench.machine import threads_and_denormals
from attnswap.errors import AttnSwapError

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Freed tensors go back to the system at once, so that the peak is what a call holds and not what glibc keeps."""

WARM_UP_LENGTH = 64
SLACK = 1 << 20
"""How far the peak may lie above the resident size right after it was reset: the kernel counts in batches of pages."""


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
    command = [sys.executable, "-m", "attnswap.bench.memory", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **ALLOCATOR})
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise AttnSwapError(f"memory of {case.label} at {setting.length}: {lines[-1]}")
    return int(json.loads(done.stdout)["extra_bytes"])


def available() -> bool:
    """Whether this system tells the peak memory of a process and lets it be reset (Linux)."""
    return RESET.exists() and "VmHWM" in STATUS.read_text()


def resident() -> tuple[int, int]:
    """Returns the resident size of this process and its peak, in bytes."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) << 10, int(lines["VmHWM"].split()[0]) << 10


def measure(case: Case, setting: Setting, backend: str) -> int:
    """Measures in this process; see :func:`extra_memory`."""
    small = replace(setting, length=min(WARM_UP_LENGTH, setting.length))
    for where in (small, small):
        warm = build(case, where, draw_tensors(where), backend)
        with warm.context():
            warm()
    call = build(case, setting, draw_tensors(setting), backend)
    del warm
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that stays with the process would hide what the call takes
    RESET.write_text("5")
    before, peak = resident()
    if peak - before > SLACK:
        raise AttnSwapError("this system does not reset the peak memory of a process")
    with call.context():
        call()
    return max(0, resident()[1] - before)


def main() -> None:
    """Reads a job from the command line and prints its result as JSON."""
    job = json.loads(sys.argv[1])
    case, setting = from_json(job)
    with threads_and_denormals(job["threads"], job["flush"]):
        print(json.dumps({"extra_bytes": measure(case, setting, job["backend"])}))


if __name__ == "__main__":
    main()
