"""The machine of a benchmark, its threads, and its treatment of subnormal numbers."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import attnswap
from attnswap.bench.gpu import describe_gpu
from attnswap.bench.peers import PEERS, installed
from attnswap.provenance import commit


@contextmanager
def threads_and_denormals(threads: int | None, flush: bool) -> Iterator[None]:
    """Sets the number of threads and the treatment of subnormal numbers in a ``with`` block, and restores both.

    A worker thread inherits the mode of the thread that starts it, so that this must be called before the first
    parallel call of a process. :func:`denormal_mode` tests which mode is active.

    Args:
        threads: Number of threads; None: as it is.
        flush: Whether subnormal numbers are flushed to 0.
    """
    before, flushed = torch.get_num_threads(), denormal_mode(1) == "flushed"
    torch.set_flush_denormal(flush)
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(flushed)


def denormal_mode(threads: int | None = None) -> str:
    """Tests what happens to subnormal numbers in every thread.

    Args:
        threads: Number of threads; None: all. With 1 it is the calling thread.

    Returns:
        ``"kept"``, ``"flushed"`` or, where threads differ, ``"mixed"``.
    """
    count = threads or torch.get_num_threads()
    # 2^16 numbers are more than torch leaves to one thread; a single number stays where it is.
    numbers = torch.full((1 if count == 1 else count << 16,), 1e-30)
    kept = int(((numbers * 1e-10).view(torch.int32) != 0).sum())  # compared as bits: a flushing thread sees 0 anyway
    return "flushed" if kept == 0 else "kept" if kept == len(numbers) else "mixed"


def environment() -> dict[str, Any]:
    """Returns versions, commit, processor, threads, denormal mode and GPU."""
    peers = {peer.package: peer.version for peer in PEERS.values() if peer.package and installed(peer)}
    return {
        "attnswap": attnswap.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "denormals": denormal_mode(),
        "load": os.getloadavg()[0],
        "packages": peers,
        "gpu": describe_gpu() if torch.cuda.is_available() else None,
    }


def cpu_model() -> str:
    """Returns the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
