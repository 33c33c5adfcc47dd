"""Flush files to the disk, so that they survive a crash of the machine."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
