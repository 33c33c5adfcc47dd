"""The terminal that commands print to."""

from typing import Any

from rich.console import Console
from rich.text import Text

from attnswap.visible import visible


class Terminal(Console):
    """A console that prints strings as plain text: without markup, emoji codes and control characters.

    The strings come from files of others (names in configs, recipes, folders) and must not control the terminal.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """Returns a string with control characters made visible."""
        return super().render_str(visible(text), **options)
