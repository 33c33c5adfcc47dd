"""``python -m attnswap.cli`` is the same as ``attnswap``."""

from attnswap.cli import main

main()
