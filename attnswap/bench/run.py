"""Run a benchmark: estimate its duration, then measure every case at every setting, compared with SDPA."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from attnswap.attention.dispatch import BACKENDS
from attnswap.bench.bounds import bound, goal, verdict
from attnswap.bench.calls import build, draw_tensors
from attnswap.bench.cases import DEFAULTS, MODES, SDPA, SHAPES, Case, Setting, Shape, defaults, peer_cases, swap_cases
from attnswap.bench.estimate import Forecast, cell_seconds, forecast, process_seconds, reason_to_skip
from attnswap.bench.gpu import clock_of, compile_all, limits, peak_memory
from attnswap.bench.journal import Journal, key
from attnswap.bench.machine import environment, threads_and_denormals
from attnswap.bench.memory import extra_memory, memory_measurable
from attnswap.bench.peers import PEERS
from attnswap.bench.result import BenchResult, Cell, Memory
from attnswap.bench.statistics import median_interval
from attnswap.bench.timing import interleave
from attnswap.devices import gpu_failure
from attnswap.errors import AttnSwapError, ConfigError, first_line, nearest
from attnswap.evaluation.estimate import duration

MIN_ROUNDS = 9
MACHINE = ("attnswap", "torch", "commit", "cpu", "threads", "denormals", "gpu")
"""What must not change while a benchmark is stopped."""


@dataclass(frozen=True)
class Plan:
    """The options of a benchmark.

    Attributes:
        swaps: Names of swaps; None: every known swap.
        shapes: Layers.
        lengths: Numbers of queries and of keys of a call.
        dtypes: Names of torch dtypes.
        backend: ``"auto"`` or the name of a backend, for swaps.
        rounds: Rounds per cell, at least 9.
        threads: Number of threads; None: torch's default.
        flush_denormals: Flush subnormal numbers to 0, in all cases.
        peers: Measure other implementations too.
        memory: Measure extra peak memory of the swaps.
        peer_seconds: Skip cells of peers that would take longer.
        seed: Seed of the tensors and of the bootstrap.
        device: Name of the torch device.
        tokens: Tokens of a call, where one sequence has fewer: the batch is ``tokens // length``, at least 1.
        seconds: Begin no further cell after this time; None: measure all.
    """

    swaps: Sequence[str] | None = None
    shapes: Sequence[Shape] = field(default_factory=lambda: [SHAPES[name] for name in DEFAULTS["cpu"].shapes])
    lengths: Sequence[int] = field(default_factory=lambda: DEFAULTS["cpu"].lengths)
    dtypes: Sequence[str] = DEFAULTS["cpu"].dtypes
    backend: str = "auto"
    rounds: int = MIN_ROUNDS
    threads: int | None = None
    flush_denormals: bool = False
    peers: bool = True
    memory: bool = True
    peer_seconds: float = 120.0
    seed: int = 0
    device: str = "cpu"
    tokens: int = 1
    seconds: float | None = None

    def cases(self) -> list[Case]:
        """Returns the cases that are compared with SDPA."""
        return swap_cases(self.swaps) + (peer_cases(self.device) if self.peers else [])

    def check(self) -> None:
        """Raises ConfigError for options that are out of range."""
        if self.rounds < MIN_ROUNDS:
            raise ConfigError(f"{self.rounds} rounds are too few for a confidence interval: give at least {MIN_ROUNDS}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, not {self.threads}")
        if not self.shapes or not self.dtypes or not self.lengths or min(self.lengths) < 2:
            raise ConfigError("give at least one shape, dtype and length, and lengths of at least 2")
        if self.backend not in ("auto", *BACKENDS):
            known = ["auto", *BACKENDS]
            raise ConfigError(
                f'unknown backend "{self.backend}".{nearest(self.backend, known)} Backends: {", ".join(known)}'
            )
        defaults(self.device)
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ConfigError(f'this machine has no device "{self.device}"')
        if self.tokens < 1 or (self.seconds is not None and self.seconds <= 0):
            raise ConfigError("tokens and seconds must be positive")
        if not self.cases():
            raise ConfigError("nothing to measure: give at least one swap")


def run_bench(
    plan: Plan,
    announce: Callable[[str], None] = lambda line: None,
    show_progress: bool = False,
    folder: Path | None = None,
) -> BenchResult:
    """Runs a benchmark.

    Args:
        plan: The options.
        announce: Called with the estimate, before the benchmark begins.
        show_progress: Draw a progress bar on stderr.
        folder: Where each finished cell is written. A benchmark that was stopped continues from what is there.

    Raises:
        ConfigError: An option is wrong, no swap can be measured (the message has the first reason), or the folder holds
            the cells of another benchmark.
        UnsupportedModelError: Torch's flash attention cannot compute a setting.
    """
    plan.check()
    with threads_and_denormals(plan.threads, plan.flush_denormals):
        return _Run(plan, announce, show_progress, folder).run()


class _Run:
    """A benchmark that is running."""

    def __init__(
        self, plan: Plan, announce: Callable[[str], None], show_progress: bool, folder: Path | None = None
    ) -> None:
        self.plan, self.cases, self.announce, self.show_progress = plan, plan.cases(), announce, show_progress
        self.threads, self.on_gpu, self.env = torch.get_num_threads(), plan.device != "cpu", environment()
        self.journal = Journal(folder, self.what(), {name: self.env[name] for name in MACHINE})
        lengths = sorted(set(plan.lengths))
        points = [
            (shape, dtype, mode) for shape in plan.shapes for dtype in dict.fromkeys(plan.dtypes) for mode in MODES
        ]
        self.settings = [
            Setting(shape, length, dtype, mode, max(1, plan.tokens // length), plan.device)
            for shape, dtype, mode in points
            for length in lengths
        ]
        self.forecasts: dict[tuple[str, Shape, str, str], Forecast] = {}
        self.unusable: dict[str, str | None] = {}  # by cell: why its kernels could not be compiled
        self.lost: str | None = None  # why this process can no longer use the GPU
        self.started = time.monotonic()
        # Measured once per setting.
        self.sdpa_bytes = cache(lambda setting: self.bytes(SDPA, setting))

    def run(self) -> BenchResult:
        self.started, created, pairs = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds"), self.pairs()
        total, counted = None, f"{len(pairs)} cells of {self.plan.rounds} rounds"
        if self.on_gpu:
            self.announce(counted)
            cells = self.measure_on_gpu()
        else:
            costs = self.estimate()
            total = sum(costs)
            self.announce(f"estimate: {duration(total)} for {counted}")
            cells = self.measure(pairs, costs, "s")
        spent = {"seconds": time.monotonic() - self.started, "estimated_seconds": total}
        return BenchResult([cells[key(Cell(*pair))] for pair in pairs], self.options(), self.env, spent, created)

    def measure(self, pairs: Sequence[tuple[Case, Setting]], costs: Sequence[float], unit: str) -> dict[str, Cell]:
        """Measures cells that advance the progress bar by their costs."""
        found = {}
        with tqdm(total=round(sum(costs)), unit=unit, disable=not self.show_progress, file=sys.stderr) as bar:
            for (case, setting), cost in zip(pairs, costs, strict=True):
                bar.set_description_str(f"{case.label} {setting.length} {setting.dtype} {setting.mode}")
                found[key(Cell(case, setting))] = self.finished(case, setting)
                bar.update(round(cost))
        return found

    def measure_on_gpu(self) -> dict[str, Cell]:
        """Measures cells with goals, then the other swaps, then peers: their kernels take the longest to compile."""
        self.env["gpu"] |= limits()
        found: dict[str, Cell] = {}
        for kind in ("swap", "peer"):
            pairs = [pair for pair in self.pairs() if pair[0].kind == kind]
            if kind == "swap":
                pairs.sort(key=lambda pair: goal(*pair) is None)
            self.compile([pair for pair in pairs if key(Cell(*pair)) not in self.journal.cells])
            found |= self.measure(pairs, [1.0] * len(pairs), "cell")
        return found

    def compile(self, pairs: Sequence[tuple[Case, Setting]]) -> None:
        """Compiles the kernels of some cells. Those of a swap are the same at every length."""
        points: dict[tuple[object, ...], list[tuple[Case, Setting]]] = {}
        for case, setting in sorted(pairs, key=lambda pair: pair[1].length):
            length = setting.length if case.kind == "peer" else None
            points.setdefault((case.label, setting.shape, setting.dtype, setting.mode, length), []).append(
                (case, setting)
            )
        until = math.inf if self.plan.seconds is None else self.started + self.plan.seconds
        reasons = compile_all([group[0] for group in points.values()], self.plan.backend, until)
        for group, reason in zip(points.values(), reasons, strict=True):
            self.unusable |= {key(Cell(*pair)): reason for pair in group}

    def finished(self, case: Case, setting: Setting) -> Cell:
        """Returns a cell: the one that was measured before, or one that is measured now if that is still possible."""
        known = self.journal.cells.get(key(Cell(case, setting)))
        if known is not None:
            return known
        if self.plan.seconds is not None and time.monotonic() - self.started > self.plan.seconds:
            return Cell(case, setting, skipped=f"the {self.plan.seconds:g} s of --seconds were used up")
        if self.lost:
            return Cell(case, setting, skipped=f"an earlier call broke the GPU's context: {self.lost}; run it again")
        try:
            cell = self.cell(case, setting)
        except Exception as error:  # kernels and compilers raise errors of many types; the other cells go on
            if not self.on_gpu:
                raise
            cell = Cell(case, setting, skipped=first_line(error))
        self.journal.add(cell)  # first: a cell that breaks the GPU must not be tried again
        if self.on_gpu and cell.skipped:
            self.lost = gpu_failure()
        return cell

    def options(self) -> dict[str, object]:
        values = asdict(self.plan)
        return {**values, "swaps": sorted({case.swap["name"] for case in self.cases if case.kind == "swap"})}

    def what(self) -> dict[str, object]:
        """Returns the options that a continued benchmark must share: how long it runs this time is not one."""
        return {name: value for name, value in self.options().items() if name != "seconds"}

    def pairs(self) -> list[tuple[Case, Setting]]:
        return [(case, setting) for setting in self.settings for case in self.cases]

    def forecast(self, case: Case, setting: Setting) -> Forecast:
        point = (case.label, setting.shape, setting.dtype, setting.mode)
        if point not in self.forecasts:
            longest = replace(setting, length=max(self.plan.lengths), batch=1)
            self.forecasts[point] = forecast(case, longest, self.plan.backend)
        return self.forecasts[point]

    def seconds(self, case: Case, setting: Setting) -> float:
        """Returns the estimated seconds of a cell."""
        ours, sdpa = self.forecast(case, setting), self.forecast(SDPA, setting)
        return cell_seconds(ours, sdpa, setting, self.plan.rounds)

    def estimate(self) -> list[float]:
        """Returns the estimated seconds of each cell.

        Raises:
            ConfigError: No swap can be measured at all.
        """
        costs = []
        refused = [self.forecast(case, setting).refused for case, setting in self.pairs() if case.kind == "swap"]
        if refused and all(refused):
            raise ConfigError(f"no swap can be measured: {refused[0]}")
        process = 0.0
        if self.measures_memory:
            case, setting = next(
                pair for pair in self.pairs() if pair[0].kind == "swap" and not self.forecast(*pair).refused
            )
            process = process_seconds(case, setting, self.plan.backend, self.threads, self.plan.flush_denormals)
        for case, setting in self.pairs():
            if self.reason(case, setting):
                costs.append(0.0)
                continue
            spent = self.seconds(case, setting)
            if self.measures_memory and case.kind == "swap":
                first = case == self.cases[0]  # its turn also measures the memory of SDPA
                spent += (process + self.forecast(case, setting).at(setting.length)) * (1 + first)
            costs.append(spent)
        return costs

    @property
    def measures_memory(self) -> bool:
        measurable = self.on_gpu or memory_measurable()
        return self.plan.memory and measurable and any(case.kind == "swap" for case in self.cases)

    def reason(self, case: Case, setting: Setting) -> str | None:
        """Returns why a cell is skipped, or None."""
        if self.on_gpu:
            return self.unusable.get(key(Cell(case, setting)))
        refused = self.forecast(case, setting).refused
        if refused or case.kind != "peer":
            return refused
        return reason_to_skip(PEERS[case.label], setting, self.seconds(case, setting), self.plan.peer_seconds)

    def bytes(self, case: Case, setting: Setting) -> int:
        if self.on_gpu:
            call = build(case, setting, draw_tensors(setting, self.plan.seed), self.plan.backend)
            with call.context():
                return peak_memory(call)
        return extra_memory(case, setting, self.plan.backend, self.threads, self.plan.flush_denormals)

    def cell(self, case: Case, setting: Setting) -> Cell:
        reason = self.reason(case, setting)
        if reason:
            return Cell(case, setting, skipped=reason)
        tensors = draw_tensors(setting, self.plan.seed)
        sdpa, ours = (build(c, setting, tensors, self.plan.backend) for c in (SDPA, case))
        rounds = interleave(sdpa, ours, self.plan.rounds, clock_of(setting.device))
        ratio = median_interval([r.ours / r.sdpa for r in rounds], seed=self.plan.seed)
        limit = bound(case, setting, ours.backend)
        found = Cell(case, setting, ours.backend, rounds, ratio, limit, verdict(limit, ratio))
        if self.on_gpu:
            found = replace(found, matmul_tflops=self.env["gpu"]["matmul_tflops"])
        if case.kind != "swap" or not self.plan.memory:
            return found
        if not self.measures_memory:
            return replace(found, memory_skipped="this system does not report the peak memory of a process")
        try:
            return replace(found, memory=Memory(self.bytes(case, setting), self.sdpa_bytes(setting)))
        except AttnSwapError as error:  # a new process does not know swaps defined outside the package
            return replace(found, memory_skipped=str(error))
