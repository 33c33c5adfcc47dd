"""The terminal that commands print to."""

from typing import Any

from rich.console import Console
from rich.text import Text

from attnswap.visible import visible


class Terminal(Console):
    """A console on which every string is text: no markup, no emoji codes, no control characters.

    What is printed comes from files of others: names in configs, recipes, folders.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """Returns a string as it is shown."""
        return super().render_str(visible(text), **options)
