"""Tables in Markdown."""

from collections.abc import Iterable, Sequence

from attnswap.visible import visible


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 0) -> str:
    """Returns a table, in which cells of several lines stand on one and control characters are shown.

    Args:
        head: The names of its columns.
        rows: Its cells.
        words: How many of the first columns hold words, which stand left; numbers stand right.
    """
    sides = ["---" if column < words else "---:" for column in range(len(head))]
    lines = ([visible(cell).replace("\n", " ").replace("|", "\\|") for cell in row] for row in (head, sides, *rows))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
