"""Checks and measures the Triton kernels on this machine's GPU, step by step: ``python -m tests.gpu [STEP ...]``.

Each step is a command of its own that ends within its time and writes its results as it goes. What the steps found is
put together in one JSON with the versions, the driver and the chip. Without a GPU the kernels are checked in Triton's
interpreter, and nothing is timed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from attnswap.bench.machine import environment
from tests.helpers.paths import ROOT

KERNELS = [f"tests/attention/test_triton{part}.py" for part in ("", "_rows", "_tiles")]
MODELS = ["tests/surgery/test_triton_models.py"]
SMALL = [
    "tests/attention/test_triton.py::test_lengths_that_do_not_fill_their_tiles",
    "tests/attention/test_triton_rows.py::test_masks",
]
"""Small calls that launch every kernel."""


Command = Callable[[Path, float], list[str]]
ENOUGH = 0.85
"""The share of a step's time after which benchmarks and searches begin nothing new, so that they end in time."""
UNPOOLED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""Gives every tensor an allocation of its own: inside torch's pool no access is out of bounds."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        what: What it does, for the help.
        command: Returns the command, from the folder for its results and the seconds that it has.
        results: The file that it writes there: JSON, or lines of JSON.
        variables: Environment variables for it.
    """

    what: str
    command: Command
    results: str
    variables: Mapping[str, str] = field(default_factory=dict)


def checks(modules: list[str], *options: str, parallel: bool = True) -> Command:
    """Returns a command for tests, slow ones too on a GPU. It runs on all cores: compiling is most of its time."""
    split = ["-n", str(os.cpu_count())] if parallel and find_spec("xdist") else []
    marks = ["-m", "slow or not slow"] if torch.cuda.is_available() else []

    def command(out: Path, seconds: float) -> list[str]:
        record = ["-p", "tests.gpu.record", "--record", str(out / "tests.jsonl"), "-p", "no:cacheprovider"]
        return [sys.executable, "-m", "pytest", "-q", *record, *split, *marks, *options, *modules]

    return command


def sanitizer(tool: str) -> Command:
    """Returns the command that runs small calls under a tool of compute-sanitizer."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    small = checks(SMALL, "-x", "-k", "lengths or causal", parallel=False)
    return lambda out, seconds: [found, "--tool", tool, "--error-exitcode", "99", *small(out, seconds)]


def bench(*options: str) -> Command:
    """Returns a benchmark in bf16."""
    return lambda out, seconds: [
        *(sys.executable, "-m", "attnswap.cli", "bench", "--device", "cuda", "--dtype", "bf16", *options),
        *("--seconds", f"{ENOUGH * seconds:.0f}", "--out", str(out)),
    ]


def tune(width: int) -> Command:
    """Returns the search for tile sizes at one head width."""
    return lambda out, seconds: [
        *(sys.executable, "-m", "attnswap.attention.triton.tune", "--widths", str(width)),
        *("--seconds", f"{ENOUGH * seconds:.0f}", "--out", str(out / "tune.jsonl")),
    ]


NAIVE = ("--lengths", "2k,4k,8k", "--tokens", "8k", "--no-peers")
STEPS = {
    "check": Step("every kernel against the dense reference", checks(KERNELS), "tests.jsonl"),
    "memcheck": Step("small calls under compute-sanitizer", sanitizer("memcheck"), "tests.jsonl", UNPOOLED),
    "racecheck": Step("the same, in search of races", sanitizer("racecheck"), "tests.jsonl"),
    "models": Step("patched models, compiled and generating", checks(MODELS), "tests.jsonl"),
    "bench-128": Step("time and memory at head_dim 128", bench("--shapes", "h16d128"), "bench.json"),
    "bench-64": Step("time and memory at head_dim 64", bench("--shapes", "h32d64"), "bench.json"),
    "bench-naive": Step("the dense reference, to 8k tokens", bench("--backend", "dense", *NAIVE), "bench.json"),
    "tune-128": Step("tile sizes for head_dim 128", tune(128), "tune.jsonl"),
    "tune-64": Step("tile sizes for head_dim 64", tune(64), "tune.jsonl"),
}
"""In the order in which they are run: what is wrong need not be timed."""


def read(path: Path) -> Any:
    """Returns what a step wrote, as far as it came."""
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def run(name: str, out: Path, seconds: float) -> dict[str, Any]:
    """Runs a step; what it prints goes to the terminal."""
    step, folder = STEPS[name], out / name
    folder.mkdir(parents=True, exist_ok=True)
    command, started = step.command(folder, seconds), time.monotonic()
    print(f"{name}: {step.what}", flush=True)
    try:
        variables = os.environ | step.variables
        status: int | str = subprocess.run(command, cwd=ROOT, env=variables, check=False, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        status = f"stopped after {seconds:.0f} s"
    except OSError as error:
        status = str(error)
    return {
        "command": " ".join(command),
        "status": status,
        "seconds": round(time.monotonic() - started, 1),
        "environment": environment(),
        "results": read(folder / step.results),
    }


def main() -> int:
    """Runs the steps, and returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    listed = "; ".join(f"{name}: {step.what}" for name, step in STEPS.items())
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"{listed}. Default: all, in this order")
    parser.add_argument(
        "--out", type=Path, default=Path("out/gpu"), help="folder for the results (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=540.0, help="time for each step (default: %(default)s)")
    options = parser.parse_args()
    unknown = [name for name in options.steps if name not in STEPS]
    if unknown:
        parser.error(f"no step {unknown[0]}; there are {', '.join(STEPS)}")
    names = options.steps or list(STEPS)
    if not torch.cuda.is_available():
        print("no GPU: the kernels are checked in Triton's interpreter, and nothing is timed", flush=True)
        names = ["check"]
    file = options.out / "gpu.json"
    found = read(file) or {}
    for name in names:
        found[name] = run(name, options.out.absolute(), options.seconds)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name in names:
        status = found[name]["status"]
        print(f"{name:10} {found[name]['seconds']:6.1f} s  {'passed' if status == 0 else f'failed ({status})'}")
    return int(any(found[name]["status"] != 0 for name in names))


if __name__ == "__main__":
    sys.exit(main())
