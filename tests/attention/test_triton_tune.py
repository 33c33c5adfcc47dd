"""The search for tile sizes: what it times, what it chooses, and how it continues. Nothing is timed without a GPU."""

import importlib.util
import json
import math
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest

from attnswap.attention.triton.tiles import KERNELS, TABLE, Tiles, tiles_of
from attnswap.errors import ConfigError
from tests.helpers.devices import device_of
from tests.helpers.triton_calls import Worker

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

if importlib.util.find_spec("triton") is not None:
    from attnswap.attention.triton import launch, tune
    from attnswap.attention.triton.tune import Candidate, best, candidates, read, run, table

OWN = Tiles(32, 32, 4, 1)  # of no table
SMALL, LARGE = Tiles(64, 32, 4, 1), Tiles(128, 64, 8, 2)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search believes that this machine has an H100 or H200."""
    monkeypatch.setattr(launch, "arch", lambda: "sm_90")


def test_candidates_are_every_kernel_of_a_swap_at_every_size() -> None:
    found = list(candidates(["softpick", "entmax"], ["bf16"], [64]))
    assert len(set(found)) == len(found)
    assert {(c.swap, c.kernel) for c in found} == {
        ("softpick", "forward"),
        ("entmax", "forward_rows"),
        *((swap, f"backward_{part}") for swap in ("softpick", "entmax") for part in ("queries", "keys")),
    }
    for kernel in KERNELS:  # what the table holds for this chip is among them, so that the gain is known
        assert tiles_of(kernel, "sm_90", 64, 2) in {c.tiles for c in found if c.kernel == kernel}


def sizes_launched(swap: str, kernel: str) -> dict[str, Tiles]:
    candidate = Candidate(swap, "fp32", 64, kernel, OWN)
    found = candidate.launches(device_of("triton"), 128, 2)
    return {
        name: Tiles(*(made.arguments[key] for key in ("ROWS", "KEYS", "num_warps", "num_stages")))
        for name, made in found.items()
    }


@pytest.mark.parametrize(("swap", "kernel"), [("softpick", "backward_keys"), ("entmax", "forward_rows")])
def test_a_candidate_has_its_own_size_and_the_others_that_of_the_table(worker: Worker, swap: str, kernel: str) -> None:
    found = worker(sizes_launched, swap, kernel)
    assert len(found) == 3
    assert [name for name, tiles in found.items() if tiles == OWN] == [kernel]


def times(values: dict[tuple[str, Tiles], float | None]) -> dict:
    return {
        Candidate(swap, "bf16", 64, "forward", tiles): {"failed": "too large"} if ms is None else {"ms": ms}
        for (swap, tiles), ms in values.items()
    }


def test_the_least_geometric_mean_over_the_swaps_wins() -> None:
    present = tiles_of("forward", "sm_90", 64, 2)
    other = Tiles(64, 128, 4, 3)
    assert other != present
    found = times({("a", present): 2.0, ("b", present): 8.0, ("a", other): 1.0, ("b", other): 9.0})
    assert best(found) == {("bf16", 64, "forward"): (other, pytest.approx(0.75))}


def test_a_size_at_which_some_swap_fails_is_not_chosen() -> None:
    found = times({("a", SMALL): 1.0, ("b", SMALL): None, ("a", LARGE): 5.0, ("b", LARGE): 5.0})
    assert best(found)["bf16", 64, "forward"][0] == LARGE
    assert best(times({("a", SMALL): None})) == {}


def test_the_table_is_python_that_tiles_can_hold() -> None:
    text = table(times({("a", OWN): 1.0}))
    kept = "".join(f", {tiles!r}" for tiles in TABLE["sm_90", 2, 64][1:])
    for name in ("rows", "keys", "num_warps", "num_stages"):
        kept = kept.replace(f"{name}=", "")
    assert text.startswith(f'    ("sm_90", 2, 64): (Tiles(32, 32, 4, 1){kept}),  # ')


class Pool:
    """Runs jobs at once, in this process."""

    def __init__(self, *arguments: object) -> None: ...

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None: ...

    def submit(self, function, *arguments):
        from concurrent.futures import Future

        job: Future = Future()
        job.set_result(function(*arguments))
        return job

    def shutdown(self, **options: object) -> None: ...


def test_a_run_continues_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = list(candidates(["softpick"], ["bf16"], [64]))[:4]
    out, timed = tmp_path / "deep" / "tune.jsonl", []

    def measure(candidate: Candidate) -> dict:
        timed.append(candidate)
        return {"ms": 1.0} if len(timed) != 2 else {"failed": "too large"}

    monkeypatch.setattr(tune, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(tune, "compile_candidate", lambda c: "no such instruction" if c == wanted[3] else None)
    monkeypatch.setattr(tune, "time_candidate", measure)
    monkeypatch.setattr(tune, "gpu_failure", lambda: None)
    clock = mock.Mock(side_effect=[0, 0, 0, 0, 0, 1, 1, 9])  # begun, four compiled, two timed, then it is late
    monkeypatch.setattr(time, "monotonic", clock)
    found = run(wanted, out, 5)
    assert set(found) == {wanted[0], wanted[1], wanted[3]}
    monkeypatch.setattr(time, "monotonic", lambda: 0)
    with out.open("a") as file:
        file.write('{"target": "sm_9')  # a line that was cut off
    found = run(wanted, out, 5)
    assert timed == wanted[:3]
    assert found == read(out) and set(found) == set(wanted)
    assert found[wanted[3]]["failed"] == "no such instruction"
    assert found[wanted[1]]["failed"] == "too large"


def test_a_candidate_that_breaks_the_gpu_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, out = list(candidates(["softpick"], ["bf16"], [64]))[:3], tmp_path / "tune.jsonl"
    monkeypatch.setattr(tune, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(tune, "compile_candidate", lambda c: None)
    monkeypatch.setattr(tune, "time_candidate", lambda c: {"failed": "bad"} if c == wanted[1] else {"ms": 1.0})
    monkeypatch.setattr(tune, "gpu_failure", lambda: "illegal memory access")
    with pytest.raises(ConfigError, match="illegal memory access"):
        run(wanted, out, math.inf)
    assert set(read(out)) == set(wanted[:2]), "the one at fault is not tried again"


def crashes_on_odd_numbers(number: int) -> str | None:
    """Stands for a compiler that kills its process."""
    if number % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return None


def test_a_compiler_that_crashes_fails_only_its_own_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "compile_candidate", crashes_on_odd_numbers)
    found = dict(tune.compiled_on_all_cores([0, 3, 2, 4], math.inf))  # type: ignore[arg-type]
    assert found == {0: None, 3: "the compiler crashed", 2: None, 4: None}


def test_times_of_another_gpu_are_refused(tmp_path: Path) -> None:
    line = {"target": "sm_80", **asdict(Candidate("softpick", "bf16", 64, "forward", SMALL)), "ms": 1.0}
    (tmp_path / "tune.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match="sm_80, not of sm_90"):
        read(tmp_path / "tune.jsonl")
