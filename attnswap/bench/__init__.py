"""Benchmarks: time and memory of swaps, compared with torch's own attention in the same run."""

from attnswap.bench.cases import SHAPES, Case, Setting, Shape, defaults, swap_cases
from attnswap.bench.model import ModelPlan, measure_model, model_table, write_model_report
from attnswap.bench.report import tables, write_report
from attnswap.bench.result import BenchResult, Cell
from attnswap.bench.run import Plan, run_bench

__all__ = [
    "SHAPES",
    "BenchResult",
    "Case",
    "Cell",
    "ModelPlan",
    "Plan",
    "Setting",
    "Shape",
    "defaults",
    "measure_model",
    "model_table",
    "run_bench",
    "swap_cases",
    "tables",
    "write_model_report",
    "write_report",
]
