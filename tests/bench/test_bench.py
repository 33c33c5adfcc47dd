"""The benchmark: its arithmetic, the order of its calls, what it compares with, and what it writes."""

import json
import time
from importlib.resources import files

import jsonschema
import pytest
import torch
from rich.console import Console

import attnswap
from attnswap import bench
from attnswap.attention import attention
from attnswap.bench import bounds, calls, cases, estimate, machine, memory, statistics, timing
from attnswap.bench import run as running
from attnswap.bench.cases import SDPA, Case, Setting, Shape
from attnswap.bench.peers import PEERS
from attnswap.bench.statistics import Ratio
from attnswap.errors import AttnSwapError, ConfigError, UnsupportedModelError
from tests.helpers.tiny_models import tiny

TINY = Shape("tiny", 4, 2, 16)


def setting(length=64, mode="forward", dtype="float32", shape=TINY):
    return Setting(shape, length, dtype, mode)


@pytest.fixture
def short_samples(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)


def plan(**changes):
    return bench.Plan(**{"shapes": [TINY], "lengths": [64], "dtypes": ["float32"], "memory": False, **changes})


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_interval_of_the_median_against_the_exact_distribution():
    """Of 3 rounds a resampled median is the smallest, or the largest, with probability 7/27: both ends are reached.

    Of 9 rounds it is at most the k-th with probability P(Bin(9, k/9) >= 5): 0.0014 for the first, 0.0304 for the
    second, so that 2.5% lies at the second, and 97.5% at the last but one.
    """
    assert statistics.median_interval([4.0, 1.0, 2.0]) == Ratio(2.0, 1.0, 4.0)
    assert statistics.median_interval([3, 9, 1, 7, 5, 2, 8, 4, 6], resamples=100_000) == Ratio(5.0, 2.0, 8.0)
    assert statistics.median_interval([1.25] * 9) == Ratio(1.25, 1.25, 1.25)


def test_the_interval_depends_on_the_seed_alone():
    values = [1.0, 1.1, 1.3, 1.7, 2.5, 4.1]
    found = [statistics.median_interval(values, seed=seed, resamples=50) for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1]
    assert len(set(found)) > 1


def test_exponent_of_known_functions():
    assert statistics.exponent([64, 128, 1024], [3 * n**1.7 for n in (64, 128, 1024)]) == pytest.approx(1.7)
    # In powers of two: x = 0, 1, 2 and y = 0, 1, 4; the slope is (5/3 + 7/3) / 2 = 2.
    assert statistics.exponent([1, 2, 4], [1, 2, 16]) == pytest.approx(2.0)
    assert statistics.exponent([64], [5]) is None
    assert statistics.exponent([64, 128], [0, 5]) is None


def test_a_cell_passes_only_with_its_whole_interval():
    assert bounds.verdict(1.10, Ratio(1.0, 0.9, 1.09)) == "pass"
    assert bounds.verdict(1.10, Ratio(1.0, 0.9, 1.10)) == "fail"
    assert bounds.verdict(1.10, Ratio(1.05, 1.0, 1.2)) == "fail"
    assert bounds.verdict(None, Ratio(9.0, 8.0, 10.0)) == "report only"


def test_where_bounds_hold(monkeypatch):
    (ssmax,), (softpick,) = bench.swap_cases(["ssmax"]), bench.swap_cases(["softpick"])
    assert bounds.bound(ssmax, setting(2048)) == 1.10
    assert bounds.bound(softpick, setting(8192, "forward+backward")) == 1.15
    assert bounds.bound(ssmax, setting(2048, dtype="bfloat16")) == 1.10
    for elsewhere in (setting(1024), setting(16384), setting(2048, dtype="bfloat16")):
        assert bounds.bound(softpick, elsewhere) is None
    gates = bench.swap_cases(["forgetting-gate"])
    assert [bounds.bound(gate, setting(16384)) for gate in gates] == [1.15, 1.15, 0.5]
    assert [bounds.bound(gate, setting(8192)) for gate in gates] == [1.15] * 3
    assert [bounds.bound(softpick, setting(4096, mode), "tiled") for mode in cases.MODES] == [1.8, None]
    assert bounds.bound(Case("eager softmax", "peer"), setting(2048)) is None
    monkeypatch.delitem(bounds.BOUNDS, "softpick")
    assert bounds.bound(softpick, setting(2048)) is None
    monkeypatch.setitem(bounds.ROUTES, softpick.traits.route, bounds.Bound(1.8, 2.2))
    assert [bounds.bound(softpick, setting(2048, mode)) for mode in cases.MODES] == [1.8, 2.2]


# --- timing -----------------------------------------------------------------------------------------------------------


class Recorder:
    """Calls that only note that they ran, and a clock that moves by what they cost."""

    def __init__(self):
        self.order, self.now = [], 0.0

    def call(self, name, cost):
        def forward():
            self.order.append(name)
            self.now += cost
            return torch.zeros(())

        return calls.TimedCall(forward, (), torch.zeros(()))


def test_rounds_interleave():
    seen = Recorder()
    rounds = timing.interleave(seen.call("A", 1.0), seen.call("B", 3.0), 9, clock=lambda: seen.now)
    assert "".join(seen.order) == "AABB" + "AB" * 9  # the first four warm up
    assert [(r.sdpa, r.ours) for r in rounds] == [(1.0, 3.0)] * 9


def test_short_calls_are_repeated_within_a_sample():
    seen = Recorder()
    rounds = timing.interleave(seen.call("A", 1 / 128), seen.call("B", 1.0), 9, clock=lambda: seen.now)
    assert "".join(seen.order) == "AABB" + "AAAB" * 9  # 3/128 s is the first multiple beyond 20 ms
    assert rounds[0].sdpa == pytest.approx(1 / 128)


def test_torch_takes_its_flash_path_or_none():
    tensors = calls.draw_tensors(setting(mode="forward+backward"))
    call = calls.build(SDPA, setting(mode="forward+backward"), tensors)
    with call.context():
        assert "Flash" in type(call.forward().grad_fn).__name__
    narrow = calls.Tensors(tensors.query, tensors.key, tensors.value[..., :8], tensors.upstream[..., :8])
    calls.sdpa(narrow.query, narrow.key, narrow.value)  # torch alone would take another path
    with pytest.raises(UnsupportedModelError, match="flash attention cannot compute"):
        timing.sample(calls.build(SDPA, setting(), narrow), 1)


def test_threads_and_denormals_are_set_and_restored():
    before = torch.get_num_threads()
    assert machine.denormal_mode(1) == "kept"
    with machine.threads_and_denormals(1, True):
        assert (torch.get_num_threads(), machine.denormal_mode()) == (1, "flushed")
    assert (torch.get_num_threads(), machine.denormal_mode(1)) == (before, "kept")


# --- what is measured -------------------------------------------------------------------------------------------------


def test_every_known_swap_is_measured():
    found = bench.swap_cases()
    assert {case.swap["name"] for case in found} == {swap.name for swap in attnswap.list_swaps()}
    gates = [case.fill["log_forget"] for case in found if case.swap["name"] == "forgetting-gate"]
    assert gates == [0.0, -1e-3, -0.7]
    assert [dict(case.swap)["value"] for case in found if case.swap["name"] == "selective-temperature"] == [False]


SOFTMAX_HERE = ("softmax", "top-k")
"""Cases that are softmax over 64 keys: itself, and the 64 largest scores."""


@pytest.mark.parametrize("case", bench.swap_cases(), ids=lambda case: case.label)
@pytest.mark.parametrize("mode", cases.MODES)
def test_a_call_is_the_swap_away_from_identity(case, mode):
    where = setting(mode=mode)
    tensors = calls.draw_tensors(where)
    call = calls.build(case, where, tensors)
    swap = attnswap.swaps.resolve(case.swap).bind(attnswap.swaps.ModelInfo(4, 2, 64, 64))
    features = calls.draw_features(swap, case, where)
    qkv = (tensors.query, tensors.key, tensors.value)
    options = {"is_causal": True, "enable_gqa": True, "backend": "dense"}
    expected = attention(*qkv, swap, **options, **features)
    found = call()
    assert torch.allclose(found[0], expected, atol=1e-5)
    softmax = calls.sdpa(*qkv)
    assert torch.allclose(found[0], softmax, atol=1e-4) == (
        case.fill.get("log_forget") == 0.0 or case.label in SOFTMAX_HERE
    )
    assert len(found) == 1 + (3 + len(features)) * where.backward
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found[1:])
    assert call.backend in running.BACKENDS


@pytest.mark.parametrize(("label", "swap"), [("eager softmax", None), ("naive softpick", "softpick")])
def test_written_out_peers(label, swap):
    tensors = calls.draw_tensors(setting())
    found = calls.build(Case(label, "peer"), setting(), tensors)()[0]
    qkv = (tensors.query, tensors.key, tensors.value)
    expected = attention(*qkv, swap, is_causal=True, enable_gqa=True, backend="dense") if swap else calls.sdpa(*qkv)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("label", [name for name, peer in PEERS.items() if peer.package])
def test_packages(label):
    pytest.importorskip(PEERS[label].module)
    where = setting(mode="forward+backward")
    found = calls.build(Case(label, "peer"), where, calls.draw_tensors(where))()
    assert [x.shape for x in found[:2]] == [(1, 4, 64, 16)] * 2
    assert found[0][0, :, 0].abs().sum() > 0


def test_long_calls_of_peers_are_left_out():
    peer = PEERS["eager softmax"]
    assert "GiB" in estimate.reason_to_skip(peer, setting(1 << 22), 1.0, limit=10.0)
    assert "more than the limit of 10 s" in estimate.reason_to_skip(peer, setting(), 11.0, limit=10.0)
    assert estimate.reason_to_skip(peer, setting(), 9.0, limit=10.0) is None


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_in_fresh_processes():
    """The dense reference holds matrices of queries by keys, the flash path none."""
    case = bench.swap_cases(["softpick"])[0]
    shape = Shape("wide", 8, 8, 16)
    lengths = [1024, 2048]
    dense = [memory.extra_memory(case, setting(n, shape=shape), "dense", 1, False) for n in lengths]
    flash = memory.extra_memory(SDPA, setting(2048, shape=shape), "auto", 1, False)
    square = 4 * 8 * 2048**2
    assert 2 * square < dense[1] < PEERS["eager softmax"].score_matrices * square
    assert statistics.exponent(lengths, dense) == pytest.approx(2, abs=0.15)
    assert 8 * 2048 * 16 * 4 <= flash < square / 4  # at least its output


def test_a_case_survives_the_way_to_another_process():
    for case in [SDPA, *bench.swap_cases(), *cases.peer_cases()]:
        assert cases.from_json(json.loads(json.dumps(cases.to_json(case, setting())))) == (case, setting())


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_report_files_and_schema(short_samples, monkeypatch, tmp_path):
    monkeypatch.setattr(running, "extra_memory", lambda case, where, *rest: where.length * (1 + (case != SDPA)))
    monkeypatch.setattr(running, "process_seconds", lambda *rest: 0.0)
    lines = []
    found = bench.run_bench(plan(swaps=["ssmax", "softpick"], lengths=[64, 128], memory=True), lines.append)
    assert len(lines) == 1 and lines[0].startswith("estimate: ")
    assert len(found.cells) == (2 + len(cases.peer_cases())) * 2 * 2
    assert all(len(cell.rounds) == 9 and cell.ratio.lo <= cell.ratio.median <= cell.ratio.hi for cell in found.cells)
    assert {c.backend for c in found.cells if c.case.label == "ssmax"} == {"folded"}
    assert all(cell.bound is None for cell in found.cells)
    assert [(round(e["exponent"], 6), round(e["sdpa_exponent"], 6)) for e in found.exponents()] == [(1.0, 1.0)] * 4

    json_file, png = bench.write_report(found, tmp_path)
    assert png.name == "bench-tiny-fp32.png" and png.read_bytes().startswith(b"\x89PNG")
    report = json.loads(json_file.read_text())
    schema = json.loads(files("attnswap.bench").joinpath("schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(report, schema)
    assert {cell["memory"]["ratio"] for cell in report["cells"] if cell["kind"] == "swap"} == {2.0}
    for part in (report, report["env"], report["cells"][0], report["cells"][0]["rounds"][0]):
        for key in list(part):
            kept = part.pop(key)
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(report, schema)
            part[key] = kept

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(bench.tables(found))
    shown = console.export_text()
    assert "tiny, fp32, forward+backward" in shown and "naive softpick" in shown


def test_a_planted_slow_swap_fails_its_bound(monkeypatch):
    quick = attnswap.SSMax.terms

    def slow(self, call):
        time.sleep(0.05)
        return quick(self, call)

    monkeypatch.setattr(attnswap.SSMax, "terms", slow)
    found = bench.run_bench(plan(swaps=["ssmax"], lengths=[2048], peers=False))
    assert [(cell.bound, cell.verdict) for cell in found.cells] == [(1.10, "fail")] * 2
    assert all(r.ours > 0.05 > r.sdpa for r in found.cells[0].rounds)


def test_a_backend_that_cannot_serve_is_reported(short_samples):
    found = bench.run_bench(plan(swaps=["ssmax", "softpick"], backend="folded", peers=False))
    reasons = {cell.case.label: cell.skipped for cell in found.cells}
    assert reasons["ssmax"] is None and 'the stage "weights"' in reasons["softpick"]
    with pytest.raises(ConfigError, match="no swap can be measured"):
        bench.run_bench(plan(swaps=["softpick"], backend="folded", peers=False))


def test_memory_that_cannot_be_measured_is_reported(short_samples, monkeypatch):
    def fail(*arguments):
        raise AttnSwapError("unknown to a fresh process")

    monkeypatch.setattr(running, "process_seconds", lambda *rest: 0.0)
    monkeypatch.setattr(running, "extra_memory", fail)
    found = bench.run_bench(plan(swaps=["ssmax"], peers=False, memory=True))
    assert {cell.memory_skipped for cell in found.cells} == {"unknown to a fresh process"}
    assert all(cell.ratio for cell in found.cells)


def test_command_line(run, short_samples):
    options = ["--swaps", "ssmax", "--shapes", "smollm2", "--lengths", "64", "--dtype", "fp32", "--no-memory"]
    code, out, err = run("bench", *options, "--no-peers", "--threads", "1", "--json")
    report = json.loads(out)
    assert code == 0 and err.startswith("estimate: ")
    assert (report["schema"], report["env"]["threads"]) == ("attnswap.bench/1", 1)
    assert [cell["mode"] for cell in report["cells"]] == ["forward", "forward+backward"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--swaps", "sofpick"], 'Did you mean "softpick"'),
        (["--swaps", ""], "unknown swap"),
        (["--backend", "nativ"], 'Did you mean "native"'),
        (["--dtype", "fp99"], 'unknown dtype "fp99"'),
        (["--lengths", "9z"], "not a number of tokens"),
        (["--lengths", "1"], "at least 2"),
        (["--shapes", "smolm2"], 'Did you mean "smollm2"'),
        (["--rounds", "8"], "at least 9"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--rounds", "many"], "--rounds"),
        (["--out", "FILE"], "name a directory"),
    ],
)
def test_bad_input(run, tmp_path, options, message):
    (tmp_path / "FILE").write_text("")
    code, out, err = run("bench", *[str(tmp_path / o) if o == "FILE" else o for o in options])
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err


# --- whole models -----------------------------------------------------------------------------------------------------


def test_a_whole_model_is_timed_against_itself_unpatched(tmp_path, short_samples, run):
    """Both tasks with every round on record, as a table, as JSON and in a file."""
    tiny().save_pretrained(tmp_path / "model")
    plan = bench.ModelPlan(
        str(tmp_path / "model"), ["softpick", "forgetting-gate"], step_tokens=16, prompt=8, new=3, rounds=3
    )
    report = bench.measure_model(plan)
    assert [(r["swap"], r["task"]) for r in report["results"]] == [
        (swap, task) for swap in ("softpick", "forgetting-gate") for task in ("step", "generate")
    ]
    for row in report["results"]:
        assert len(row["rounds"]) == 3
        ratios = sorted(r["patched"] / r["unpatched"] for r in row["rounds"])
        assert row["ratio"]["median"] == pytest.approx(ratios[1])
    path = bench.write_model_report(report, tmp_path)
    assert json.loads(path.read_text())["results"] == report["results"]
    console = Console(width=200, record=True)
    console.print(bench.model_table(report))
    shown = console.export_text()
    assert "forgetting-gate" in shown and "<1.15" in shown


def test_a_whole_model_with_a_slow_swap_is_told_apart(tmp_path, short_samples, monkeypatch):
    """Negative control: a swap that sleeps shows in the ratio."""
    quick = attnswap.SSMax.terms
    monkeypatch.setattr(attnswap.SSMax, "terms", lambda self, call: (time.sleep(0.05), quick(self, call))[1])
    tiny().save_pretrained(tmp_path / "model")
    plan = bench.ModelPlan(str(tmp_path / "model"), ["ssmax"], tasks=["step"], step_tokens=16, rounds=3)
    (row,) = bench.measure_model(plan)["results"]
    assert row["ratio"]["lo"] > 1.5


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--tasks", "stepp"], 'Did you mean "step"'), (["--rounds", "2"], "at least 3")],
)
def test_wrong_options_of_a_whole_model(options, told, run):
    code, _, error = run("bench", "--model", "embedded", *options)
    assert code == 2 and told in error
