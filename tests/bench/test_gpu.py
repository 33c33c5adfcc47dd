"""What the benchmark does for a GPU, as far as it can be tried without one."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from attnswap import bench
from attnswap.attention import attention
from attnswap.bench import bounds, calls, cases, gpu, journal, timing
from attnswap.bench import run as running
from attnswap.bench.cases import Case, Setting, Shape
from attnswap.bench.peers import PEERS
from attnswap.bench.result import BenchResult, Cell, Memory
from attnswap.bench.statistics import Ratio
from attnswap.bench.timing import Round
from attnswap.errors import ConfigError
from attnswap.swaps import ModelInfo, resolve

TINY = Shape("tiny", 4, 2, 16)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)


def plan(**changes):
    options = {"swaps": ["softpick"], "shapes": [TINY], "lengths": [64], "dtypes": ["float32"], "peers": False}
    return bench.Plan(**{**options, "memory": False, **changes})


def on_gpu(**changes) -> Cell:
    """A cell as one of a GPU: 2 ms for 68.7 GFLOP, a tenth of the rate of matrix products."""
    where = Setting(Shape("h16d128", 16, 16, 128), 4096, "bfloat16", "forward", 1, "cuda")
    (case,) = bench.swap_cases(["softpick"])
    made = Cell(case, where, "triton", [Round(1e-3, 2e-3)] * 9, Ratio(2.0, 1.9, 2.1), matmul_tflops=343.6)
    return replace(made, **({"memory": Memory(2 << 20, 1 << 20)} | changes))


def test_operations_of_causal_attention():
    """16 heads of 4096 queries see 4096^2 / 2 keys; each pair costs two products of 128 numbers, of two operations."""
    assert on_gpu().setting.operations == 16 * 4096**2 / 2 * 2 * 128 * 2 == 68_719_476_736
    two = replace(on_gpu().setting, batch=2, mode="forward+backward")
    assert two.operations == 68_719_476_736 * 2 * 3.5
    assert on_gpu().milliseconds == 2.0
    assert on_gpu().tflops == pytest.approx(34.36, abs=0.01)
    assert on_gpu().share == pytest.approx(0.1, abs=1e-3)
    assert replace(on_gpu(), rounds=[]).tflops is None


@pytest.mark.parametrize("peer", ["softmax", "ssmax", "forgetting-gate"])
def test_flex_attention_computes_the_swap(peer):
    where = Setting(TINY, 64, "float32", "forward", 2)
    tensors = calls.draw_tensors(where)
    found = calls.build(Case(f"flex {peer}", "peer"), where, tensors)()[0]
    qkv = (tensors.query, tensors.key, tensors.value)
    if peer == "softmax":
        expected = calls.sdpa(*qkv)
    else:
        case = next(c for c in bench.swap_cases([peer]) if c.fill.get("log_forget", -1e-3) == -1e-3)
        bound = resolve(case.swap).bind(ModelInfo(4, 2, 64, 64))
        features = calls.draw_features(bound, case, where)
        expected = attention(*qkv, bound, is_causal=True, enable_gqa=True, backend="dense", **features)
        assert not torch.allclose(expected, calls.sdpa(*qkv), atol=1e-3)
    assert torch.allclose(found, expected, atol=1e-5)


def test_peers_run_on_their_own_kind_of_device():
    here, there = ({case.label for case in cases.peer_cases(device)} for device in ("cpu", "cuda"))
    assert there == {"sdpa cudnn", "flex softmax", "flex ssmax", "flex forgetting-gate"}
    assert not here & there and here | there <= PEERS.keys()


def test_goals_on_a_gpu():
    goal = replace(on_gpu().setting, length=16384, mode="forward+backward")
    found = {case.label: bounds.bound(case, goal) for case in bench.swap_cases()}
    assert (found["softpick"], found["sigmoid"], found["entmax"]) == (1.0, 1.0, 1.3)
    assert found["forgetting-gate log_forget=0"] == 1.1 and found["ssmax"] is None
    for elsewhere in (replace(goal, mode="forward"), replace(goal, length=8192), replace(goal, dtype="float32")):
        assert bounds.bound(on_gpu().case, elsewhere) is None


def test_limits_are_measured():
    found = gpu.limits(64, "cpu")
    assert found.keys() == {"matmul_tflops", "copy_gb_per_second"} and min(found.values()) > 0


@no_gpu
def test_a_machine_without_a_gpu_says_so(run):
    code, out, err = run("bench", "--device", "cuda")
    assert (code, out, err.count("\n")) == (2, "", 1) and 'no device "cuda"' in err
    with pytest.raises(ConfigError, match="no device"):
        plan(device="cuda").check()


def test_other_accelerators_are_refused():
    with pytest.raises(ConfigError, match="cannot be timed"):
        plan(device="mps").check()


def test_short_sequences_get_a_batch():
    found = bench.run_bench(plan(lengths=[32, 64, 128], tokens=64))
    assert {cell.setting.length: cell.setting.batch for cell in found.cells} == {32: 2, 64: 1, 128: 1}


# --- stopped and continued --------------------------------------------------------------------------------------------


def test_a_cell_survives_the_way_through_json():
    for cell in (on_gpu(), on_gpu(memory=None), Cell(on_gpu().case, on_gpu().setting, skipped="too large")):
        assert Cell.from_dict(json.loads(json.dumps(cell.to_dict()))) == cell


def test_a_stopped_benchmark_continues(monkeypatch, tmp_path):
    measured = []
    real = running._Run.cell

    def cell(self, case, setting):
        measured.append(setting.length)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return real(self, case, setting)

    monkeypatch.setattr(running._Run, "cell", cell)
    wanted = plan(lengths=[32, 64])
    with pytest.raises(KeyboardInterrupt):
        bench.run_bench(wanted, folder=tmp_path)
    kept = (tmp_path / journal.NAME).read_text().splitlines()
    assert len(kept) == 3 and json.loads(kept[0])["plan"]["lengths"] == [32, 64]
    found = bench.run_bench(wanted, folder=tmp_path)
    assert len(measured) == 3 + 2, "two cells were kept"
    assert [cell.to_dict() for cell in found.cells[:2]] == [json.loads(line) for line in kept[1:]]
    assert all(cell.ratio for cell in found.cells)


def test_cells_of_another_benchmark_are_refused(tmp_path):
    bench.run_bench(plan(), folder=tmp_path)
    before = (tmp_path / journal.NAME).read_text()
    with pytest.raises(ConfigError, match=r"another plan \(lengths, seed differ"):
        bench.run_bench(plan(lengths=[32], seed=1), folder=tmp_path)
    (tmp_path / journal.NAME).write_text(before.replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    with pytest.raises(ConfigError, match=r"another machine \(torch differ"):
        bench.run_bench(plan(), folder=tmp_path)


def test_what_the_time_does_not_suffice_for_is_named(tmp_path):
    late = bench.run_bench(plan(seconds=1e-9), folder=tmp_path)
    assert {cell.skipped for cell in late.cells} == {"the 1e-09 s of --seconds were used up"}
    assert len((tmp_path / journal.NAME).read_text().splitlines()) == 1, "what was not tried can be tried again"


def test_a_cell_that_fails_on_a_gpu_leaves_the_others(monkeypatch):
    real = running._Run.cell

    def cell(self, case, setting):
        if setting.backward:
            raise RuntimeError("CUDA out of memory\nwith details")
        return real(self, case, setting)

    monkeypatch.setattr(running._Run, "cell", cell)
    with pytest.raises(RuntimeError, match="out of memory"):
        bench.run_bench(plan())
    going = running._Run(plan(), lambda line: None, False)
    monkeypatch.setattr(running._Run, "prepare_gpu", lambda self: setattr(self, "on_gpu", True))
    going.env["gpu"] = {"matmul_tflops": 700.0}
    done = going.run().cells
    assert [cell.skipped for cell in done] == [None, "CUDA out of memory"]
    assert done[0].share == pytest.approx(done[0].tflops / 700)


def test_the_table_of_a_gpu():
    described = {
        "name": "H200",
        "driver": "580.1",
        "triton": "3.6.0",
        "matmul_tflops": 343.6,
        "copy_gb_per_second": 4300.0,
    }
    made = BenchResult(
        [on_gpu(), Cell(on_gpu().case, on_gpu().setting, skipped="too large")],
        {"rounds": 9, "device": "cuda"},
        {"gpu": described, "torch": "2.11"},
        {},
        "2026",
    )
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(bench.tables(made))
    shown = console.export_text()
    assert "H200, driver 580.1, torch 2.11, triton 3.6.0; bf16 matrix products 344 TFLOP/s" in shown
    row = next(line for line in shown.splitlines() if line.startswith("softpick") and "2.00" in line)
    assert row.split()[1:] == ["4096", "2.00", "[1.90,", "2.10]", "2", "34", "10%", "-", "2.0/1.0", "=", "2.0"]
