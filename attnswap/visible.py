"""Text from files, such as names in a config, shown as the text it is."""


def visible(text: object) -> str:
    r"""Returns text with everything that cannot be seen as an escape: the character ESC as the four ``\x1b``.

    A terminal obeys control characters: they move the cursor, clear the screen, set its title. Others turn the
    direction of what follows. Line breaks and tabs stay.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in str(text)
    )
