"""What is written reaches the disk before anything relies on it."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Forces a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
