"""The git commit that a result was made with."""

import subprocess
from pathlib import Path

import attnswap


def commit() -> str | None:
    """Returns the commit of the checkout that this package is in, or None; ``-dirty`` marks uncommitted changes."""
    root = Path(attnswap.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
