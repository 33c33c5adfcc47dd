"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 0) -> str:
    """Returns a table.

    Args:
        head: The names of its columns.
        rows: Its cells.
        words: How many of the first columns hold words, which stand left; numbers stand right.
    """
    sides = ["---" if column < words else "---:" for column in range(len(head))]
    lines = ([cell.replace("|", "\\|") for cell in row] for row in (head, sides, *rows))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
