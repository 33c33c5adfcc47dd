"""Tables in Markdown."""

from collections.abc import Iterable, Sequence

from attnswap.visible import visible


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 0) -> str:
    """Returns a Markdown table. Line breaks in cells become spaces, and control characters are escaped.

    Args:
        head: The column names.
        rows: The cells.
        words: How many columns, from the left, hold text and are left-aligned. The others are right-aligned.
    """
    sides = ["---" if column < words else "---:" for column in range(len(head))]
    lines = ([visible(cell).replace("\n", " ").replace("|", "\\|") for cell in row] for row in (head, sides, *rows))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
