"""Print untrusted text, such as names from a config, without letting it control the terminal."""


def visible(text: object) -> str:
    r"""Returns text in which unprintable characters are escaped: ESC becomes the four characters ``\x1b``.

    Control characters could move a terminal's cursor or clear its screen, and others reverse the direction of the
    text that follows. Line breaks and tabs are kept.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in str(text)
    )
