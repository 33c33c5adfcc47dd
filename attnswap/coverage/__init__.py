"""Test which model types of transformers can be patched, on a tiny random model of each type."""

from attnswap.coverage.report import coverage_table, write_coverage
from attnswap.coverage.run import COLUMNS, SWAPS, Row, cover, run_coverage
from attnswap.coverage.tiny import model_types, tiny_config, tiny_model

__all__ = [
    "COLUMNS",
    "SWAPS",
    "Row",
    "cover",
    "coverage_table",
    "model_types",
    "run_coverage",
    "tiny_config",
    "tiny_model",
    "write_coverage",
]
