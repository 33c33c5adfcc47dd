"""Measure a model, patched or not: perplexity and bits per byte at several context lengths over the same tokens."""

from attnswap.evaluation.bootstrap import Comparison, block_bootstrap, compare
from attnswap.evaluation.figure import plot
from attnswap.evaluation.perplexity import CONTEXTS, evaluate_perplexity
from attnswap.evaluation.report import markdown, table, write_report
from attnswap.evaluation.result import ContextMetrics, Evaluation, PositionNLL

__all__ = [
    "CONTEXTS",
    "Comparison",
    "ContextMetrics",
    "Evaluation",
    "PositionNLL",
    "block_bootstrap",
    "compare",
    "evaluate_perplexity",
    "markdown",
    "plot",
    "table",
    "write_report",
]
