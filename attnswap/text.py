"""Text that is on every machine with CPython, so that everything runs offline.

Training reads the standard library's sources, evaluation the language reference of ``pydoc_data.topics``; the two
share no file.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

EVALUATION = "pydoc-topics"
"""The name under which reports list :func:`evaluation_text`."""

TRAINING = "stdlib-sources"
"""The name under which recipes and reports list :func:`training_documents`."""


def evaluation_text() -> str:
    """Returns the Python language reference as one text of about 465 kB (PSF licence)."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def training_documents(min_chars: int = 2000) -> Iterator[str]:
    """Yields the sources of the standard library, one document a file, in a fixed order.

    Args:
        min_chars: Shorter files are passed over.

    Yields:
        The text of each file, except ``pydoc_data`` (kept for evaluation), tests and installed packages.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"pydoc_data", "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
    for path in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(root).parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if len(text) >= min_chars:
                yield text
