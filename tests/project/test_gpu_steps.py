"""The steps for a GPU, where there is none; and what the checks of the kernels catch."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import __main__ as steps
from tests.gpu.mutants import FILES, FOLDER, Site, is_caught, sites
from tests.helpers.paths import ROOT

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def run_steps(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tests.gpu", *arguments])
    return steps.main()


@no_gpu
@pytest.mark.slow
def test_without_a_gpu_the_kernels_are_interpreted(monkeypatch, tmp_path: Path, capfd) -> None:
    small = steps.checks(["tests/attention/test_triton.py"], "-k", "lengths", parallel=False)
    monkeypatch.setitem(steps.STEPS, "check", steps.Step("small calls", small, "tests.jsonl"))
    assert run_steps(monkeypatch, "bench-64", "--out", str(tmp_path)) == 0
    out = capfd.readouterr().out
    assert out.splitlines()[0] == "no GPU: the kernels are checked in Triton's interpreter, and nothing is timed"
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == ["check"] and found["check"]["status"] == 0
    assert found["check"]["environment"]["torch"] == torch.__version__
    assert len(found["check"]["results"]) == 3
    for line in found["check"]["results"]:
        assert line["outcome"] == "passed" and line["seconds"] > 0
        assert {"output", "gradient of query", "gradient of key", "gradient of value"} <= line["errors"].keys()
        assert all(0 <= x["error"] <= x["allowed"] for x in line["errors"].values())


FAILING = """
from tests.helpers.calls import compare
import torch

def test_that_fails():
    compare({"output": torch.tensor([1.0])}, {"output": torch.tensor([1.5])}, 1e-3, 1e-3, "made up")
"""


@no_gpu
def test_a_failure_is_recorded_and_makes_the_command_fail(monkeypatch, tmp_path: Path, capfd) -> None:
    (tmp_path / "test_failing.py").write_text(FAILING)
    failing = steps.checks([str(tmp_path / "test_failing.py")], f"--rootdir={ROOT}", parallel=False)
    monkeypatch.setitem(steps.STEPS, "check", steps.Step("fails", failing, "tests.jsonl"))
    assert run_steps(monkeypatch, "--out", str(tmp_path / "out")) == 1
    assert "check" in capfd.readouterr().out.splitlines()[-1]
    (line,) = json.loads((tmp_path / "out" / "gpu.json").read_text())["check"]["results"]
    assert line["outcome"] == "failed" and "is off by" in line["why"]
    assert line["errors"]["output"]["error"] == pytest.approx(0.5 / 1.5)


@no_gpu
def test_a_step_is_stopped_when_its_time_is_up(monkeypatch, tmp_path: Path, capfd) -> None:
    endless = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setitem(steps.STEPS, "check", steps.Step("sleeps", lambda out, seconds: endless, "tests.jsonl"))
    assert run_steps(monkeypatch, "--out", str(tmp_path), "--seconds", "0.2") == 1
    assert "stopped after 0 s" in capfd.readouterr().out


def test_benchmarks_end_before_their_step_is_stopped(tmp_path: Path) -> None:
    for name in ("bench-128", "bench-naive", "tune-64"):
        command = steps.STEPS[name].command(tmp_path, 200.0)
        assert command[command.index("--seconds") + 1] == "170"


def test_an_unknown_step_is_refused(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        run_steps(monkeypatch, "chekc")
    assert "no step chekc" in capsys.readouterr().err


# --- planted errors ---------------------------------------------------------------------------------------------------

SITES = [site for file in FILES for site in sites(file)]


def test_mutants_differ_by_one_sign() -> None:
    assert len(SITES) == len(set(SITES)) > 100
    for site in SITES:
        source = (ROOT / FOLDER / site.file).read_text()
        mutant = site.mutate(source)
        assert sum(a != b for a, b in zip(source, mutant, strict=True)) == 1
        compile(mutant, site.file, "exec")


SUMS = [site for site in SITES if site.function.startswith(("forward", "backward")) and " -= tl.sum(" in str(site)]
"""What the kernels add up over the keys or queries."""


def test_every_kernel_has_a_planted_error() -> None:
    assert {site.function for site in SUMS} == {"forward", "forward_rows", "backward_queries", "backward_keys"}


@no_gpu
@pytest.mark.slow
@pytest.mark.parametrize("site", SUMS, ids=lambda site: str(site).partition(" ")[2])
def test_a_wrong_sign_in_a_kernel_is_caught(site: Site) -> None:
    assert is_caught(site)
