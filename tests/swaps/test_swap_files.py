"""The files of the package's swaps: each draws its curve, and gives a public config class with its paper."""

import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnswap
from attnswap.swaps import REGISTRY
from tests.helpers.drawing import curve
from tests.helpers.paths import ROOT

SWAP_FILES = sorted(Path(sys.modules[cls.__module__].__file__).stem for cls in REGISTRY.values())


@pytest.mark.parametrize("name", SWAP_FILES)
def test_every_swap_file_draws_its_curve(name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    known = dict(REGISTRY)
    try:
        with pytest.warns(RuntimeWarning, match="found in sys.modules"):
            runpy.run_module(f"attnswap.swaps.{name}", run_name="__main__")
    finally:
        REGISTRY.clear()
        REGISTRY.update(known)
    weights = curve(capsys.readouterr().out)
    assert len(weights) >= 15
    values = [weights[s] for s in sorted(weights)]
    assert values == sorted(values), "a higher score gets less weight"
    assert values[0] < values[-1] <= 1
    if name == "softpick":
        assert all((w == 0) == (s <= 0) for s, w in weights.items())
    if name == "forgetting_gate":  # no gate in the drawing: softmax's own curve
        torch.manual_seed(0)
        others = torch.randn(63, dtype=torch.float64)
        for score, weight in weights.items():
            row = torch.cat([torch.tensor([score], dtype=torch.float64), others])
            assert weight == pytest.approx(float(row.softmax(0)[0]), abs=6e-5)


def test_a_swap_file_runs_as_a_command():
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-m", "attnswap.swaps.softpick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert curve(done.stdout)[-3.0] == 0


def test_config_classes_are_public_by_their_own_names():
    for cls in REGISTRY.values():
        assert getattr(attnswap, cls.__name__) is cls
        assert cls.__name__ in dir(attnswap)
        assert cls.paper, f"{cls.__name__} names no paper"
        assert "arXiv" in cls.paper
        assert cls.summary
        assert importlib.import_module(cls.__module__).__doc__
    with pytest.raises(AttributeError, match="SoftPick"):
        attnswap.SoftPick  # noqa: B018
    listed = attnswap.list_swaps()
    assert [s.name for s in listed] == sorted(REGISTRY)
    assert all(s.traits.paper for s in listed)
