"""Text that comes with every CPython, so that training and evaluation run offline.

Training reads the sources of the standard library. Evaluation reads the language reference in ``pydoc_data.topics``,
which the training text leaves out.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

EVALUATION = "pydoc-topics"
"""The name of :func:`evaluation_text` in reports."""

TRAINING = "stdlib-sources"
"""The name of :func:`training_documents` in recipes and reports."""


def evaluation_text() -> str:
    """Returns the Python language reference as one text of about 465 kB (PSF licence)."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def training_documents(min_chars: int = 2000) -> Iterator[str]:
    """Yields the source files of the standard library as documents, in a fixed order.

    Args:
        min_chars: Skip files with fewer characters.

    Yields:
        The text of each file. ``pydoc_data`` (kept for evaluation), tests and installed packages are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"pydoc_data", "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
    for path in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(root).parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if len(text) >= min_chars:
                yield text
