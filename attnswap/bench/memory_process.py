"""The process of one memory measurement: ``python -m attnswap.bench.memory_process JSON``."""

import ctypes
import gc
import json
import sys
from dataclasses import replace

from attnswap.bench.calls import build, draw_tensors
from attnswap.bench.cases import Case, Setting, from_json
from attnswap.bench.machine import threads_and_denormals
from attnswap.bench.memory import RESET, STATUS
from attnswap.errors import AttnSwapError

WARM_UP_LENGTH = 64
SLACK = 1 << 20
"""How far the peak may be above the resident size right after a reset: the kernel counts in batches of pages."""


def resident() -> tuple[int, int]:
    """Returns the current and the peak resident size of this process, in bytes."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) << 10, int(lines["VmHWM"].split()[0]) << 10


def measure(case: Case, setting: Setting, backend: str) -> int:
    """Returns the extra peak memory of one call in bytes; see :func:`attnswap.bench.memory.extra_memory`."""
    small = replace(setting, length=min(WARM_UP_LENGTH, setting.length))
    warm = build(case, small, draw_tensors(small), backend)
    with warm.context():
        warm()
    call = build(case, setting, draw_tensors(setting), backend)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the call could use freed memory of the process, which would not be measured
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
