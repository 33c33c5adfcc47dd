"""The package's own source: no function is longer than a reader can hold."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "attnswap"
LONGEST = 80
"""Lines of a function from ``def`` to its last one, docstring included."""


def functions(source: str) -> list[tuple[str, int]]:
    """Names of all functions, nested ones and methods too, with their numbers of lines."""
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(node.name, node.end_lineno - node.lineno + 1) for node in found]


def test_no_function_is_long() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    lengths = [
        (f"{path.relative_to(PACKAGE)}: {name}", lines)
        for path in files
        for name, lines in functions(path.read_text(encoding="utf-8"))
    ]
    assert len(lengths) > 100
    assert [one for one in lengths if one[1] > LONGEST] == []


def test_lines_are_counted_from_def_to_the_last_one() -> None:
    source = "@decorator\ndef f(\n    x,\n):\n    async def g():\n        pass\n\n    return g\n\n\nf(1)\n"
    assert functions(source) == [("f", 7), ("g", 2)]
