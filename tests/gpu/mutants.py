"""Plants sign errors in the Triton kernels, one at a time, and says which ones the tests miss.

    python -m tests.gpu.mutants [--every N] [--jobs N]

A mutant is a copy of the package in which one + of a kernel is a -, or the reverse. The tests of the kernels then run
until one fails. A mutant that none catches is printed.
"""

import argparse
import ast
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.gpu.__main__ import KERNELS
from tests.helpers.paths import ROOT

FOLDER = Path("attnswap/attention/triton")
FILES = ("forward.py", "forward_rows.py", "backward.py", "tile.py", "maths.py")
SIGNS = {ast.Add: "-", ast.Sub: "+", ast.USub: " "}


@dataclass(frozen=True)
class Site:
    """One sign in a function that Triton compiles.

    Attributes:
        file: Name of the file in :data:`FOLDER`.
        function: Name of the function.
        offset: Where the sign stands in the source.
        sign: What the mutant has there.
    """

    file: str
    function: str
    offset: int
    sign: str

    def mutate(self, source: str) -> str:
        """Returns the source with the other sign."""
        return source[: self.offset] + self.sign + source[self.offset + 1 :]

    def __str__(self) -> str:
        source = (ROOT / FOLDER / self.file).read_text(encoding="utf-8")
        line = source.count("\n", 0, self.offset) + 1
        return f"{self.file}:{line} {self.function}: {self.mutate(source).splitlines()[line - 1].strip()}"


def sites(file: str) -> list[Site]:
    """Finds the signs in the compiled functions of a file."""
    source = (ROOT / FOLDER / file).read_text(encoding="utf-8")
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def position(line: int, column: int) -> int:
        return starts[line - 1] + column

    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or not function.decorator_list:
            continue
        for node in (n for statement in function.body for n in ast.walk(statement)):
            if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
                begin = position(node.left.end_lineno or 0, node.left.end_col_offset or 0)
            elif isinstance(node, ast.AugAssign) and type(node.op) in SIGNS:
                begin = position(node.target.end_lineno or 0, node.target.end_col_offset or 0)
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
                begin = position(node.lineno, node.col_offset)
            else:
                continue
            offset = min(at for at in (source.find("+", begin), source.find("-", begin)) if at >= 0)
            found.append(Site(file, function.name, offset, SIGNS[type(node.op)]))
    return found


def is_caught(site: Site, seconds: float = 600.0) -> bool:
    """Runs the tests on a mutant until one fails, and says whether one did, or whether they did not end in time.

    Raises:
        RuntimeError: The tests could not run.
    """
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for folder in ("attnswap", "tests"):
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "golden"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / FOLDER / site.file
        file.write_text(site.mutate(file.read_text(encoding="utf-8")), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *KERNELS]
        try:
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:  # a loop that a wrong sign keeps from ending
            return True
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{site}: the tests could not run:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.returncode == 1


def main() -> None:
    """Tries the mutants and prints those that no test catches."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="try every n-th mutant alone")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    options = parser.parse_args()
    chosen = [site for file in FILES for site in sites(file)][:: options.every]
    with ThreadPoolExecutor(options.jobs) as pool:
        caught = []
        for site, found in zip(chosen, pool.map(is_caught, chosen), strict=True):
            caught.append(found)
            print("caught" if found else "MISSED", site, flush=True)
    print(f"{sum(caught)} of {len(chosen)} caught")


if __name__ == "__main__":
    main()
