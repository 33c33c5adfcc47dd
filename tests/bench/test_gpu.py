"""What the benchmark does for a GPU, as far as it can be tried without one."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.attention.flex_attention
from rich.console import Console

from attnswap import bench
from attnswap.bench import bounds, calls, cases, gpu, journal, peers, timing
from attnswap.bench import run as running
from attnswap.bench.cases import SDPA, Setting, Shape
from attnswap.bench.peers import PEERS
from attnswap.bench.result import BenchResult, Cell, Memory
from attnswap.bench.statistics import Ratio
from attnswap.bench.timing import Round
from attnswap.errors import ConfigError
from attnswap.swaps import resolve

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


FLEX = {case.label.removeprefix("flex "): case for case in cases.peer_cases("cuda") if case.label.startswith("flex ")}


@pytest.mark.parametrize("peer", FLEX)
def test_flex_attention_computes_the_swap(peer, monkeypatch):
    """The output, and the gradients of query, key, value and all features, which torch refuses to compute on a CPU."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *tensors: None)
    where = Setting(TINY, 64, "float32", "forward+backward", 2)
    tensors, case = calls.draw_tensors(where), FLEX[peer]
    found = calls.build(case, where, tensors)()
    same = replace(case, kind="swap" if case.swap else "sdpa")
    expected = calls.build(same, where, tensors, "dense")()
    assert len(found) == len(expected) == 4 + len(resolve(case.swap).features() if case.swap else ())
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5 * max(1.0, theirs.abs().max().item()))
    if case.swap:
        assert not torch.allclose(found[0], calls.build(SDPA, where, tensors)()[0], atol=1e-3)


def test_flex_attention_stays_compiled(monkeypatch):
    """Over more calls than dynamo compiles one function for, each is one whole graph."""
    compiled, real = [], torch.compile

    def compile_whole(function, **options):
        assert options["fullgraph"]

        def backend(graph, inputs):
            compiled.append(len(inputs))
            return graph.forward

        return real(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compile_whole)
    monkeypatch.setattr(peers, "_compiles", lambda device: True)
    lengths = [64 * i for i in range(1, 12)]
    for length in lengths:
        where = Setting(TINY, length, "float32", "forward")
        calls.build(FLEX["ssmax"], where, calls.draw_tensors(where))()
    assert len(compiled) == len(lengths) > torch._dynamo.config.recompile_limit


def test_peers_run_on_their_own_kind_of_device():
    here, there = ({case.label for case in cases.peer_cases(device)} for device in ("cpu", "cuda"))
    assert there == {"sdpa cudnn", *(f"flex {name}" for name in FLEX)} and len(FLEX) == 4
    assert not here & there and here | there <= PEERS.keys()


def test_goals_on_a_gpu():
    goal = replace(on_gpu().setting, length=16384, mode="forward+backward")
    found = {case.label: bounds.bound(case, goal) for case in bench.swap_cases()}
    assert (found["softpick"], found["sigmoid"], found["entmax"]) == (1.0, 1.0, 1.3)
    assert found["forgetting-gate log_forget=0"] == 1.1 and found["ssmax"] is None
    assert found["forgetting-gate log_forget=-0.7"] is None, "1.1 is the goal of a gate that reads all keys"
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


def test_the_time_may_be_another_when_it_continues(tmp_path):
    bench.run_bench(plan(seconds=1e-9), folder=tmp_path)
    done = bench.run_bench(plan(seconds=100.0), folder=tmp_path)
    assert all(cell.ratio for cell in done.cells) and done.plan["seconds"] == 100.0


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    first = bench.run_bench(plan(), folder=tmp_path)
    file = tmp_path / journal.NAME
    whole = file.read_text()
    file.write_text(whole[:-20])
    again = bench.run_bench(plan(), folder=tmp_path)
    assert again.cells[0] == first.cells[0] and again.cells[1] != first.cells[1] and again.cells[1].ratio
    assert len(file.read_text().splitlines()) == 3
    file.write_text(whole[:30])  # not even the head is whole
    assert all(cell.ratio for cell in bench.run_bench(plan(), folder=tmp_path).cells)


def pretend(monkeypatch, going, failure=lambda: None, unusable=None):
    """Lets a run on the CPU take the way of a GPU; notes which calls are compiled first."""
    compiled = []

    def compile_all(pairs, backend, until):
        compiled.append([(case.label, setting.length, setting.mode) for case, setting in pairs])
        return [(unusable or {}).get((case.label, setting.mode)) for case, setting in pairs]

    monkeypatch.setattr(running, "limits", lambda: {"matmul_tflops": 700.0})
    monkeypatch.setattr(running, "compile_all", compile_all)
    monkeypatch.setattr(running, "gpu_failure", failure)
    going.on_gpu, going.env["gpu"] = True, {}
    return compiled


def run_on_gpu(monkeypatch, wanted, folder=None, **changes):
    going = running._Run(wanted, lambda line: None, False, folder)
    compiled = pretend(monkeypatch, going, **changes)
    return going.run(), compiled


def failing(monkeypatch, when):
    """Lets some cells fail; returns the list of those that were tried."""
    tried, real = [], running._Run.cell

    def cell(self, case, setting):
        tried.append((case.label, setting.length, setting.mode))
        if when(case, setting):
            raise RuntimeError("CUDA out of memory\nwith details")
        return real(self, case, setting)

    monkeypatch.setattr(running._Run, "cell", cell)
    return tried


def test_a_cell_that_fails_on_a_gpu_leaves_the_others(monkeypatch):
    failing(monkeypatch, lambda case, setting: not setting.backward)
    with pytest.raises(RuntimeError, match="out of memory"):
        bench.run_bench(plan())
    done, _ = run_on_gpu(monkeypatch, plan())
    assert [cell.skipped for cell in done.cells] == ["CUDA out of memory", None]
    assert done.cells[1].share == pytest.approx(done.cells[1].tflops / 700)
    assert done.cost["estimated_seconds"] is None


def test_a_gpu_that_fails_for_good_ends_the_run(monkeypatch, tmp_path):
    """The cell at fault is not tried again; the others are, by the same command."""
    wanted, broken = plan(lengths=[16, 32, 64]), lambda case, setting: setting.length == 32
    tried = failing(monkeypatch, broken)
    done, _ = run_on_gpu(monkeypatch, wanted, tmp_path, failure=lambda: "illegal memory access")
    reasons = [cell.skipped for cell in done.cells]
    assert reasons[:2] == [None, "CUDA out of memory"] and len(tried) == 2
    assert all("illegal memory access; run it again" in reason for reason in reasons[2:])
    done, _ = run_on_gpu(monkeypatch, wanted, tmp_path)
    assert [cell.skipped for cell in done.cells] == [None, "CUDA out of memory", None, None, "CUDA out of memory", None]
    assert len(tried) == 2 + 4


def test_goals_first_and_peers_last(monkeypatch):
    """Kernels are compiled before each of the two; what has a goal is measured at once."""
    goals = {("softpick", 64, "forward+backward")}
    monkeypatch.setattr(
        running, "goal", lambda case, setting: 1.0 if (case.label, setting.length, setting.mode) in goals else None
    )
    tried = failing(monkeypatch, lambda case, setting: False)
    peer = next(case for case in cases.peer_cases() if case.label == "eager softmax")
    monkeypatch.setattr(running, "peer_cases", lambda device: [peer])
    wanted = plan(peers=True, lengths=[32, 64], swaps=["softpick", "sigmoid"])
    done, compiled = run_on_gpu(monkeypatch, wanted)
    assert tried[0] == ("softpick", 64, "forward+backward")
    assert [label == "eager softmax" for label, *_ in tried] == [False] * 8 + [True] * 4
    swaps, others = compiled
    assert sorted(swaps) == [(s, 32, mode) for s in ("sigmoid", "softpick") for mode in cases.MODES]
    assert len(others) == 4, "a peer is compiled for each length"
    order = [(cell.setting.mode, cell.setting.length, cell.case.label) for cell in done.cells]
    labels = ("softpick", "sigmoid", "eager softmax")
    assert order == [(mode, length, label) for mode in cases.MODES for length in (32, 64) for label in labels]


def test_what_does_not_compile_is_not_measured(monkeypatch, tmp_path):
    tried = failing(monkeypatch, lambda case, setting: False)
    unusable = {("softpick", "forward"): "the process that compiled its kernels died of signal 11"}
    done, _ = run_on_gpu(monkeypatch, plan(lengths=[32, 64]), tmp_path, unusable=unusable)
    assert [bool(cell.skipped) for cell in done.cells] == [True, True, False, False]
    assert "signal 11" in done.cells[0].skipped
    tried.clear()
    _, compiled = run_on_gpu(monkeypatch, plan(lengths=[32, 64]), tmp_path)
    assert tried == [] and compiled == [[], []], "nothing is compiled that was measured before"


def test_kernels_compile_in_processes_of_their_own(tmp_path, monkeypatch):
    (case,) = bench.swap_cases(["softpick"])
    where = Setting(TINY, 32, "float32", "forward")
    missing = replace(where, dtype="float8_e5m2")  # an error, which the measurement itself will name
    assert gpu.compile_all([(case, where), (case, missing)], "dense") == [None, None]
    monkeypatch.setattr(gpu, "COMPILE_SECONDS", 0.01)
    assert gpu.compile_all([(case, where)], "dense") == ["its kernels were not compiled within 0 s"]
    monkeypatch.setattr(gpu, "COMPILE_SECONDS", 60.0)
    (tmp_path / "dying.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "died of signal 11" in gpu._compile(case, where, "dense", module="dying")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **k: pytest.fail("it was too late"))
    assert gpu.compile_all([(case, where)], "dense", until=0.0) == [None]


def test_memory_is_that_of_one_sequence():
    """A batch of short sequences needs as much as one long one; the exponent is that of a sequence."""
    at = [replace(on_gpu().setting, length=n, batch=(1 << 15) // n) for n in (4096, 8192)]
    cells = [on_gpu(setting=setting) for setting in at]
    (found,) = BenchResult(cells, {}, {}, {}, "2026").exponents()
    assert found["exponent"] == pytest.approx(1.0) and found["sdpa_exponent"] == pytest.approx(1.0)


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
