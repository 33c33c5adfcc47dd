"""What the file of a swap draws when it is run."""

import re

CURVE = re.compile(r"^ *(-?\d+\.\d) +(\d\.\d{4}) ([# |]*)$")


def curve(text: str) -> dict[float, float]:
    """Reads what ``python -m attnswap.swaps.<file>`` prints: the weight by score; bars must show the weights."""
    header, *lines = text.splitlines()
    assert "weight of one key" in header
    found = {}
    for line in lines:
        match = CURVE.match(line)
        assert match, line
        score, weight, bar = float(match[1]), float(match[2]), match[3]
        assert abs(bar.count("#") - weight * 50) <= 1.5, line
        assert bar.count("|") == 1
        found[score] = weight
    return found
