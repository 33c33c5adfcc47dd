"""Times the kernels at many tile sizes on this GPU: ``python -m attnswap.attention.triton.tune --out FILE``.

All candidates are compiled first, on all cores, into Triton's cache. Then each is timed alone. One line of JSON is
written after each candidate, and the same command continues where it was stopped. In the end it prints entries for
``tiles.TABLE``: for each kernel the sizes with the least time, as a geometric mean over the swaps.
"""

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from attnswap.attention.codegen import solved
from attnswap.attention.triton import aot, launch
from attnswap.attention.triton.tiles import KERNELS, Tiles, tiles_of
from attnswap.devices import gpu_failure
from attnswap.errors import ConfigError, first_line
from attnswap.lines import append_line, read_whole_lines

ROWS, KEYS, WARPS, STAGES = (32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)
LENGTH, HEADS = 8192, 16
"""A call of two such rows has 512 to 2048 programs, several for each multiprocessor."""


@dataclass(frozen=True)
class Candidate:
    """A kernel at one size.

    Attributes:
        swap: A name of ``aot.SWAPS``.
        dtype: A name of ``aot.DTYPES``.
        width: Head width.
        kernel: A name of ``tiles.KERNELS``.
        tiles: The sizes.
    """

    swap: str
    dtype: str
    width: int
    kernel: str
    tiles: Tiles

    def launches(self, device: str = "cuda", length: int = LENGTH, heads: int = HEADS) -> dict[str, launch.Launch]:
        """Prepares the kernels of a causal call: this one at the candidate's sizes, the others at the table's."""

        def sizes(kernel: str, arch: str, width: int, itemsize: int) -> Tiles:
            return self.tiles if kernel == self.kernel else tiles_of(kernel, arch, width, itemsize)

        problem = aot.causal_call(aot.SWAPS[self.swap], aot.DTYPES[self.dtype], self.width, length, heads, device)
        return aot.launches(problem, sizes)


def candidates(swaps: Iterable[str], dtypes: Iterable[str], widths: Iterable[int]) -> Iterator[Candidate]:
    """Yields what is to be timed."""
    sizes = [Tiles(*numbers) for numbers in itertools.product(ROWS, KEYS, WARPS, STAGES)]
    for dtype, width, swap in itertools.product(dtypes, widths, swaps):
        left_out = "forward" if solved(aot.SWAPS[swap]) else "forward_rows"
        for kernel in KERNELS:
            if kernel != left_out:
                yield from (Candidate(swap, dtype, width, kernel, tiles) for tiles in sizes)


def compile_candidate(candidate: Candidate) -> str | None:
    """Compiles a candidate into Triton's cache; returns why that fails, or None."""
    try:
        made = candidate.launches()[candidate.kernel]
        made.kernel.warmup(grid=made.grid, **made.arguments)
    except Exception as error:  # compilers raise errors of many types, and one size must not end the run
        return first_line(error)
    return None


def time_candidate(candidate: Candidate) -> dict[str, Any]:
    """Returns the median milliseconds of a candidate as ``ms``, or why it does not run as ``failed``."""
    from triton.testing import do_bench

    try:
        made = candidate.launches()
        for name, other in made.items():
            if name == candidate.kernel:
                break
            other.run()  # the backward kernels read what those before them stored
        return {"ms": float(do_bench(made[candidate.kernel].run, warmup=5, rep=30, return_mode="median"))}
    except Exception as error:  # such as too much shared memory
        return {"failed": first_line(error)}


def read(path: Path) -> dict[Candidate, dict[str, Any]]:
    """Returns the lines of a file by candidate.

    Raises:
        ConfigError: The file was written on another kind of GPU.
    """
    found = {}
    for values in read_whole_lines(path):
        if values["target"] != launch.arch():
            raise ConfigError(f"{path} holds times of {values['target']}, not of {launch.arch()}: give another --out")
        names = {name: values[name] for name in ("swap", "dtype", "width", "kernel")}
        found[Candidate(**names, tiles=Tiles(**values["tiles"]))] = values
    return found


def best(times: dict[Candidate, dict[str, Any]]) -> dict[tuple[str, int, str], tuple[Tiles, float | None]]:
    """Chooses sizes by dtype, head width and kernel, among those at which every swap of the kernel runs.

    Returns:
        The sizes, and their time over that of the sizes of the table, as a geometric mean over the swaps; None if the
        sizes of the table were not timed.
    """
    chosen = {}
    places = dict.fromkeys((c.dtype, c.width, c.kernel) for c in times)
    for dtype, width, kernel in places:
        own = {c: v.get("ms") for c, v in times.items() if (c.dtype, c.width, c.kernel) == (dtype, width, kernel)}
        swaps = {c.swap for c in own}

        def mean(tiles: Tiles, own: dict[Candidate, Any] = own, swaps: set[str] = swaps) -> float:
            found = [ms for c, ms in own.items() if c.tiles == tiles and ms is not None]
            return math.exp(sum(map(math.log, found)) / len(found)) if len(found) == len(swaps) else math.inf

        least = min(dict.fromkeys(c.tiles for c in own), key=mean)
        present = tiles_of(kernel, launch.arch(), width, aot.DTYPES[dtype].itemsize)
        if math.isfinite(mean(least)):
            ratio = mean(least) / mean(present) if math.isfinite(mean(present)) else None
            chosen[dtype, width, kernel] = least, ratio
    return chosen


def table(times: dict[Candidate, dict[str, Any]]) -> str:
    """Writes the chosen sizes as entries of ``tiles.TABLE``; kernels that were not timed keep theirs."""
    chosen, lines = best(times), []
    for dtype, width in dict.fromkeys((dtype, width) for dtype, width, _ in chosen):
        itemsize = aot.DTYPES[dtype].itemsize
        parts, notes = [], []
        for kernel in KERNELS:
            present = tiles_of(kernel, launch.arch(), width, itemsize)
            tiles, ratio = chosen.get((dtype, width, kernel), (present, 1.0))
            parts.append(f"Tiles({tiles.rows}, {tiles.keys}, {tiles.num_warps}, {tiles.num_stages})")
            notes.append(f"{kernel} {'?' if ratio is None else f'{ratio:.2f}'}")
        key = f'("{launch.arch()}", {itemsize}, {width})'
        lines.append(f"    {key}: ({', '.join(parts)}),  # time over that of the present sizes: {', '.join(notes)}")
    return "\n".join(lines)


def run(wanted: Sequence[Candidate], out: Path, until: float) -> dict[Candidate, dict[str, Any]]:
    """Compiles and times what the file does not hold yet, until a time of ``time.monotonic``."""
    times = read(out)
    pending = [c for c in wanted if c not in times]
    quiet = not sys.stderr.isatty()

    def note(candidate: Candidate, result: dict[str, Any]) -> None:
        times[candidate] = {"target": launch.arch(), **asdict(candidate), **result}
        append_line(out, times[candidate])

    compiled = []
    with tqdm(total=len(pending), desc="compile", disable=quiet) as bar:
        for candidate, failed in compiled_on_all_cores(pending, until):
            if failed:
                note(candidate, {"failed": failed})
            else:
                compiled.append(candidate)
            bar.update()
    for candidate in tqdm(sorted(compiled, key=pending.index), desc="time", disable=quiet):
        if time.monotonic() > until:
            break
        result = time_candidate(candidate)
        note(candidate, result)  # first: a candidate that breaks the GPU must not be tried again
        broken = gpu_failure() if "failed" in result else None
        if broken:
            raise ConfigError(f"{candidate} broke the GPU's context ({broken}): run the same command again")
    return times


def compiled_on_all_cores(wanted: Sequence[Candidate], until: float) -> Iterator[tuple[Candidate, str | None]]:
    """Compiles candidates until a time of ``time.monotonic``, and yields each with why it failed, or None.

    A compiler that crashes takes its whole pool of processes with it. What may have been in hand then is compiled once
    more, one by one, so that only the candidate at fault fails.
    """
    left, suspects = list(wanted), 0
    while left and time.monotonic() < until:
        done, crashed = set(), False
        with ProcessPoolExecutor(1 if suspects else os.cpu_count(), get_context("spawn")) as pool:
            jobs = {pool.submit(compile_candidate, c): c for c in (left[:1] if suspects else left)}
            for job in as_completed(jobs):
                try:
                    failed = job.result()
                except BrokenProcessPool:
                    if not suspects:
                        crashed = True
                        continue
                    failed = "the compiler crashed"
                done.add(jobs[job])
                yield jobs[job], failed
                if time.monotonic() > until:
                    pool.shutdown(wait=False, cancel_futures=True)
                    return
        left = [c for c in left if c not in done]
        suspects = (os.cpu_count() or 1) + 1 if crashed else max(0, suspects - 1)  # the pool queues one job more


def main() -> None:
    """Runs the search and prints what it found."""
    parser = argparse.ArgumentParser(description="Time the Triton kernels at many tile sizes on this GPU.")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each candidate")
    parser.add_argument("--swaps", default=",".join(aot.SWAPS), help="names of aot.SWAPS, with commas between")
    parser.add_argument("--dtypes", default="bf16", help="bf16, fp32 or both")
    parser.add_argument("--widths", default="64,128", help="head widths")
    parser.add_argument("--seconds", type=float, default=500.0, help="stop after this time")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no GPU is available to torch")
    widths = [int(width) for width in options.widths.split(",")]
    wanted = list(candidates(options.swaps.split(","), options.dtypes.split(","), widths))
    try:
        times = run(wanted, options.out, time.monotonic() + options.seconds)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    missing = sum(c not in times for c in wanted)
    print(table({c: v for c, v in times.items() if c in set(wanted)}))
    if missing:
        sys.exit(f"error: {missing} of {len(wanted)} candidates are left: run the same command again")


if __name__ == "__main__":
    main()
