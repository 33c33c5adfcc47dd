"""Run a benchmark: estimate its duration, then measure every case at every setting, compared with SDPA."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache

import torch
from tqdm import tqdm

from attnswap.attention.dispatch import BACKENDS
from attnswap.bench.bounds import bound, verdict
from attnswap.bench.calls import build, draw_tensors
from attnswap.bench.cases import MODES, SDPA, SHAPES, Case, Setting, Shape, peer_cases, swap_cases
from attnswap.bench.estimate import Forecast, cell_seconds, forecast, process_seconds, reason_to_skip
from attnswap.bench.machine import environment, threads_and_denormals
from attnswap.bench.memory import extra_memory, memory_measurable
from attnswap.bench.peers import PEERS
from attnswap.bench.result import BenchResult, Cell, Memory
from attnswap.bench.statistics import median_interval
from attnswap.bench.timing import interleave
from attnswap.errors import AttnSwapError, ConfigError, nearest
from attnswap.evaluation.estimate import duration

MIN_ROUNDS = 9


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
    """

    swaps: Sequence[str] | None = None
    shapes: Sequence[Shape] = field(default_factory=lambda: tuple(SHAPES.values()))
    lengths: Sequence[int] = (1024, 2048, 4096, 8192, 16384)
    dtypes: Sequence[str] = ("float32", "bfloat16")
    backend: str = "auto"
    rounds: int = MIN_ROUNDS
    threads: int | None = None
    flush_denormals: bool = False
    peers: bool = True
    memory: bool = True
    peer_seconds: float = 120.0
    seed: int = 0

    def cases(self) -> list[Case]:
        """Returns the cases that are compared with SDPA."""
        return swap_cases(self.swaps) + (peer_cases() if self.peers else [])

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
        if not self.cases():
            raise ConfigError("nothing to measure: give at least one swap")


def run_bench(
    plan: Plan, announce: Callable[[str], None] = lambda line: None, show_progress: bool = False
) -> BenchResult:
    """Runs a benchmark.

    Args:
        plan: The options.
        announce: Called with the estimate, before the benchmark begins.
        show_progress: Draw a progress bar on stderr.

    Raises:
        ConfigError: An option is wrong, or no swap can be measured (the message has the first reason).
        UnsupportedModelError: Torch's flash attention cannot compute a setting.
    """
    plan.check()
    with threads_and_denormals(plan.threads, plan.flush_denormals):
        return _Run(plan, announce, show_progress).run()


class _Run:
    """A benchmark that is running."""

    def __init__(self, plan: Plan, announce: Callable[[str], None], show_progress: bool) -> None:
        self.plan, self.cases, self.announce, self.show_progress = plan, plan.cases(), announce, show_progress
        self.threads = torch.get_num_threads()
        lengths = sorted(set(plan.lengths))
        points = [
            (shape, dtype, mode) for shape in plan.shapes for dtype in dict.fromkeys(plan.dtypes) for mode in MODES
        ]
        self.settings = [Setting(s, n, dtype, mode) for s, dtype, mode in points for n in lengths]
        self.forecasts: dict[tuple[str, Shape, str, str], Forecast] = {}
        # Measured once per setting.
        self.sdpa_bytes = cache(lambda setting: self.bytes(SDPA, setting))

    def run(self) -> BenchResult:
        started, created = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
        env = environment()
        costs = self.estimate()
        total = sum(costs)
        self.announce(f"estimate: {duration(total)} for {len(costs)} cells of {self.plan.rounds} rounds")
        cells = []
        bar = tqdm(total=round(total), unit="s", disable=not self.show_progress, file=sys.stderr)
        with bar:
            for (case, setting), seconds in zip(self.pairs(), costs, strict=True):
                bar.set_description_str(f"{case.label} {setting.length} {setting.dtype} {setting.mode}")
                cells.append(self.cell(case, setting))
                bar.update(round(seconds))
        spent = {"seconds": time.perf_counter() - started, "estimated_seconds": total}
        return BenchResult(cells, self.options(), env, spent, created)

    def options(self) -> dict[str, object]:
        values = asdict(self.plan)
        return {**values, "swaps": sorted({case.swap["name"] for case in self.cases if case.swap})}

    def pairs(self) -> list[tuple[Case, Setting]]:
        return [(case, setting) for setting in self.settings for case in self.cases]

    def forecast(self, case: Case, setting: Setting) -> Forecast:
        key = (case.label, setting.shape, setting.dtype, setting.mode)
        if key not in self.forecasts:
            longest = replace(setting, length=max(self.plan.lengths))
            self.forecasts[key] = forecast(case, longest, self.plan.backend)
        return self.forecasts[key]

    def seconds(self, case: Case, setting: Setting) -> float:
        """Returns the estimated seconds of a cell."""
        ours, sdpa = self.forecast(case, setting), self.forecast(SDPA, setting)
        return cell_seconds(ours, sdpa, setting.length, self.plan.rounds)

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
        return self.plan.memory and memory_measurable() and any(case.kind == "swap" for case in self.cases)

    def reason(self, case: Case, setting: Setting) -> str | None:
        """Returns why a cell is skipped, or None."""
        refused = self.forecast(case, setting).refused
        if refused or case.kind != "peer":
            return refused
        return reason_to_skip(PEERS[case.label], setting, self.seconds(case, setting), self.plan.peer_seconds)

    def bytes(self, case: Case, setting: Setting) -> int:
        return extra_memory(case, setting, self.plan.backend, self.threads, self.plan.flush_denormals)

    def cell(self, case: Case, setting: Setting) -> Cell:
        reason = self.reason(case, setting)
        if reason:
            return Cell(case, setting, skipped=reason)
        tensors = draw_tensors(setting, self.plan.seed)
        sdpa, ours = (build(c, setting, tensors, self.plan.backend) for c in (SDPA, case))
        rounds = interleave(sdpa, ours, self.plan.rounds)
        ratio = median_interval([r.ours / r.sdpa for r in rounds], seed=self.plan.seed)
        limit = bound(case, setting, ours.backend)
        found = Cell(case, setting, ours.backend, rounds, ratio, limit, verdict(limit, ratio))
        if case.kind != "swap" or not self.plan.memory:
            return found
        if not memory_measurable():
            return replace(found, memory_skipped="this system does not report the peak memory of a process")
        try:
            return replace(found, memory=Memory(self.bytes(case, setting), self.sdpa_bytes(setting)))
        except AttnSwapError as error:  # a new process does not know swaps defined outside the package
            return replace(found, memory_skipped=str(error))
